"""A report: what was measured, counted or published, as `report.json`.

docs/benchmarks.md describes the file. It is written whole after every case, so that a run which is
interrupted leaves a report that can be read and added to.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pid_bench.errors import BenchInputError
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-bench-report"
FORMAT_VERSION = 1
"""A reader takes this version only."""

REPORT_FILE = "report.json"

KINDS = ("measured", "counted", "reported")
STATUSES = ("ok", "oom", "error")


@dataclass(frozen=True)
class Environment:
    """What a case ran on."""

    hardware: str
    """Name of the GPU, or of the processor and the cores used."""
    system: str
    """Operating system and Python."""
    driver: str
    """Of the GPU; empty on the CPU."""
    versions: dict[str, str]
    """Versions of what was used, by distribution."""
    commit: str
    """Of pid-trt, with "+" when files were changed since; empty outside of a checkout."""
    matmul_tflop_per_s: dict[str, float] = field(default_factory=dict)
    """The fastest large matrix product measured here, by precision."""
    copy_gb_per_s: float = 0.0
    """The fastest large copy measured here, bytes read and written; 0 when not measured."""


@dataclass(frozen=True)
class StageRow:
    """One stage of a case."""

    name: str
    steps: int
    """Sampler steps that call it."""
    cfg: int
    """Calls in each step: 2 under classifier-free guidance."""
    tiles: int
    """Calls for the tiles of an image."""
    parameters: int | None = None
    tflop: float | None = None
    """Of all its calls in a decode."""
    median_ms: float | None = None
    """All its calls in a decode; so are the percentiles."""
    p10_ms: float | None = None
    p90_ms: float | None = None


@dataclass(frozen=True)
class Row:
    """One case: a pipeline at one size, and what came of it."""

    key: str
    """What tells cases apart, whatever they ran on."""
    pipeline: str
    """"pid", a cascade such as "vae+rrdbnet", or a published pipeline."""
    backend: str
    """A name of `pid_bench.cases.BACKENDS`; empty for what was published."""
    kind: str
    """One of `KINDS`."""
    status: str = "ok"
    """One of `STATUSES`; "oom" when memory did not suffice."""
    message: str = ""
    """Why it failed, in one line; for what was published, where."""
    environment: str = ""
    """Its name in the report's `environments`; empty when nothing ran."""
    date: str = ""
    """UTC, as 2026-11-21T12:00:00Z."""
    space: str = ""
    variant: str = ""
    device: str = ""
    """"cpu" or "cuda"."""
    threads: int | None = None
    """CPU threads; None on CUDA."""
    input_size: tuple[int, ...] = ()
    """Width and height in pixels of the image that the latent stands for."""
    output_size: tuple[int, ...] = ()
    """Width and height in pixels."""
    precision: str = ""
    """fp32, fp16 or bf16."""
    dtype: str = ""
    """Of weights and activations, in words."""
    compile: str = ""
    """eager, inductor, graphs (ONNX Runtime) or engines (TensorRT)."""
    attention: str = ""
    """What computes attention."""
    weights: str = "random"
    """random or real."""
    reduced: str = ""
    """How the network was made smaller than the real one; empty when it was not."""
    steps: int | None = None
    """Sampler steps; these three are None where they were not published."""
    cfg: int | None = None
    tiles: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    tflop: float | None = None
    """Of a decode, counted from the graphs."""
    bytes_moved: int | None = None
    """What the counted operations read and write in a decode."""
    timer: str = ""
    """wall, or events (CUDA events on the stream that does the work)."""
    rounds_ms: tuple[float, ...] = ()
    """Every timed decode, in the order they ran."""
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    min_ms: float | None = None
    user_ms: float | None = None
    """Processor time of a decode, user and system, of all threads; the median."""
    build_seconds: float | None = None
    """Making the bundle or engines; None when there was nothing to make or it was there."""
    load_seconds: float | None = None
    """From the start of the process to the first decode."""
    first_seconds: float | None = None
    """The first decode, with what is compiled in it."""
    peak_rss_bytes: int | None = None
    """Of a process that runs this case alone, after the first decode; CPU only."""
    peak_allocated_bytes: int | None = None
    """By torch's allocator, after the warm-up; CUDA only."""
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    """What the driver says is in use more than before the case, weights included; CUDA only."""
    engine_memory: dict[str, int] = field(default_factory=dict)
    """Weights, buffers, scratch, arena and peak in bytes, from the record of the build."""
    bucket: str = ""
    """The bucket that `engine_memory` is for."""
    tflop_per_s: float | None = None
    """tflop over the median."""
    share_of_matmul: float | None = None
    """Of the device's measured ceiling for matrix products in this precision."""
    share_of_copy: float | None = None
    """Of its measured ceiling for copies, by `bytes_moved`."""
    ratio_to_pid: float | None = None
    """Median over that of the fastest PiD of the same report that is comparable."""
    rms_error: float | None = None
    """Root mean square difference to the image of the first PiD of the same network, weights, size
    and precision; pixels are in [-1, 1]. None for that one."""
    max_abs_error: float | None = None
    """The largest difference to it."""
    agrees: bool | None = None
    """Whether `rms_error` is within the tolerance of the precision."""
    stages: tuple[StageRow, ...] = ()


