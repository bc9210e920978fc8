"""Keeps the figures in README.md and docs/ those of `bench/results/`.

    python tools/figures.py            # writes the tables between their markers
    python tools/figures.py --check    # exit code 1 when one differs

A table stands between two lines, and nothing else writes there:

    <!-- figures: engine-memory -->
    <!-- end of figures -->
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pid_bench.errors import BenchInputError
from pid_bench.report import Report, Row, read_report, write_file
from pid_bench.tables import Table, gigabytes, milliseconds, network, pixels, to_markdown
from pid_runtime.command import console

RESULTS = "bench/results"
"""Folder of the measurements, in the repository."""

PAGES = ("README.md", "docs")
"""Where markers may stand: files, and folders with their *.md."""

NETWORKS = {"2kto4k-v1": "v1", "2kto4k": "v1.5"}
"""Generation of the network by variant."""

END = "<!-- end of figures -->"

_MARKED = re.compile(
    r"(?P<begin><!-- figures: (?P<name>[a-z0-9-]+) -->\n).*?(?P<end>" + re.escape(END) + ")",
    re.DOTALL,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check say whether they are written; returns the exit code."""
    parser = console.ArgumentParser(
        "figures.py",
        "Write the tables of README.md and docs/ from the measurements in bench/results/.",
        "example: python tools/figures.py --check",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if one differs")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository (default: here)")
    return console.run(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    stale = [
        page
        for page in pages(args.root)
        if with_figures(page.read_text("utf-8"), args.root) != page.read_text("utf-8")
    ]
    if not args.check:
        for page in stale:
            write_file(page, with_figures(page.read_text("utf-8"), args.root))
    names = [str(page) for page in stale]
    what = "differs from" if args.check else "written from"
    text = "\n".join(f"{name}: {what} {RESULTS}" for name in names) or "all figures are current"
    console.emit({"stale": names}, text, as_json=args.json)
    return 1 if stale and args.check else 0


def pages(root: Path) -> list[Path]:
    """The pages of a repository that may have figures."""
    found: list[Path] = []
    for name in PAGES:
        path = root / name
        found += sorted(path.glob("*.md")) if path.is_dir() else [path] if path.is_file() else []
    return found


def with_figures(text: str, root: Path) -> str:
    """A page with every marked table as the measurements have it.

    Raises `BenchInputError` for a marker of another name or without an end.
    """
    if text.count("<!-- figures: ") != len(_MARKED.findall(text)):
        raise BenchInputError(f"expected {END!r} after every table of figures, but one has none")

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in FIGURES:
            raise BenchInputError(
                f"expected figures of {', '.join(FIGURES)}, but got {name!r}; mend the marker"
            )
        return f"{match['begin']}{to_markdown(FIGURES[name](root / RESULTS))}\n{match['end']}"

    return _MARKED.sub(table, text)


def engine_memory(results: Path) -> Table:
    """Device memory of engines in full, from the record of the builds."""
    rows = tuple(
        (
            NETWORKS[run["variant"]],
            run["plan"],
            f"`{bucket}`",
            *(gigabytes(memory[f"{part}_bytes"]) for part in _PARTS),
            f"**{gigabytes(run['result']['peak_device_bytes'][bucket])} GB**",
        )
        for run in _read(results / "engines-rtx.json")["runs"]
        for bucket, memory in run["result"]["buckets"].items()
    )
    header = ("network", "plan", "bucket", "weights", "buffers", "largest scratch")
    return Table("", (*header, "arena of both", "**peak**"), rows)


_PARTS = ("weights", "buffers", "scratch", "arena")


def engine_peaks(results: Path) -> Table:
    """Device memory of a decode with the v1 network's engines, in buckets 2k and 4k."""
    rows = tuple(
        (run["plan"], f"`{bucket}`", f"{gigabytes(run['result']['peak_device_bytes'][bucket])} GB")
        for run in _read(results / "engines-rtx.json")["runs"]
        if NETWORKS[run["variant"]] == "v1"
        for bucket in ("2k", "4k")
    )
    return Table("", ("plan", "bucket", "device memory"), rows)


def decode_cpu(results: Path) -> Table:
    """PiD decodes of a report made on the CPU."""
    return _decodes(read_report(results / "cpu"), lambda row: row.case.pipeline == "pid")


def cascades_cpu(results: Path) -> Table:
    """Cascades, and PiD as a whole, of a report made on the CPU."""
    return _decodes(
        read_report(results / "cpu"), lambda row: row.case.pipeline != "pid" or not row.reduced
    )


def decode_cuda(results: Path) -> Table:
    """All decodes of a report made on a GPU."""
    return _decodes(read_report(results / "cuda"), lambda row: True)


def full_size_cpu(results: Path) -> Table:
    """Time and memory of the commands on a full-size network."""
    rows = tuple(
        (
            f"`{run['command']}`",
            f"{run.get('wall_seconds') or run['result']['seconds']:.0f} s",
            f"{(run.get('peak_rss_bytes') or run['result']['peak_rss_bytes']) / 1e9:.1f} GB",
            _outcome(run["result"]),
        )
        for run in _read(results / "full-size-cpu.json")["runs"]
    )
    return Table("", ("command", "time", "peak memory", "result"), rows)


def _outcome(result: Mapping[str, Any]) -> str:
    if "arena_bytes" in result:
        arenas = ", ".join(
            f"`{bucket}` {gigabytes(size)}" for bucket, size in result["arena_bytes"].items()
        )
        return f"{gigabytes(result['bytes'])} GB on disk; arena, GB: {arenas}"
    if "comparisons" in result:
        passed = sum(each["passed"] for each in result["comparisons"])
        return f"{passed} of {len(result['comparisons'])} outputs pass"
    (image,) = result["images"]
    return f"{image['width']}x{image['height']}; of the time, decoding {image['seconds']:.0f} s"


def nano_quality(results: Path) -> Table:
    """Every photograph the nano decoder was held from: PSNR and SSIM, by noise level."""
    rows = _read(results / "nano.json")["rows"]
    found = {(row["photo"], row["sigma"], row["decoder"]): row for row in rows}
    cases = dict.fromkeys((row["photo"], row["sigma"]) for row in rows)
    decoders = tuple(dict.fromkeys(row["decoder"] for row in rows))
    best = decoders[-1]

    def quality(photo: str, sigma: float, decoder: str) -> str:
        row = found[photo, sigma, decoder]
        return f"{row['psnr_db']:.2f} / {row['ssim']:.3f}"

    lines = tuple(
        (
            photo,
            f"{sigma:g}",
            *(quality(photo, sigma, each) for each in decoders),
            f"{_gain(found, (photo, sigma), best, 'psnr_db'):+.2f} dB",
            f"{_gain(found, (photo, sigma), best, 'ssim'):+.3f}",
        )
        for photo, sigma in cases
    )
    return Table("", ("photograph", "sigma", *decoders, "gain, PSNR", "gain, SSIM"), lines)


def _gain(found: Mapping[Any, Any], case: tuple[Any, Any], decoder: str, what: str) -> float:
    return found[(*case, decoder)][what] - found[(*case, "bicubic")][what]


FIGURES: Mapping[str, Callable[[Path], Table]] = {
    "engine-memory": engine_memory,
    "engine-peaks": engine_peaks,
    "decode-cpu": decode_cpu,
    "cascades-cpu": cascades_cpu,
    "decode-cuda": decode_cuda,
    "full-size-cpu": full_size_cpu,
    "nano-quality": nano_quality,
}
"""What a marker may name."""


def _decodes(report: Report, wanted: Callable[[Row], bool]) -> Table:
    return Table(
        "",
        ("decode", "px", "precision", "median ms", "min ms", "TFLOP", "peak memory", "to PiD"),
        tuple(_decode(report, row) for row in report.measured() if wanted(row)),
        frozenset((3, 4, 5, 7)),
    )


def _decode(report: Report, row: Row) -> tuple[str, ...]:
    measured, tflop, ratio = row.measured, row.counted.tflop, report.rates(row).ratio_to_pid
    return (
        network(row),
        pixels(row.case.size),
        row.case.precision,
        milliseconds(measured.median_ms) if row.status == "ok" else row.status,
        milliseconds(measured.min_ms),
        (f"{tflop:.3g}" if tflop < 1000 else f"{tflop:.0f}") if tflop else "",
        f"{gigabytes(measured.peak_bytes)} GB" if measured.peak_bytes else "",
        f"{ratio:.2f}x" if ratio else "",
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchInputError(f"expected measurements, but cannot read {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
