"""A report to be read: report.md and report.html, which needs no other file."""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from pid_bench.charts import OTHER, Bar, log_lines, stacked_bars
from pid_bench.report import REPORT_FILE, Report, Row, write_file, write_report
from pid_bench.summary import summary
from pid_bench.tables import Table, milliseconds, network, pixels, tables, to_markdown

PAGE_FILE = "report.html"

_ABOUT = (
    "Every decode starts from the same latent and ends in pixels; encoding the caption is not part "
    "of it. TFLOP are counted from the graphs, never estimated from time. What is marked as "
    "published was measured by others on other hardware."
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { border-bottom: 1px solid #ddd; padding: .2em .7em; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right }
.scroll { overflow-x: auto }
svg { width: 100%; max-width: 60em; color: #222 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b } svg { color: #ddd }
  td, th { border-color: #444 } }
"""


def write_all(folder: Path, report: Report) -> None:
    """Write report.json, report.md and report.html; the first is what the others are made from."""
    write_report(folder / REPORT_FILE, report)
    write_file(folder / "report.md", to_markdown_page(report))
    write_file(folder / PAGE_FILE, to_html_page(report))


def to_markdown_page(report: Report) -> str:
    """The tables as one page."""
    parts = ["# pid-bench", *summary(report), _ABOUT]
    for table in tables(report):
        parts += [f"## {table.title}", to_markdown(table)]
    return "\n\n".join(parts) + "\n"


def to_html_page(report: Report) -> str:
    """Charts, then the tables, as one page."""
    parts = [f"<h2>{escape(title)}</h2>\n{chart}" for title, chart in charts(report)]
    parts += [
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll">{_html_table(table)}</div>'
        for table in tables(report)
    ]
    head = "\n".join(f"<p>{escape(text)}</p>" for text in (*summary(report), _ABOUT))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>pid-bench</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>pid-bench</h1>\n{head}\n{body}\n</body>\n</html>\n"
    )


def charts(report: Report) -> list[tuple[str, str]]:
    """Titles and SVG: latency by stage, memory by bucket, and cost against resolution."""
    groups: dict[str, list[Row]] = {}
    done = [row for row in report.measured() if row.status == "ok"]
    for row in done:
        case = row.case
        name = f"{pixels(case.size)}, {case.precision}, {case.device} ({row.environment})"
        groups.setdefault(name, []).append(row)
    found: list[tuple[str, str]] = []
    for name, rows in groups.items():
        bars = stacked_bars([_latency(row) for row in rows], "median, ms", _ms)
        found.append((f"Latency by stage: {name}", bars))
        bars = stacked_bars([_peak(row) for row in rows], "peak, GB", _gb)
        found.append((f"Memory: {name}", bars))
    engines = dict(_engine(row) for row in report.rows if row.counted.engine_memory)
    if engines:
        bars = stacked_bars(list(engines.items()), "device memory, GB", _gb)
        found.append(("Device memory of engines by bucket", bars))
    counted = [row for row in report.rows if row.kind == "counted"]
    if work := _against_resolution(counted, lambda row: row.counted.tflop):
        chart = log_lines(work, "output, megapixels", "work of a decode, TFLOP")
        found.append(("Cost against resolution: work, counted", chart))
    times = _against_resolution(done, lambda row: row.measured.median_ms)
    if any(len(points) > 1 for points in times.values()):
        chart = log_lines(times, "output, megapixels", "median, ms")
        found.append(("Cost against resolution: time, measured", chart))
    return found


def _ms(value: float) -> str:
    return f"{milliseconds(value)} ms"


def _gb(value: float) -> str:
    return f"{value:.2f} GB"


def _latency(row: Row) -> Bar:
    """A row's stages, and what is outside of them."""
    parts = {stage.name: stage.median_ms for stage in row.stages if stage.median_ms}
    rest = (row.measured.median_ms or 0.0) - sum(parts.values())
    return network(row), {**parts, OTHER: max(0.0, rest)}


def _peak(row: Row) -> Bar:
    """Weights, and the rest of the peak, as far as it was measured."""
    peak = row.measured.peak_bytes
    weights = min(row.counted.weight_bytes or 0, peak)
    return network(row), {"weights": weights / 1e9, "the rest": (peak - weights) / 1e9}


def _engine(row: Row) -> Bar:
    """The arena holds buffers and scratch, which overlap in part."""
    memory = row.counted.engine_memory
    parts = {
        "weights": memory["weights_bytes"] / 1e9,
        "buffers": memory["buffers_bytes"] / 1e9,
        "scratch beside them": (memory["arena_bytes"] - memory["buffers_bytes"]) / 1e9,
    }
    return f"{row.case.backend}, bucket {row.counted.bucket}", parts


def _against_resolution(
    rows: Iterable[Row], value_of: Callable[[Row], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """Points by pipeline; of several with as many pixels the last. Equal lines are one."""
    series: dict[str, dict[float, float]] = {}
    together: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for row in rows:
        if value := value_of(row):
            series.setdefault(network(row), {})[row.case.width * row.case.height / 1e6] = value
    for name, points in series.items():
        together.setdefault(tuple(points.items()), []).append(name)
    return {"; ".join(names): list(points) for points, names in together.items()}


def _html_table(table: Table) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        kinds = (' class="number"' if i in table.numbers else "" for i in range(len(cells)))
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )

    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    return f"<table>\n<tr>{line(table.header, 'th')}</tr>\n{rows}\n</table>"
