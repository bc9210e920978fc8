"""A report as tables: what the terminal, report.md and report.html show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pid_bench.report import Report, Row, StageRow


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, column: int) -> bool:
        """Whether a column belongs to the right."""
        return self.header[column] in _NUMBERS


def tables(report: Report) -> list[Table]:
    """Everything a report says, each part in a table; empty parts are left out."""
    rows = report.rows
    measured = [row for row in rows if row.kind == "measured"]
    counted = [row for row in rows if row.kind == "counted"]
    found = [
        Table("Decodes", *_table(_DECODES, measured)),
        Table("Stages", *_table(_STAGES, _stages(measured))),
        Table("Memory", *_table(_MEMORY, measured)),
        Table("How it ran", *_table(_DETAILS, measured)),
        counted_table(counted, stages=False),
        Table("Engines, by the record of their build", *_table(_ENGINES, _engines(rows))),
        Table(
            "Published by the paper, not measured here",
            *_table(_REPORTED, [row for row in rows if row.kind == "reported"]),
        ),
        _environments(report),
    ]
    return [table for table in found if table.rows]


def counted_table(rows: Sequence[Row], *, stages: bool = True) -> Table:
    """What --dry-run prints: work, parameters and bytes, without times."""
    parts = _stages(rows, whole=True)
    if not stages:
        parts = [part for part in parts if part[1].name == _WHOLE]
    return Table("Counted, not run", *_table(_COUNTED, parts))


def decodes_table(rows: Sequence[Row]) -> Table:
    """The rows that ran, as the terminal shows them while a benchmark runs."""
    return Table("Decodes", *_table(_DECODES, rows))


def to_text(table: Table) -> str:
    """Columns aligned with spaces, under the title."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if table.is_number(index) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, without the title."""
    marks = ["---:" if table.is_number(i) else "---" for i in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def milliseconds(value: float | None) -> str:
    """Three digits, or all before the point: 3.51, 35.1, 351, 3512."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def gigabytes(value: int | None) -> str:
    """Decimal gigabytes."""
    return "" if value is None else f"{value / 1e9:.2f}"


def label(row: Row) -> str:
    """Pipeline and backend."""
    return f"{row.pipeline}, {row.backend}" if row.backend else row.pipeline


def pixels(size: Sequence[int]) -> str:
    """Width and height."""
    return "x".join(map(str, size))


_WHOLE = "whole decode"

_NUMBERS = frozenset(
    (
        *("median ms", "p10-p90", "min", "user ms", "TFLOP", "TFLOP/s", "of matmul", "of copy"),
        *("to PiD", "RMS diff", "params M", "weights MB", "peak RSS GB", "allocated GB"),
        *("reserved GB", "device GB", "build s", "load s", "first decode s", "runs", "ms"),
        *("weights GB", "buffers GB", "scratch GB", "arena GB", "peak GB", "TFLOP/step"),
        *("moved GB", "copy GB/s", "before ms", "after ms", "change", "noise"),
    )
)
"""Headers of columns that hold numbers."""

Column = tuple[str, Callable[[Row], str]]
StagePart = tuple[Row, StageRow]


def _spread(row: Row | StageRow) -> str:
    if row.p10_ms is None or row.p90_ms is None:
        return ""
    return f"{milliseconds(row.p10_ms)}-{milliseconds(row.p90_ms)}"


def _calls(row: Row | StageRow) -> str:
    """Steps x CFG x tiles."""
    return "" if row.steps is None else f"{row.steps}x{row.cfg}x{row.tiles}"


def _tera(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _millions(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _result(row: Row) -> str:
    """The median, or why there is none."""
    if row.status == "oom":
        return "out of memory"
    return "error" if row.status == "error" else milliseconds(row.median_ms)


def _per_step(part: StagePart) -> str:
    """Of what every sampler step does; a whole decode has it from its stages."""
    stages = part[0].stages if part[1].name == _WHOLE else part[1:]
    work = [stage.tflop / stage.steps for stage in stages if stage.steps > 1 and stage.tflop]
    return _tera(sum(work)) if work else ""


def _agreement(row: Row) -> str:
    if row.rms_error is None:
        return ""
    return f"{row.rms_error:.1e}" + ("" if row.agrees else " DIFFERS")


def _network(row: Row) -> str:
    whole = " ".join(part for part in (row.space, row.variant) if part)
    return f"{whole} ({row.reduced})" if row.reduced else whole


def _sizes(row: Row) -> str:
    return f"{pixels(row.input_size)} to {pixels(row.output_size)}"


_CASE: tuple[Column, ...] = (
    ("pipeline", lambda row: row.pipeline),
    ("backend", lambda row: row.backend),
    ("px", _sizes),
    ("precision", lambda row: row.precision),
)

_DECODES: tuple[Column, ...] = (
    *_CASE,
    ("median ms", _result),
    ("p10-p90", _spread),
    ("min", lambda row: milliseconds(row.min_ms)),
    ("user ms", lambda row: milliseconds(row.user_ms)),
    ("TFLOP", lambda row: _tera(row.tflop)),
    ("TFLOP/s", lambda row: _tera(row.tflop_per_s)),
    ("of matmul", lambda row: _share(row.share_of_matmul)),
    ("of copy", lambda row: _share(row.share_of_copy)),
    ("to PiD", lambda row: _ratio(row.ratio_to_pid)),
    ("RMS diff", _agreement),
)

_MEMORY: tuple[Column, ...] = (
    *_CASE,
    ("params M", lambda row: _millions(row.parameters)),
    ("weights MB", lambda row: _megabytes(row.weight_bytes)),
    ("peak RSS GB", lambda row: gigabytes(row.peak_rss_bytes)),
    ("allocated GB", lambda row: gigabytes(row.peak_allocated_bytes)),
    ("reserved GB", lambda row: gigabytes(row.peak_reserved_bytes)),
    ("device GB", lambda row: gigabytes(row.device_used_bytes)),
)

_DETAILS: tuple[Column, ...] = (
    *_CASE,
    ("network", _network),
    ("weights", lambda row: row.weights),
    ("dtype", lambda row: row.dtype),
    ("compile", lambda row: row.compile),
    ("attention", lambda row: row.attention),
    ("note", lambda row: row.message),
    ("steps x CFG x tiles", _calls),
    ("build s", lambda row: _seconds(row.build_seconds)),
    ("load s", lambda row: _seconds(row.load_seconds)),
    ("first decode s", lambda row: _seconds(row.first_seconds)),
    ("runs", lambda row: str(len(row.rounds_ms))),
    ("timer", lambda row: row.timer),
    ("on", lambda row: row.environment),
)

_ENGINES: tuple[Column, ...] = (
    ("backend", lambda row: row.backend),
    ("px", _sizes),
    ("bucket", lambda row: row.bucket),
    *(
        (f"{part} GB", lambda row, name=f"{part}_bytes": gigabytes(row.engine_memory[name]))
        for part in ("weights", "buffers", "scratch", "arena", "peak")
    ),
)

_REPORTED: tuple[Column, ...] = (
    ("pipeline", lambda row: row.pipeline),
    ("px", _sizes),
    ("ms", lambda row: f"{row.median_ms:.1f}"),
    ("to PiD", lambda row: _ratio(row.ratio_to_pid)),
    ("source", lambda row: row.message),
)

_PART: tuple[tuple[str, Callable[[StagePart], str]], ...] = (
    ("pipeline", lambda part: label(part[0])),
    ("px", lambda part: _sizes(part[0])),
    ("stage", lambda part: part[1].name),
    ("steps x CFG x tiles", lambda part: _calls(part[1])),
    ("params M", lambda part: _millions(part[1].parameters)),
    ("TFLOP", lambda part: _tera(part[1].tflop)),
)

_STAGES: tuple[tuple[str, Callable[[StagePart], str]], ...] = (
    *_PART,
    ("median ms", lambda part: milliseconds(part[1].median_ms)),
    ("p10-p90", lambda part: _spread(part[1])),
)

_COUNTED: tuple[tuple[str, Callable[[StagePart], str]], ...] = (
    *_PART,
    ("TFLOP/step", _per_step),
    ("weights MB", lambda part: _whole(part, _megabytes(part[0].weight_bytes))),
    ("moved GB", lambda part: _whole(part, gigabytes(part[0].bytes_moved))),
    ("precision", lambda part: _whole(part, part[0].precision)),
    ("engine memory", lambda part: _whole(part, _engine_peak(part[0]))),
)


def _stages(rows: Iterable[Row], *, whole: bool = False) -> list[StagePart]:
    """Every stage with its row; with `whole`, after a stage that stands for all of them."""
    parts: list[StagePart] = []
    for row in rows:
        if whole:
            stage = StageRow(
                _WHOLE, row.steps or 1, row.cfg or 1, row.tiles or 1, row.parameters, row.tflop
            )
            parts.append((row, stage))
        parts += [(row, stage) for stage in row.stages]
    return parts


def _whole(part: StagePart, text: str) -> str:
    return text if part[1].name == _WHOLE else ""


def _engine_peak(row: Row) -> str:
    if not row.engine_memory:
        return ""
    return f"{gigabytes(row.engine_memory['peak_bytes'])} GB ({row.bucket})"


def _engines(rows: Iterable[Row]) -> list[Row]:
    found = {(row.backend, row.output_size): row for row in rows if row.engine_memory}
    return list(found.values())


def _environments(report: Report) -> Table:
    used = {row.environment for row in report.rows}
    rows = tuple(
        (
            name,
            each.hardware,
            each.driver,
            each.system,
            ", ".join(f"{package} {version}" for package, version in each.versions.items()),
            each.commit,
            ", ".join(f"{p} {value:.2f}" for p, value in each.matmul_tflop_per_s.items()),
            f"{each.copy_gb_per_s:.1f}" if each.copy_gb_per_s else "",
        )
        for name, each in report.environments.items()
        if name in used
    )
    header = ("on", "hardware", "driver", "system", "versions", "commit", "matmul TFLOP/s")
    return Table("Measured on", (*header, "copy GB/s"), rows)


def _table(
    columns: Sequence[tuple[str, Callable[..., str]]], rows: Iterable[object]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and cells; columns that are empty in all rows are left out."""
    cells = [tuple(cell(row) for _, cell in columns) for row in rows]
    used = [index for index in range(len(columns)) if any(line[index] for line in cells)]
    header = tuple(columns[index][0] for index in used)
    return header, tuple(tuple(line[index] for index in used) for line in cells)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
