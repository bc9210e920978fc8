"""A report: what was measured, counted or published, as `report.json`.

docs/benchmarks.md describes the file. It is written whole after every case, so that a run which is
interrupted leaves a report that can be read and added to. What follows from other values is
computed when it is shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pid_bench.cases import BACKENDS, PID, Case
from pid_bench.errors import BenchInputError
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-bench-report"
FORMAT_VERSION = 2
"""A reader takes this version only."""

REPORT_FILE = "report.json"

KINDS = ("measured", "counted", "reported")
STATUSES = ("ok", "oom", "error")

TOLERANCE = {
    "fp32": 1e-4,
    "fp16": 0.02,
    "bf16": 0.1,
    "int8": 0.1,
    "int8-fp32": 0.1,
    "fp8": 0.3,
    "fp8-fp32": 0.3,
}
"""Largest root mean square difference of two images of the same network, pixels in [-1, 1].

Both have rounded in their own ways; what is miscompiled is off by about 1.
"""

TF32_TOLERANCE = 5e-3
"""That of fp32 on CUDA, where libraries multiply in TF32 unless they are told not to."""


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
    """One stage of a case, or all of it."""

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
class Counted:
    """What follows from a case's graphs, and from the record of a build; None if not counted."""

    parameters: int | None = None
    weight_bytes: int | None = None
    tflop: float | None = None
    """Of a decode."""
    bytes_moved: int | None = None
    """What the counted operations read and write in a decode."""
    engine_memory: dict[str, int] = field(default_factory=dict)
    """Weights, buffers, scratch, arena and peak in bytes, from the record of the build."""
    bucket: str = ""
    """The bucket that `engine_memory` is for."""


@dataclass(frozen=True)
class Measured:
    """What came of running a case; None or empty where it was not, or does not apply."""

    rounds_ms: tuple[float, ...] = ()
    """Every timed decode, in the order they ran; of what was published the one time."""
    timer: str = ""
    """wall, or events (CUDA events on the stream that does the work)."""
    attention: str = ""
    """What computes attention."""
    user_ms: float | None = None
    """Processor time of a decode, user and system, of all threads; the median. CPU only."""
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
    rms_error: float | None = None
    """Root mean square difference to the image of the first PiD of the same network, weights, size
    and precision; pixels are in [-1, 1]. None for that one."""
    max_abs_error: float | None = None
    """The largest difference to it."""

    @property
    def median_ms(self) -> float | None:
        """Of the rounds."""
        return percentiles(self.rounds_ms).get("median_ms")

    @property
    def min_ms(self) -> float | None:
        """The fastest round."""
        return min(self.rounds_ms, default=None)

    @property
    def peak_bytes(self) -> int:
        """Of the memory that counts: the host's on the CPU, the device's on CUDA."""
        if self.peak_rss_bytes is not None:
            return self.peak_rss_bytes
        return max(self.peak_reserved_bytes or 0, self.device_used_bytes or 0)


@dataclass(frozen=True)
class Row:
    """A case, and what is known of it."""

    kind: str
    """One of `KINDS`."""
    case: Case
    input_size: tuple[int, ...]
    """Width and height in pixels of the image that the latent stands for."""
    reduced: str = ""
    """How the network was made smaller than the real one; empty when it was not."""
    status: str = "ok"
    """One of `STATUSES`; "oom" when memory did not suffice."""
    message: str = ""
    """Why it failed, in one line; for what was published, where."""
    environment: str = ""
    """Its name in the report's `environments`; empty when nothing ran."""
    date: str = ""
    """UTC, as 2026-11-21T12:00:00Z."""
    counted: Counted = field(default_factory=Counted)
    measured: Measured = field(default_factory=Measured)
    stages: tuple[StageRow, ...] = ()

    @property
    def whole(self) -> StageRow:
        """All stages as one; its steps, CFG and tiles are those of the main network."""
        return StageRow(
            name="whole decode",
            steps=max((stage.steps for stage in self.stages), default=0),
            cfg=max((stage.cfg for stage in self.stages), default=0),
            tiles=max((stage.tiles for stage in self.stages), default=0),
            parameters=self.counted.parameters,
            tflop=self.counted.tflop,
            **percentiles(self.measured.rounds_ms),
        )

    @property
    def noise(self) -> float:
        """Half of the spread of its times, p10 to p90, relative to their median; 0 without any."""
        whole = self.whole
        if not whole.median_ms or whole.p10_ms is None or whole.p90_ms is None:
            return 0.0
        return (whole.p90_ms - whole.p10_ms) / 2 / whole.median_ms

    @property
    def agrees(self) -> bool | None:
        """Whether the image is within the tolerance of the precision; None if not compared."""
        if self.measured.rms_error is None:
            return None
        tf32 = self.case.device == "cuda" and self.case.precision == "fp32"
        most = TF32_TOLERANCE if tf32 else TOLERANCE[self.case.precision]
        return self.measured.rms_error <= most


@dataclass(frozen=True)
class Rates:
    """What a row's time is, set against other figures of its report; None where they lack."""

    tflop_per_s: float | None = None
    share_of_matmul: float | None = None
    """Of the device's measured ceiling for matrix products in this precision."""
    share_of_copy: float | None = None
    """Of its measured ceiling for copies, by `bytes_moved`."""
    ratio_to_pid: float | None = None
    """Median over that of the fastest PiD of the same report that is comparable."""


