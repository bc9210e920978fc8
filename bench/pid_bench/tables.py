"""A report as tables: what the terminal, report.md and report.html show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pid_bench.report import Rates, Report, Row, StageRow
from pid_runtime.command.console import aligned


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, column: int) -> bool:
        """Whether a column belongs to the right."""
        return self.header[column] in _NUMBERS


@dataclass(frozen=True)
class Line:
    """What a line of a table is about."""

    report: Report
    row: Row
    stage: StageRow
    """One stage of the row, or all of it."""

    @property
    def is_whole(self) -> bool:
        """Whether it is about all of the row."""
        return self.stage.name == self.row.whole.name


def tables(report: Report) -> list[Table]:
    """Everything a report says, each part in a table; empty parts are left out."""
    measured = _whole_lines(report, report.measured())
    counted = [row for row in report.rows if row.kind == "counted"]
    reported = [row for row in report.rows if row.kind == "reported"]
    engines = {
        (row.case.backend, row.case.size): row for row in report.rows if row.counted.engine_memory
    }
    found = [
        _table("Decodes", _DECODES, measured),
        _table("Stages", _STAGES, _stage_lines(report, report.measured())),
        _table("Memory", _MEMORY, measured),
        _table("How it ran", _DETAILS, measured),
        _table("Counted, not run", _COUNTED, _whole_lines(report, counted)),
        _table(
            "Engines, by the record of their build",
            _ENGINES,
            _whole_lines(report, engines.values()),
        ),
        _table(
            "Published by the paper, not measured here", _REPORTED, _whole_lines(report, reported)
        ),
        _environments(report),
    ]
    return [table for table in found if table.rows]


def counted_table(rows: Sequence[Row]) -> Table:
    """What --dry-run prints: work, parameters and bytes of decodes and stages, without times."""
    lines = [
        line
        for row in rows
        for line in (*_whole_lines(Report(), [row]), *_stage_lines(Report(), [row]))
    ]
    return _table("Counted, not run", _COUNTED, lines)


def decodes_table(report: Report, rows: Iterable[Row]) -> Table:
    """Rows of a report that ran, as the terminal shows them while a benchmark runs."""
    return _table("Decodes", _DECODES, _whole_lines(report, rows))


def to_text(table: Table) -> str:
    """Columns aligned with spaces, under the title."""
    left = [index for index in range(len(table.header)) if not table.is_number(index)]
    return aligned([table.header, *table.rows], left)


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, without the title."""
    marks = ["---:" if table.is_number(i) else "---" for i in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def milliseconds(value: float | None) -> str:
    """Three digits, or all before the point: 3.51, 35.1, 351, 3,512."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def gigabytes(value: int | None) -> str:
    """Decimal gigabytes."""
    return "" if value is None else f"{value / 1e9:.2f}"


def pixels(size: Sequence[int]) -> str:
    """Width and height."""
    return "x".join(map(str, size))


def network(row: Row) -> str:
    """Pipeline and backend, and how the network was made smaller."""
    return _of_part(row.case.label, row)


_NUMBERS = frozenset(
    (
        *("median ms", "p10-p90 ms", "min ms", "user ms", "TFLOP", "TFLOP/s", "of matmul"),
        *("of copy", "to PiD", "RMS diff (-1..1)", "parameters M", "weights MB"),
        *(
            "peak RSS GB",
            "allocated GB",
            "reserved GB",
            "device GB",
            "build s",
            "load s",
            "first decode s",
            "runs",
            "ms",
        ),
        *("weights GB", "buffers GB", "scratch GB", "arena GB", "peak GB", "TFLOP/step"),
        *("moved GB", "copy GB/s", "before ms", "after ms", "change", "noise"),
    )
)
"""Headers of columns that hold numbers."""

Column = tuple[str, Callable[[Line], str]]


def _of_part(name: str, row: Row) -> str:
    """What a row is called; every table says when it is of a part of the network only."""
    return f"{name} ({row.reduced})" if row.reduced else name


def _spread(line: Line) -> str:
    if line.stage.p10_ms is None or line.stage.p90_ms is None:
        return ""
    return f"{milliseconds(line.stage.p10_ms)}-{milliseconds(line.stage.p90_ms)}"


def _calls(line: Line) -> str:
    """Steps x CFG x tiles."""
    stage = line.stage
    return f"{stage.steps}x{stage.cfg}x{stage.tiles}" if stage.steps else ""


def _tera(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _formatted(form: str, value: float | None, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _result(line: Line) -> str:
    """The median, or why there is none."""
    words = {"oom": "out of memory", "error": "error"}
    return words.get(line.row.status) or milliseconds(line.stage.median_ms)


def _per_step(line: Line) -> str:
    """Of what every sampler step does; a whole decode has it from its stages."""
    stages = line.row.stages if line.is_whole else (line.stage,)
    work = [stage.tflop / stage.steps for stage in stages if stage.steps > 1 and stage.tflop]
    return _tera(sum(work)) if work else ""


def _agreement(line: Line) -> str:
    error = _formatted("{:.1e}", line.row.measured.rms_error)
    return f"{error} DIFFERS" if line.row.agrees is False else error


def _sizes(line: Line) -> str:
    return f"{pixels(line.row.input_size)} to {pixels(line.row.case.size)}"


def _engine_peak(line: Line) -> str:
    counted = line.row.counted
    if not counted.engine_memory:
        return ""
    return f"{gigabytes(counted.engine_memory['peak_bytes'])} GB ({counted.bucket})"


def _of_whole(cell: Callable[[Line], str]) -> Callable[[Line], str]:
    """A cell that stages leave empty."""
    return lambda line: cell(line) if line.is_whole else ""


_PIPELINE: Column = ("pipeline", lambda line: _of_part(line.row.case.pipeline, line.row))
_BACKEND: Column = ("backend", lambda line: line.row.case.backend)
_PX: Column = ("px", _sizes)
_PRECISION: Column = ("precision", lambda line: line.row.case.precision)
_CALLED: Column = ("steps x CFG x tiles", _calls)
_SPREAD: Column = ("p10-p90 ms", _spread)
_TFLOP: Column = ("TFLOP", lambda line: _tera(line.stage.tflop))
_PARAMETERS: Column = (
    "parameters M",
    lambda line: _formatted("{:.1f}", line.stage.parameters, 1e6),
)
_WEIGHTS: Column = (
    "weights MB",
    lambda line: _formatted("{:.0f}", line.row.counted.weight_bytes, 1e6),
)
_CASE = (_PIPELINE, _BACKEND, _PX, _PRECISION)
_PART = (
    ("pipeline", lambda line: network(line.row)),
    _PX,
    ("stage", lambda line: line.stage.name),
    _CALLED,
    _PARAMETERS,
    _TFLOP,
)

_DECODES: tuple[Column, ...] = (
    *_CASE,
    ("median ms", _result),
    _SPREAD,
    ("min ms", lambda line: milliseconds(line.row.measured.min_ms)),
    ("user ms", lambda line: milliseconds(line.row.measured.user_ms)),
    _TFLOP,
    ("TFLOP/s", lambda line: _tera(_rates(line).tflop_per_s)),
    *(
        (title, lambda line, n=name: _formatted("{:.0f} %", getattr(_rates(line), n), 0.01))
        for title, name in (("of matmul", "share_of_matmul"), ("of copy", "share_of_copy"))
    ),
    ("to PiD", lambda line: _formatted("{:.2f}x", _rates(line).ratio_to_pid)),
    ("RMS diff (-1..1)", _agreement),
)

_MEMORY: tuple[Column, ...] = (
    *_CASE,
    _PARAMETERS,
    _WEIGHTS,
    ("peak RSS GB", lambda line: gigabytes(line.row.measured.peak_rss_bytes)),
    ("allocated GB", lambda line: gigabytes(line.row.measured.peak_allocated_bytes)),
    ("reserved GB", lambda line: gigabytes(line.row.measured.peak_reserved_bytes)),
    ("device GB", lambda line: gigabytes(line.row.measured.device_used_bytes)),
)

_DETAILS: tuple[Column, ...] = (
    *_CASE,
    ("network", lambda line: f"{line.row.case.space} {line.row.case.variant}".strip()),
    ("weights", lambda line: line.row.case.weights),
    ("dtype", lambda line: line.row.case.dtype),
    ("compile", lambda line: line.row.case.compile),
    ("attention", lambda line: line.row.measured.attention),
    ("note", lambda line: line.row.message),
    _CALLED,
    ("build s", lambda line: _formatted("{:.1f}", line.row.measured.build_seconds)),
    ("load s", lambda line: _formatted("{:.1f}", line.row.measured.load_seconds)),
    ("first decode s", lambda line: _formatted("{:.1f}", line.row.measured.first_seconds)),
    ("runs", lambda line: str(len(line.row.measured.rounds_ms))),
    ("timer", lambda line: line.row.measured.timer),
    ("on", lambda line: line.row.environment),
)

_STAGES: tuple[Column, ...] = (
    *_PART,
    ("median ms", lambda line: milliseconds(line.stage.median_ms)),
    _SPREAD,
)

_COUNTED: tuple[Column, ...] = (
    *_PART,
    ("TFLOP/step", _per_step),
    *(
        (title, _of_whole(cell))
        for title, cell in (
            _WEIGHTS,
            ("moved GB", lambda line: gigabytes(line.row.counted.bytes_moved)),
            _PRECISION,
            ("engine memory", _engine_peak),
        )
    ),
)

_ENGINES: tuple[Column, ...] = (
    _BACKEND,
    _PX,
    ("bucket", lambda line: line.row.counted.bucket),
    *(
        (f"{part} GB", lambda line, n=f"{part}_bytes": gigabytes(line.row.counted.engine_memory[n]))
        for part in ("weights", "buffers", "scratch", "arena", "peak")
    ),
)

_REPORTED: tuple[Column, ...] = (
    _PIPELINE,
    _PX,
    ("ms", lambda line: f"{line.row.measured.median_ms:.1f}"),
    ("source", lambda line: line.row.message),
)


def _rates(line: Line) -> Rates:
    return line.report.rates(line.row)


def _whole_lines(report: Report, rows: Iterable[Row]) -> list[Line]:
    return [Line(report, row, row.whole) for row in rows]


def _stage_lines(report: Report, rows: Iterable[Row]) -> list[Line]:
    return [Line(report, row, stage) for row in rows for stage in row.stages]


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


def _table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    """A cell of every column for every line; columns that are empty in all lines are left out."""
    cells = [[cell(line) for line in lines] for _, cell in columns]
    used = [index for index, column in enumerate(cells) if any(column)]
    header = tuple(columns[index][0] for index in used)
    return Table(title, header, tuple(zip(*(cells[index] for index in used), strict=True)))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