@dataclass(frozen=True)
class Report:
    """All rows, in the order they were added."""

    environments: dict[str, Environment] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def find(self, key: str, hardware: str) -> Row | None:
        """The row of a case on that hardware."""
        for row in self.rows:
            if row.key == key and self.hardware(row) == hardware:
                return row
        return None

    def hardware(self, row: Row) -> str:
        """What a row ran on; empty when it was not run."""
        found = self.environments.get(row.environment)
        return found.hardware if found else ""

    def with_row(self, row: Row) -> "Report":
        """The report with a row added, in place of the one of the same case and hardware."""
        same = [self._is_same(each, row) for each in self.rows]
        if True in same:
            rows = tuple(row if hit else old for hit, old in zip(same, self.rows, strict=True))
        else:
            rows = (*self.rows, row)
        return replace(self, rows=rows)

    def with_environment(self, environment: Environment) -> tuple["Report", str]:
        """The report with an environment, and its name there; ceilings keep the highest value."""
        identity = replace(environment, matmul_tflop_per_s={}, copy_gb_per_s=0.0)
        for name, known in self.environments.items():
            if replace(known, matmul_tflop_per_s={}, copy_gb_per_s=0.0) == identity:
                merged = _highest_ceilings(known, environment)
                return replace(self, environments={**self.environments, name: merged}), name
        taken = range(len(self.environments) + 1)
        name = next(f"e{i}" for i in taken if f"e{i}" not in self.environments)
        return replace(self, environments={**self.environments, name: environment}), name

    def merged(self, other: "Report") -> "Report":
        """The report with all of another's rows, which win."""
        report, names = self, {"": ""}
        for name, environment in other.environments.items():
            report, names[name] = report.with_environment(environment)
        for row in other.rows:
            report = report.with_row(replace(row, environment=names[row.environment]))
        return derived(report)

    def _is_same(self, known: Row, row: Row) -> bool:
        return known.key == row.key and self.hardware(known) == self.hardware(row)

    def to_json(self) -> str:
        """The content of `report.json`."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps({**head, **asdict(self)}, indent=1, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read `report.json`, or the one in a folder.

    Raises `BenchInputError` for anything that is no report of this version.
    """
    if path.is_dir():
        path /= REPORT_FILE
    try:
        raw: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchInputError(
            f"expected a report of pid-bench, but cannot read {path}: {error}"
        ) from None
    fix = "choose another folder with -o, or measure again with this version"
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise BenchInputError(f"expected {FORMAT} in {path}, but got {str(found)[:60]!r}; {fix}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise BenchInputError(
            f"expected {path} in format version {FORMAT_VERSION}, but got "
            f"{str(raw.get('format_version'))[:20]}; {fix}"
        )
    try:
        report: Report = read_member(Report, raw, path.name)
    except PidRuntimeError as error:
        raise BenchInputError(f"{path}: {error}; {fix}") from None
    _check(path, report)
    return report


