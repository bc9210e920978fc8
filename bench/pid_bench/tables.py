"""A report as tables: what the terminal, report.md and report.html show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from pid_bench.report import Rates, Report, Row, StageRow
from pid_runtime.command.console import aligned


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    """Columns of numbers, which belong to the right."""


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

    @property
    def rates(self) -> Rates:
        """What the row's time is, set against the rest of the report."""
        return self.report.rates(self.row)


class Column(NamedTuple):
    """A column of a table."""

    title: str
    """With the unit."""
    value: str | Callable[[Line], Any]
    """Of a line: the path of an attribute, or a function; None is an empty cell."""
    shown: Callable[[Any], str] = str
    """Numbers as text; what is text already stays as it is."""
    of_stages: bool = True
    """Whether a stage has it too, or only the whole decode."""

    def cell(self, line: Line) -> str:
        """What stands in a line."""
        if not (self.of_stages or line.is_whole):
            return ""
        found = attrgetter(self.value)(line) if isinstance(self.value, str) else self.value(line)
        return "" if found is None else self.shown(found)


def tables(report: Report) -> list[Table]:
    """Everything a report says, each part in a table; empty parts are left out."""
    measured = _whole_lines(report, report.measured())
    counted = [row for row in report.rows if row.kind == "counted"]
    reported = [row for row in report.rows if row.kind == "reported"]
    engines = {
        (row.case.backend, row.case.size, row.case.tile): row
        for row in report.rows
        if row.counted.engine_memory
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
    """Columns aligned with spaces, without the title."""
    left = [index for index in range(len(table.header)) if index not in table.numbers]
    return aligned([table.header, *table.rows], left)


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, without the title."""
    marks = ["---:" if index in table.numbers else "---" for index in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def milliseconds(value: float | None) -> str:
    """Three digits, or all before the point: 3.51, 35.1, 351, 3,512."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def gigabytes(value: int) -> str:
    """Decimal gigabytes."""
    return f"{value / 1e9:.2f}"


def pixels(size: Sequence[int]) -> str:
    """Width and height."""
    return "x".join(map(str, size))


def network(row: Row) -> str:
    """Pipeline and backend, and how the network was made smaller."""
    return _of_part(row.case.label, row)


def _of_part(name: str, row: Row) -> str:
    """What a row is called; every table says when it is of a part of the network only."""
    return f"{name} ({row.reduced})" if row.reduced else name


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f}"


def _tera(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}" if value else "0"


_tenths, _percent = "{:.1f}".format, "{:.0%}".format
_AS_IT_IS = "{}".format
"""Of a number that is text already."""


def _spread(line: Line) -> str:
    if line.stage.p10_ms is None or line.stage.p90_ms is None:
        return ""
    return f"{milliseconds(line.stage.p10_ms)}-{milliseconds(line.stage.p90_ms)}"


def _calls(line: Line) -> str:
    stage = line.stage
    return f"{stage.steps}x{stage.cfg}x{stage.tiles}" if stage.steps else ""


def _result(line: Line) -> str:
    """The median, or why there is none."""
    words = {"oom": "out of memory", "error": "error"}
    return words.get(line.row.status) or milliseconds(line.stage.median_ms)


def _per_step(line: Line) -> float | None:
    """Of what every sampler step does; a whole decode has it from its stages."""
    stages = line.row.stages if line.is_whole else (line.stage,)
    return sum(s.tflop / s.steps for s in stages if s.steps > 1 and s.tflop) or None


def _agreement(line: Line) -> str | None:
    error = line.row.measured.rms_error
    if error is None:
        return None
    return f"{error:.1e} DIFFERS" if line.row.agrees is False else f"{error:.1e}"


def _engine_peak(line: Line) -> str:
    memory, bucket = line.row.counted.engine_memory, line.row.counted.bucket
    return f"{gigabytes(memory['peak_bytes'])} GB ({bucket})" if memory else ""


def _px(row: Row) -> str:
    """What is decoded, to what, and in which tiles."""
    whole = f"{pixels(row.input_size)} to {pixels(row.case.size)}"
    return f"{whole} in {pixels(row.case.tile)}" if row.case.tile else whole