@dataclass(frozen=True)
class Report:
    """All rows, in the order they were added."""

    environments: dict[str, Environment] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def measured(self) -> list[Row]:
        """Rows of cases that ran, or failed."""
        return [row for row in self.rows if row.kind == "measured"]

    def find(self, case: Case, hardware: str) -> Row | None:
        """The row of a case that ran on that hardware."""
        for row in self.measured():
            if row.case == case and self.hardware(row) == hardware:
                return row
        return None

    def hardware(self, row: Row) -> str:
        """What a row ran on; empty when it was not run."""
        found = self.environments.get(row.environment)
        return found.hardware if found else ""

    def rates(self, row: Row) -> Rates:
        """What a row's time is, set against the rest of the report."""
        time, work = row.measured.median_ms, row.counted
        if not time:
            return Rates()
        rate = work.tflop / (time / 1000) if work.tflop else None
        moved = work.bytes_moved / 1e6 / time if work.bytes_moved else None
        matmul, copy = 0.0, 0.0
        if row.environment in self.environments:
            environment = self.environments[row.environment]
            matmul = environment.matmul_tflop_per_s.get(row.case.precision, 0.0)
            copy = environment.copy_gb_per_s
        pids = [pid.measured.median_ms or 0.0 for pid in self.rows if _comparable(pid, row)]
        return Rates(
            tflop_per_s=rate,
            share_of_matmul=rate / matmul if rate and matmul else None,
            share_of_copy=moved / copy if moved and copy else None,
            ratio_to_pid=time / min(pids) if pids else None,
        )

    def with_row(self, row: Row) -> "Report":
        """The report with a row added, in place of the one of the same case and hardware."""
        own = row.kind, row.case, self.hardware(row)
        same = [own == (each.kind, each.case, self.hardware(each)) for each in self.rows]
        if True not in same:
            return replace(self, rows=(*self.rows, row))
        rows = (row if hit else old for hit, old in zip(same, self.rows, strict=True))
        return replace(self, rows=tuple(rows))

    def with_environment(self, environment: Environment) -> tuple["Report", str]:
        """The report with an environment, and its name there; ceilings keep the highest value."""
        for name, known in self.environments.items():
            if _without_ceilings(known) == _without_ceilings(environment):
                environment = _highest_ceilings(known, environment)
                return replace(self, environments={**self.environments, name: environment}), name
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
        return report

    def to_json(self) -> str:
        """The content of `report.json`."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps({**head, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def shown(self, row: Row) -> dict[str, Any]:
        """A row as JSON with what follows from it, for --json."""
        whole = asdict(row.whole)
        names = ("steps", "cfg", "tiles", "median_ms", "p10_ms", "p90_ms")
        derived = {
            **{name: whole[name] for name in names},
            "min_ms": row.measured.min_ms,
            **asdict(self.rates(row)),
            "agrees": row.agrees,
        }
        return {"key": row.case.key, **asdict(row), "derived": derived}


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


def percentiles(samples_ms: Sequence[float]) -> Mapping[str, float]:
    """Median, 10th and 90th percentile, as fields of a `StageRow`; nothing of no samples."""
    if not samples_ms:
        return {}
    found = np.quantile(samples_ms, (0.5, 0.1, 0.9)).tolist()
    return dict(zip(("median_ms", "p10_ms", "p90_ms"), found, strict=True))


def _comparable(pid: Row, row: Row) -> bool:
    """Whether a row's time may be set against that of another, which must be a PiD decode.

    They are of the same kind, machine, device, precision and sizes, and for a cascade of the whole
    network: part of one tells nothing about another pipeline.
    """
    if pid.case.pipeline != PID or pid.status != "ok" or not pid.measured.rounds_ms:
        return False
    if (pid.kind, pid.environment, pid.input_size) != (row.kind, row.environment, row.input_size):
        return False
    apart = dict.fromkeys(("backend", "weights"), "")
    if row.case.pipeline != PID:
        if pid.reduced or row.reduced:
            return False
        apart |= {"pipeline": "", "variant": "", "steps": 0, "depth": 0.0}
    return replace(pid.case, **apart) == replace(row.case, **apart)


def _without_ceilings(environment: Environment) -> Environment:
    return replace(environment, matmul_tflop_per_s={}, copy_gb_per_s=0.0)


def _highest_ceilings(known: Environment, other: Environment) -> Environment:
    products = dict(known.matmul_tflop_per_s)
    for precision, value in other.matmul_tflop_per_s.items():
        products[precision] = max(value, products.get(precision, 0.0))
    copies = max(known.copy_gb_per_s, other.copy_gb_per_s)
    return replace(known, matmul_tflop_per_s=products, copy_gb_per_s=copies)


def _check(path: Path, report: Report) -> None:
    for row in report.rows:
        wrong = None
        if row.kind not in KINDS:
            wrong = f"kind {' or '.join(KINDS)}", row.kind
        elif row.status not in STATUSES:
            wrong = f"status {' or '.join(STATUSES)}", row.status
        elif row.kind != "reported" and row.case.backend not in BACKENDS:
            wrong = "a backend of this version", row.case.backend
        elif row.kind != "reported" and row.case.precision not in TOLERANCE:
            wrong = f"a precision of {', '.join(TOLERANCE)}", row.case.precision
        elif row.environment and row.environment not in report.environments:
            wrong = "an environment of the report", row.environment
        elif row.kind == "measured" and row.status == "ok" and not row.measured.rounds_ms:
            wrong = "times of a measured row", "none"
        if wrong is not None:
            raise BenchInputError(
                f"expected {wrong[0]} in row {row.case.key[:80]!r} of {path}, but got "
                f"{wrong[1][:60]!r}; measure again with this version"
            )