def write_report(path: Path, report: Report) -> None:
    """Replace `report.json` at once. Raises `BenchInputError` where nothing can be written."""
    write_file(path, report.to_json())


def write_file(path: Path, text: str) -> None:
    """Replace a file at once. Raises `BenchInputError` where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise BenchInputError(
            f"expected to write {path}, but got: {error.strerror}; choose another place with -o"
        ) from None


def derived(report: Report) -> Report:
    """The report with everything computed again that follows from other values."""
    return replace(report, rows=tuple(_derived_row(report, row) for row in report.rows))


def statistics_of(samples_ms: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and minimum, as fields of a row."""
    ordered = sorted(samples_ms)
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": _percentile(ordered, 0.1),
        "p90_ms": _percentile(ordered, 0.9),
        "min_ms": ordered[0],
    }


def comparable(rows: Iterable[Row], row: Row) -> list[Row]:
    """The PiD decodes that a row's time may be set against.

    They are of the same kind, device, precision and sizes, and for a cascade of the whole network:
    part of one tells nothing about another pipeline.
    """
    found: list[Row] = []
    for pid in rows:
        same = all(
            getattr(pid, name) == getattr(row, name)
            for name in (
                *("kind", "environment", "device", "precision"),
                *("input_size", "output_size"),
            )
        )
        network = (pid.reduced, pid.steps) == (row.reduced, row.steps)
        if row.pipeline == "pid":
            same = same and network and (pid.space, pid.variant) == (row.space, row.variant)
        elif row.kind != "reported":
            same = same and not (pid.reduced or row.reduced) and pid.space == row.space
        if same and pid.pipeline == "pid" and pid.status == "ok" and pid.median_ms:
            found.append(pid)
    return found


def _derived_row(report: Report, row: Row) -> Row:
    rate = share = copy = ratio = None
    if row.median_ms:
        environment = report.environments.get(row.environment)
        if row.tflop:
            rate = row.tflop / (row.median_ms / 1000)
        if environment is not None:
            ceiling = environment.matmul_tflop_per_s.get(row.precision)
            if rate and ceiling:
                share = rate / ceiling
            if row.bytes_moved and environment.copy_gb_per_s:
                copy = row.bytes_moved / 1e6 / row.median_ms / environment.copy_gb_per_s
        pids = [pid.median_ms for pid in comparable(report.rows, row) if pid.median_ms]
        if pids:
            ratio = row.median_ms / min(pids)
    return replace(
        row, tflop_per_s=rate, share_of_matmul=share, share_of_copy=copy, ratio_to_pid=ratio
    )


def _highest_ceilings(known: Environment, other: Environment) -> Environment:
    products = dict(known.matmul_tflop_per_s)
    for precision, value in other.matmul_tflop_per_s.items():
        products[precision] = max(value, products.get(precision, 0.0))
    copies = max(known.copy_gb_per_s, other.copy_gb_per_s)
    return replace(known, matmul_tflop_per_s=products, copy_gb_per_s=copies)


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Linear between the nearest two of ascending values."""
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _check(path: Path, report: Report) -> None:
    for row in report.rows:
        wrong = None
        if row.kind not in KINDS:
            wrong = f"kind {' or '.join(KINDS)}", row.kind
        elif row.status not in STATUSES:
            wrong = f"status {' or '.join(STATUSES)}", row.status
        elif row.environment and row.environment not in report.environments:
            wrong = "an environment of the report", row.environment
        elif row.kind == "measured" and row.status == "ok" and not row.rounds_ms:
            wrong = "times of a measured row", "none"
        if wrong is not None:
            raise BenchInputError(
                f"expected {wrong[0]} in row {row.key[:80]!r} of {path}, but got {wrong[1][:60]!r};"
                " measure again with this version"
            )