_PIPELINE = Column("pipeline", lambda line: _of_part(line.row.case.pipeline, line.row))
_BACKEND = Column("backend", "row.case.backend")
_PX = Column("px", lambda line: _px(line.row))
_PRECISION = Column("precision", "row.case.precision")
_CALLED = Column("steps x CFG x tiles", _calls)
_SPREAD = Column("p10-p90 ms", _spread, _AS_IT_IS)
_TFLOP = Column("TFLOP", "stage.tflop", _tera)
_PARAMETERS = Column("parameters M", "stage.parameters", _millions)
_WEIGHTS = Column("weights MB", "row.counted.weight_bytes", lambda size: f"{size / 1e6:.0f}")
_CASE = (_PIPELINE, _BACKEND, _PX, _PRECISION)
_PART = (
    Column("pipeline", lambda line: network(line.row)),
    _PX,
    Column("stage", "stage.name"),
    _CALLED,
    _PARAMETERS,
    _TFLOP,
)

_DECODES = (
    *_CASE,
    Column("median ms", _result, _AS_IT_IS),
    _SPREAD,
    Column("min ms", "row.measured.min_ms", milliseconds),
    Column("user ms", "row.measured.user_ms", milliseconds),
    _TFLOP,
    Column("TFLOP/s", "rates.tflop_per_s", _tera),
    Column("of matmul", "rates.share_of_matmul", _percent),
    Column("of copy", "rates.share_of_copy", _percent),
    Column("to PiD", "rates.ratio_to_pid", "{:.2f}x".format),
    Column("RMS diff (-1..1)", _agreement, _AS_IT_IS),
)

_MEMORY = (
    *_CASE,
    _PARAMETERS,
    _WEIGHTS,
    Column("peak RSS GB", "row.measured.peak_rss_bytes", gigabytes),
    Column("allocated GB", "row.measured.peak_allocated_bytes", gigabytes),
    Column("reserved GB", "row.measured.peak_reserved_bytes", gigabytes),
    Column("device GB", "row.measured.device_used_bytes", gigabytes),
)

_DETAILS = (
    *_CASE,
    Column("network", lambda line: f"{line.row.case.space} {line.row.case.variant}".strip()),
    Column("weights", "row.case.weights"),
    Column("dtype", "row.case.dtype"),
    Column("compile", "row.case.compile"),
    Column("attention", "row.measured.attention"),
    Column("note", "row.message"),
    _CALLED,
    Column("build s", "row.measured.build_seconds", _tenths),
    Column("load s", "row.measured.load_seconds", _tenths),
    Column("first decode s", "row.measured.first_seconds", _tenths),
    Column("runs", lambda line: len(line.row.measured.rounds_ms), "{:d}".format),
    Column("timer", "row.measured.timer"),
    Column("on", "row.environment"),
)

_STAGES = (*_PART, Column("median ms", "stage.median_ms", milliseconds), _SPREAD)

_COUNTED = (
    *_PART,
    Column("TFLOP/step", _per_step, _tera),
    _WEIGHTS._replace(of_stages=False),
    Column("moved GB", "row.counted.bytes_moved", gigabytes, of_stages=False),
    _PRECISION._replace(of_stages=False),
    Column("engine memory", _engine_peak, of_stages=False),
)

_ENGINES = (
    _BACKEND,
    _PX,
    Column("bucket", "row.counted.bucket"),
    *(
        Column(
            f"{part} GB",
            lambda line, name=f"{part}_bytes": line.row.counted.engine_memory[name],
            gigabytes,
        )
        for part in ("weights", "buffers", "scratch", "arena", "peak")
    ),
)

_REPORTED = (
    _PIPELINE,
    _PX,
    Column("ms", "row.measured.median_ms", _tenths),
    Column("source", "row.message"),
)


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
    return Table("Measured on", (*header, "copy GB/s"), rows, frozenset([7]))


def _table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    """A cell of every column for every line; columns that are empty in all lines are left out."""
    cells = {column: [column.cell(line) for line in lines] for column in columns}
    used = [column for column in columns if any(cells[column])]
    numbers = frozenset(index for index, column in enumerate(used) if column.shown is not str)
    rows = tuple(zip(*(cells[column] for column in used), strict=True))
    return Table(title, tuple(column.title for column in used), rows, numbers)
