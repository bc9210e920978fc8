"""`pid-bench`: latency and memory of PiD and of cascades, as a report."""

import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pid_bench.errors import BenchInputError
from pid_ref.errors import PidInputError
from pid_runtime.command import console

if TYPE_CHECKING:
    from pid_bench.cases import Case, Network, Selection
    from pid_bench.materials import Given
    from pid_bench.report import Report, Row

_log = logging.getLogger(__name__)

SAMPLES_FOLDER = "images"
"""In a report's folder: some pixels of every PiD image, which later runs compare theirs with."""

COST_SIZES = ((1024, 1024), (2048, 2048), (3072, 3072), (4096, 4096))
"""Sizes every report counts the work of, whatever was measured."""

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
        return console.run(_compare_parser(), _compare, arguments[1:])
    if arguments[:1] == ["merge"]:
        return console.run(_merge_parser(), _merge, arguments[1:])
    return console.run(_parser(), _bench, arguments, also=(PidInputError,))


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-bench",
        "Measure PiD's decode against torch and against cascades; or pid-bench compare, merge.",
        _EXAMPLES,
    )
    what = parser.add_argument_group("what to decode with")
    what.add_argument("--space", default="flux", help="latent space (default: flux)")
    what.add_argument("--variant", default="2kto4k-v1", help="checkpoint (default: 2kto4k-v1)")
    what.add_argument(
        "--config", type=Path, metavar="FILE.json", help="a network of other dimensions"
    )
    what.add_argument("--depth", type=int, metavar="N", help="only N patch blocks of the network")
    what.add_argument("--steps", type=int, default=4, help="sampler steps of PiD: 1, 2 or 4")
    what.add_argument("--checkpoint", type=Path, help="real weights (default: random)")
    what.add_argument("--bundle", type=Path, help="a bundle (default: exported for the run)")
    which = parser.add_argument_group("which cases")
    which.add_argument("--size", metavar="LIST", help="output sizes, as 2048x2048,2688x1536")
    which.add_argument("--backends", metavar="LIST", help="eager,compile,onnxruntime,.. or all")
    which.add_argument(
        "--cascades", metavar="LIST", help="vae+rrdbnet,.. or all, none (default: the quick ones)"
    )
    which.add_argument(
        "--cascade-depth", type=float, default=1.0, metavar="SHARE", help="of their blocks, to 1"
    )
    which.add_argument("--sdx4-steps", type=int, metavar="N", help="sampler steps of vae+sdx4")
    which.add_argument("--precision", metavar="LIST", help="fp32, fp16, bf16 (CPU: fp32)")
    which.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: all cores)")
    how.add_argument("--repeats", type=int, metavar="N", help="timed decodes of every case")
    how.add_argument("--quick", action="store_true", help="an answer within a minute or so")
    how.add_argument("--dry-run", action="store_true", help="count, and run nothing")
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
    table = to_text(changes_table(changes))
    console.emit(
        {"changes": [{**asdict(c), "verdict": c.verdict} for c in changes], "notes": notes},
        "\n".join([table, *notes]),
        as_json=args.json,
    )


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
    for name, least in (("depth", 1), ("threads", 1), ("repeats", 1), ("sdx4_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = "--" + name.replace("_", "-")
            raise BenchInputError(f"expected {option} of at least {least}, but got {value}")
    if args.output is None and not args.dry_run:
        raise BenchInputError("expected -o FOLDER for the report, but got none; or --dry-run")
    # torch takes seconds to load: not before the arguments make sense by themselves.
    from pid_bench.cases import plan
    from pid_bench.materials import check_bundle, network_of_bundle

    selection, given = _select(args)
    cases = plan(selection)
    left_out = set(selection.backends) - {case.backend for case in cases}
    for name in sorted(left_out):
        _log.info(
            "backend %s does not exist in %s: left out", name, ", ".join(selection.precisions)
        )
    if not cases:
        raise BenchInputError(
            "expected something to run, but no backend exists in this precision; choose others"
        )
    if given.bundle is not None:
        check_bundle(given.bundle, network_of_bundle(given.bundle)[1], cases, given)
    if args.dry_run:
        return _count(args, cases, selection.network, given.bundle)
    return _measure(args, cases, selection, given)


def _select(args: Namespace) -> "tuple[Selection, Given]":
    """The options, checked. Raises the input errors of all packages."""
    from pid_bench import cases
    from pid_bench.cascades import CASCADES, UPSCALER_STEPS
    from pid_bench.materials import Given
    from pid_ref.sampler import timesteps
    from pid_runtime.noise import core_count

    timesteps(args.steps)  # raises for a number of steps that does not exist
    network = _network(args)
    device = _device(args)
    usual = (cases.QUICK_BACKENDS if args.quick else cases.DEFAULT_BACKENDS)[device]
    backends = cases.DRY_BACKENDS if args.dry_run else usual
    if args.backends is not None:
        backends = cases.parse_list(args.backends, cases.BACKENDS, "--backends")
        if args.backends == "all":
            backends = tuple(n for n in backends if device in cases.BACKENDS[n].devices)
    elif args.dry_run:
        backends += () if args.bundle is None else _built(args.bundle)
    elif device == "cuda" and not args.quick:
        backends = (*backends, *_installed())
    for name in backends:
        if device not in cases.BACKENDS[name].devices and not args.dry_run:
            fitting = [n for n, each in cases.BACKENDS.items() if device in each.devices]
            raise BenchInputError(
                f"expected backends that run on {device} ({', '.join(fitting)}), but got {name}"
            )
    sizes = cases.DRY_SIZES if args.dry_run else cases.DEFAULT_SIZES[device]
    if args.size is not None:
        sizes = cases.parse_sizes(args.size, network.config)
    selection = cases.Selection(
        network=network,
        sizes=sizes,
        backends=backends,
        cascades=(),
        precisions=_precisions(args, device),
        device=device,
        threads=args.threads or core_count(),
        steps=args.steps,
        cascade_depth=args.cascade_depth,
        sdx4_steps=args.sdx4_steps or UPSCALER_STEPS,
    )
    wanted = args.cascades
    if wanted is None:
        names = tuple(name for name, each in CASCADES.items() if not each.opt_in)
        usable = not args.quick and _cascades_exist(network)
    else:
        names, usable = cases.parse_list(wanted, CASCADES, "--cascades"), True
    if usable and names:
        _check_cascades(network)
        selection = replace(selection, cascades=names)
    return selection, Given(args.checkpoint, args.bundle)


def _network(args: Namespace) -> "Network":
    from pid_bench.cases import QUICK_DEPTH, Network, variant_of_file
    from pid_bench.materials import network_of_bundle
    from pid_ref.config import PidConfig
    from pid_ref.registry import find_checkpoint, find_space

    if args.bundle is not None:
        if args.config is not None or args.depth is not None:
            raise BenchInputError(
                "expected --bundle alone, which says what the network is, but got --config or "
                "--depth too; leave one out"
            )
        return network_of_bundle(args.bundle)[0]
    if args.config is not None:
        try:
            config = PidConfig.from_json(args.config.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BenchInputError(
                f"expected a file of network dimensions, but got {error}; check --config"
            ) from None
        space, variant = find_space(args.space).name, variant_of_file(asdict(config))
    else:
        checkpoint = find_checkpoint(args.space, args.variant)
        config, space, variant = checkpoint.config, checkpoint.space.name, checkpoint.variant
    depth, full = args.depth, config.patch_depth
    if depth is None:
        small = args.quick and args.config is None and not args.dry_run and _device(args) == "cpu"
        depth = QUICK_DEPTH if small else full
    if depth > full:
        raise BenchInputError(f"expected --depth of at most {full} patch blocks, but got {depth}")
    if args.checkpoint is not None and depth < full:
        raise BenchInputError("expected --checkpoint or --depth, but got both; leave one out")
    weights = "random" if args.checkpoint is None else "real"
    return Network(space, variant, replace(config, patch_depth=depth), full, weights)


def _device(args: Namespace) -> str:
    import torch

    if args.device not in (None, "cpu", "cuda"):
        raise BenchInputError(f"expected --device cpu or cuda, but got {args.device!r}")
    if args.dry_run:
        return args.device or "cuda"
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        raise BenchInputError(
            f"expected a GPU for --device cuda, but torch {torch.__version__} finds none; "
            "use --device cpu, or --dry-run"
        )
    return args.device or ("cuda" if found else "cpu")


def _precisions(args: Namespace, device: str) -> tuple[str, ...]:
    from pid_bench.cases import parse_precisions
    from pid_bench.materials import network_of_bundle

    if args.precision is not None:
        return parse_precisions(args.precision)
    if args.bundle is not None:
        return (network_of_bundle(args.bundle)[1].precision,)
    return ("fp32",) if device == "cpu" else ("bf16",)


def _built(bundle: Path) -> tuple[str, ...]:
    """Backends that a bundle has engines for."""
    from pid_bench.cases import BACKENDS
    from pid_runtime.bundle.engines import read_engine_sets
    from pid_runtime.bundle.folder import read_manifest

    flavors = {each.flavor for each in read_engine_sets(read_manifest(bundle, False)).values()}
    return tuple(name for name, each in BACKENDS.items() if each.flavor in flavors)


def _installed() -> tuple[str, ...]:
    """Backends beside torch's that this machine with a GPU has the libraries for."""
    import onnxruntime as ort

    from pid_bench.cases import BACKENDS
    from pid_engines.flavors import FLAVORS, gpu_target, library_version

    names = ("onnxruntime",) if "CUDAExecutionProvider" in ort.get_available_providers() else ()
    for name, backend in BACKENDS.items():
        flavor = FLAVORS.get(backend.flavor)
        if flavor is None or library_version(flavor) is None:
            continue
        if not flavor.targets or gpu_target() in flavor.targets:
            names += (name,)
    return names


def _cascades_exist(network: "Network") -> bool:
    """Whether cascades can run; if not, a note says why. They are not what was asked for."""
    try:
        _check_cascades(network)
    except BenchInputError as error:
        _log.info("no cascades: %s", error)
        return False
    return True


def _check_cascades(network: "Network") -> None:
    """Raise `BenchInputError` unless cascades start from this network's latent."""
    from pid_bench.cascades import SCALE, find_vae
    from pid_bench.diffusers_modules import diffusers

    vae, config = find_vae(network.space), network.config
    own = config.latent_channels, config.latent_down, config.scale
    if own != (vae.channels, vae.down, SCALE):
        raise BenchInputError(
            f"expected a network for latents of {network.space} to compare cascades with, but got "
            "other dimensions; use --cascades none"
        )
    diffusers()


def _count(
    args: Namespace, cases: "Sequence[Case]", network: "Network", bundle: Path | None
) -> int:
    """Print what is known without running anything."""
    from pid_bench.counting import counted_row
    from pid_bench.tables import counted_table, to_text

    rows: list[Row] = []
    with console.progress("Counting", len(cases), quiet=args.quiet) as advance:
        for case in cases:
            rows.append(counted_row(case, network, bundle))
            advance(1)
    console.emit(
        {"rows": [asdict(row) for row in rows]}, to_text(counted_table(rows)), as_json=args.json
    )
    return 0


def _measure(
    args: Namespace, cases: "Sequence[Case]", selection: "Selection", given: "Given"
) -> int:
    """Run what the report does not have yet, and print it; 1 when images differ or cases failed."""
    from pid_bench import hardware
    from pid_bench.measure import QUICK_REPEATS, REPEATS
    from pid_bench.render import write_all
    from pid_bench.report import REPORT_FILE, Report, derived, read_report
    from pid_bench.reported import reported_rows
    from pid_bench.runner import check_images, run_jobs
    from pid_bench.tables import decodes_table, to_text

    folder: Path = args.output
    samples = folder / SAMPLES_FOLDER
    environment = hardware.environment(selection.device, selection.threads)
    own = {case.key for case in cases}
    with _locked(folder), _Screen(args.quiet) as screen:
        report = read_report(folder) if (folder / REPORT_FILE).exists() else Report()
        report, name = report.with_environment(environment)
        for row in reported_rows():
            report = report.with_row(row)
        todo = [case for case in cases if not _is_done(report.find(case.key, environment.hardware))]
        if len(todo) < len(cases):
            known = len(cases) - len(todo)
            _log.info("%d of %d cases are in the report already", known, len(cases))
        screen.total = len(todo)
        write_all(folder, report)

        def finished(row: "Row") -> None:
            nonlocal report
            report = derived(check_images(report.with_row(row), samples))
            write_all(folder, report)
            rows = [each for each in report.rows if each.key in own and each.kind == "measured"]
            screen.show(decodes_table(rows), row)

        if todo:
            report = _with_counts(report, todo, selection)
            report = _with_ceilings(report, name, selection, screen.status)
            _remove_left_over(folder)
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
                repeats = (QUICK_REPEATS if args.quick else REPEATS)[selection.device]
                screen.status("preparing bundles")
                jobs = _jobs(todo, selection.network, given, Path(work))
                run_jobs(jobs, args.repeats or repeats, name, samples, finished, screen.status)
            report = derived(_with_ceilings(report, name, selection, screen.status))
        write_all(folder, report)
    rows = [row for row in report.rows if row.key in own and row.kind == "measured"]
    text = f"{to_text(decodes_table(rows))}\n{folder / 'report.html'}"
    result = {"report": str(folder), "rows": [asdict(row) for row in rows]}
    console.emit(result, text, as_json=args.json)
    return 1 if any(row.status == "error" or row.agrees is False for row in rows) else 0


@contextmanager
def _locked(folder: Path) -> Generator[None, None, None]:
    """Keep other runs from a report's folder, which is made if need be."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BenchInputError(
            f"expected {folder} to be free, but another pid-bench writes there; wait, or use "
            "another folder"
        ) from None
    except OSError as error:
        raise BenchInputError(
            f"expected to write {folder}, but got: {error.strerror}; choose another place with -o"
        ) from None
    try:
        yield
    finally:
        lock.release()


_WORK = ".work-"
"""How the folder of bundles made for a run begins."""


def _jobs(cases: "Sequence[Case]", network: "Network", given: "Given", folder: Path) -> Any:
    from pid_bench.materials import make_jobs

    return make_jobs(cases, network, given, folder)


def _is_done(row: "Row | None") -> bool:
    """Whether a case need not run again: it did, or memory was found not to suffice."""
    return row is not None and row.kind == "measured" and row.status in ("ok", "oom")


def _with_counts(report: "Report", cases: "Sequence[Case]", selection: "Selection") -> "Report":
    """The report with the work of the whole networks at the usual sizes, for its charts."""
    from pid_bench.cases import PID
    from pid_bench.counting import counted_row

    network = selection.network
    whole = replace(network, config=replace(network.config, patch_depth=network.full_depth))
    for case in {(c.pipeline, c.backend): c for c in cases}.values():
        depth = network.full_depth if case.pipeline == PID else 1.0
        for width, height in COST_SIZES:
            multiple = network.config.size_multiple
            if width % multiple or height % multiple:
                continue
            full = replace(case, width=width, height=height, depth=depth)
            row = counted_row(full, whole)
            report = report.with_row(replace(row, key=f"counted/{row.key}"))
    return report


def _with_ceilings(
    report: "Report", name: str, selection: "Selection", status: Callable[[str], None]
) -> "Report":
    """The report with what the device reaches at best, as far as it was not faster before."""
    from pid_bench.runner import WorkerError, measure_ceilings

    environment = report.environments[name]
    products, copies = dict(environment.matmul_tflop_per_s), environment.copy_gb_per_s
    for precision in selection.precisions:
        status(f"measuring the device's ceilings in {precision}")
        try:
            found = measure_ceilings(precision, selection.device, selection.threads)
        except WorkerError as error:
            _log.warning("cannot measure ceilings in %s: %s", precision, error)
            continue
        products[precision] = max(products.get(precision, 0.0), found["matmul_tflop_per_s"])
        copies = max(copies, found["copy_gb_per_s"])
    environment = replace(environment, matmul_tflop_per_s=products, copy_gb_per_s=copies)
    return replace(report, environments={**report.environments, name: environment})


def _remove_left_over(folder: Path) -> None:
    """Remove bundles of a run that was killed; nobody else runs, as the folder is locked."""
    import shutil

    for left in folder.glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)


class _Screen:
    """What is shown while cases run: a table on a terminal, otherwise a line per case."""

    def __init__(self, quiet: bool) -> None:
        self.total = 0
        """Cases that are going to run."""
        self._quiet, self._done = quiet, 0
        self._live: Any = None
        self._table: Any = None

    def __enter__(self) -> "_Screen":
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def status(self, text: str) -> None:
        """Say what is done now."""
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            line = Text(f"{self._done} of {self.total} cases; {text}", style="dim")
            self._live.update(Group(*([self._table] if self._table else []), line))

    def show(self, table: Any, row: "Row") -> None:
        """Show the rows so far, of which `row` is new."""
        from pid_bench.tables import label, milliseconds, pixels

        self._done += 1
        if self._live is None:
            result = f"{milliseconds(row.median_ms)} ms" if row.status == "ok" else row.message
            _log.info("%s, %s: %s", label(row), pixels(row.output_size), result)
            return
        from rich import box
        from rich.table import Table

        self._table = Table(box=box.SIMPLE)
        for index, title in enumerate(table.header):
            self._table.add_column(title, justify="right" if table.is_number(index) else "left")
        for cells in table.rows:
            self._table.add_row(*cells)
        self.status("")


if __name__ == "__main__":
    sys.exit(main())
