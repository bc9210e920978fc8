"""`pid-bench`: latency and memory of PiD and of cascades, as a report."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pid_bench.errors import BenchInputError
from pid_ref.errors import PidInputError
from pid_runtime.command import console

_EXAMPLES = """\
examples:
  pid-bench --dry-run
      work, parameters and bytes at 2048x2048 and 4096x4096; runs nothing, needs no GPU
  pid-bench --size 2048x2048,4096x4096 --device cuda -o report
  pid-bench --device cpu --size 256x256 --depth 4 --cascades none -o report
      part of the network, for a small machine; the report says so
  pid-bench --backends tensorrt --bundle flux-4k -o report
      adds to the report that is there already
  pid-bench compare before/report.json after/report.json
  pid-bench merge gpu/report.json cpu/report.json -o report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pid-bench`; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        return console.run(_compare_parser(), _compare, arguments[1:], extra="bench")
    if arguments[:1] == ["merge"]:
        return console.run(_merge_parser(), _merge, arguments[1:], extra="bench")
    return console.run(_parser(), _bench, arguments, also=(PidInputError,), extra="bench")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-bench",
        "Measure PiD's decode against torch and against cascades; or pid-bench compare, merge.",
        _EXAMPLES,
    )
    what = parser.add_argument_group("what to decode with")
    what.add_argument("--space", default="flux", help="latent space")
    what.add_argument("--variant", default="2kto4k-v1", help="checkpoint")
    what.add_argument(
        "--config", type=Path, metavar="FILE.json", help="a network of other dimensions"
    )
    what.add_argument("--depth", type=int, metavar="N", help="only N patch blocks of the network")
    what.add_argument("--steps", type=int, default=4, help="sampler steps of PiD: 1, 2 or 4")
    what.add_argument("--checkpoint", type=Path, help="real weights (default: random)")
    what.add_argument("--bundle", type=Path, help="a bundle (default: exported for the run)")
    which = parser.add_argument_group("which cases")
    which.add_argument("--size", metavar="LIST", help="output sizes, as 2048x2048,2688x1536")
    which.add_argument(
        "--tile", metavar="WxH", help="bundles also in tiles of so many pixels of the result"
    )
    which.add_argument(
        "--overlap", type=int, metavar="N", help="of tiles (default: 8 latent pixels)"
    )
    which.add_argument("--backends", metavar="LIST", help="eager,compile,onnxruntime,.. or all")
    which.add_argument(
        "--cascades", metavar="LIST", help="vae+rrdbnet,.. or all, none (default: the quick ones)"
    )
    which.add_argument(
        "--cascade-depth", type=float, default=1.0, metavar="SHARE", help="of their blocks, to 1"
    )
    which.add_argument("--sdx4-steps", type=int, metavar="N", help="sampler steps of vae+sdx4")
    which.add_argument(
        "--precision", metavar="LIST", help="fp32, fp16, bf16, int8; fp8 of a bundle (CPU: fp32)"
    )
    which.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: all cores)")
    how.add_argument("--repeats", type=int, metavar="N", help="timed decodes of every case")
    how.add_argument("--quick", action="store_true", help="an answer within a minute or so")
    how.add_argument("--dry-run", action="store_true", help="count, run nothing; -o writes it")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="the report's folder")
    return parser


def _compare_parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-bench compare",
        "What became faster or slower between two reports, beyond their noise.",
        "example: pid-bench compare before/report.json after/report.json",
    )
    parser.add_argument("before", type=Path, help="report.json, or its folder")
    parser.add_argument("after", type=Path, help="another")
    return parser


def _merge_parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-bench merge",
        "Put the rows of several reports into one; of equal cases the last one stays.",
        "example: pid-bench merge gpu/report.json cpu/report.json -o report",
    )
    parser.add_argument("reports", type=Path, nargs="+", help="report.json files or their folders")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    return parser


def _compare(args: Namespace) -> None:
    from pid_bench.compare import changes_table, compare
    from pid_bench.report import read_report
    from pid_bench.tables import to_text

    changes, notes = compare(read_report(args.before), read_report(args.after))
    if not changes:
        raise BenchInputError(
            f"expected a case that was measured in both {args.before} and {args.after}, but there "
            "is none; measure the same sizes, backends and device"
        )
    text = "\n".join([to_text(changes_table(changes)), *notes])
    console.emit({"changes": changes, "notes": notes}, text, as_json=args.json)


def _merge(args: Namespace) -> None:
    from pid_bench.render import write_all
    from pid_bench.report import Report, read_report

    report = Report()
    for path in args.reports:
        report = report.merged(read_report(path))
    write_all(args.output, report)
    console.emit(
        {"report": str(args.output), "rows": len(report.rows)},
        f"{args.output}: {len(report.rows)} rows of {len(args.reports)} reports",
        as_json=args.json,
    )


def _bench(args: Namespace) -> int:
    for name in ("depth", "threads", "repeats", "sdx4_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise BenchInputError(f"expected {option} of at least 1, but got {value}")
    if args.output is None and not args.dry_run:
        raise BenchInputError("expected -o FOLDER for the report, but got none; or --dry-run")
    # torch takes seconds to load: not before the arguments make sense by themselves.
    from pid_bench.run import bench

    return bench(args)


if __name__ == "__main__":
    sys.exit(main())
