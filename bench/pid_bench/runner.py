"""Runs cases: each in a process of its own, in turn, every one written down when it is finished.

On the CPU cases take turns, one decode each per round, so that what else the machine does hurts
all of them; as many as fit in memory take part at a time. On CUDA every case has the GPU to itself.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pid_bench import hardware
from pid_bench.cases import PID, Case
from pid_bench.contenders import Materials
from pid_bench.measure import WHOLE
from pid_bench.report import Report, Row, statistics_of

TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""Largest root mean square difference of two images of the same network, pixels in [-1, 1].

Both have rounded in their own ways; what is miscompiled is off by about 1.
"""

TF32_TOLERANCE = 5e-3
"""That of fp32 on CUDA, where libraries multiply in TF32 unless they are told not to."""

MEMORY_SHARE = 0.7
"""Of the host's available memory that cases may take at a time."""

PROCESS_BYTES = 1_500_000_000
"""What a case takes besides its weights, roughly: libraries and activations of a small image."""

Finished = Callable[[Row], None]
Status = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A case to run."""

    case: Case
    row: Row
    """What is known of it already."""
    materials: Materials
    build_seconds: float | None = None
    """What making its bundle or engines took."""


@dataclass
class _Entry:
    """A case while it runs."""

    job: Job
    worker: "Worker"
    ready: dict[str, Any] = field(default_factory=dict)
    spans: list[dict[str, float]] = field(default_factory=list)
    user_ms: list[float] = field(default_factory=list)


class WorkerError(Exception):
    """A case cannot go on. The message is one line; `status` is that of its row."""

    def __init__(self, message: str, status: str = "error") -> None:
        super().__init__(message)
        self.status = status


def run_jobs(
    jobs: Sequence[Job],
    repeats: int,
    environment: str,
    samples: Path,
    finished: Finished,
    status: Status = lambda text: None,
) -> None:
    """Run every job, and call `finished` with its row as soon as that is known.

    repeats: timed decodes of each. environment: the name that rows give where they ran. samples:
    folder in which every PiD image leaves some of its pixels. status: called with what is done now.
    """
    for group in groups(jobs, int(MEMORY_SHARE * hardware.available_bytes())):
        with contextlib.ExitStack() as stack:
            entries: list[_Entry] = []
            for job in group:
                status(f"loading {job.case.pipeline} {job.case.backend}")
                worker = stack.enter_context(start_worker(job.case.threads))
                entry = _Entry(job, worker)
                request = {"case": job.case.to_json(), "materials": asdict(job.materials)}
                if _try(entry, lambda e=entry, r=request: _get_ready(e, r), environment, finished):
                    entries.append(entry)
            for number in range(repeats):
                for entry in list(entries):
                    case = entry.job.case
                    status(f"{case.pipeline} {case.backend}: {number + 1} of {repeats}")
                    if not _try(entry, lambda e=entry: _time(e), environment, finished):
                        entries.remove(entry)
            for entry in entries:
                sample = samples / f"{_file_name(entry.job.case)}.npy"
                _try(
                    entry,
                    lambda e=entry, s=sample: finished(_finish(e, s, environment)),
                    environment,
                    finished,
                )


def groups(jobs: Sequence[Job], memory_bytes: int) -> list[list[Job]]:
    """Jobs that take turns: as many as are sure to fit in memory; on CUDA each on its own.

    Cases of other sizes or precisions are not waited for.
    """
    found: list[list[Job]] = []
    room, kind = 0, None
    for job in jobs:
        need = (job.row.weight_bytes or 0) * 5 // 4 + PROCESS_BYTES
        same = (job.row.output_size, job.case.precision)
        if not found or job.case.device == "cuda" or need > room or same != kind:
            found.append([])
            room, kind = memory_bytes, same
        found[-1].append(job)
        room -= need
    return found


def measure_ceilings(precision: str, device: str, threads: int) -> dict[str, float]:
    """What the device reaches at best; in a process of its own, as it takes memory.

    Raises `WorkerError`.
    """
    with start_worker(threads) as worker:
        return worker.ask({"ceilings": precision, "device": device, "threads": threads})


def check_images(report: Report, samples: Path) -> Report:
    """The report with every measured PiD compared with the first one of the same image."""
    first: dict[tuple[Any, ...], Any] = {}
    rows: list[Row] = []
    for row in report.rows:
        decoded = row.pipeline == PID and row.kind == "measured" and row.status == "ok"
        pixels = _read_sample(samples, row) if decoded else None
        if pixels is None:
            rows.append(row)
            continue
        same = _image_key(row)
        if same not in first:
            first[same] = pixels
            rows.append(row)
            continue
        difference = (pixels - first[same]).astype(np.float64)
        error = float(np.sqrt(np.square(difference).mean()))
        most = TOLERANCE[row.precision]
        if row.device == "cuda" and row.precision == "fp32":
            most = TF32_TOLERANCE
        largest = float(np.abs(difference).max())
        rows.append(replace(row, rms_error=error, max_abs_error=largest, agrees=error <= most))
    return replace(report, rows=tuple(rows))


class Worker:
    """A process of `pid_bench.worker`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.pid = process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises `WorkerError` when that is an error, or none comes."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["status"])
        return answer

    def _death(self) -> WorkerError:
        """Why the process ended without a word."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return WorkerError("killed, as happens when the machine runs out of memory", "oom")
        if code < 0:
            return WorkerError(f"crashed ({signal.Signals(-code).name})")
        lines = [line for line in self._log.read_text("utf-8", "replace").splitlines() if line]
        return WorkerError(f"ended with code {code}: {lines[-1] if lines else 'no message'}"[:300])


@contextlib.contextmanager
def start_worker(threads: int) -> Generator[Worker, None, None]:
    """A process for one case, ended with the block. threads: on the CPU; 0 for all."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.NamedTemporaryFile("wb", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pid_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        try:
            yield Worker(process, Path(log.name))
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


def _try(entry: _Entry, step: Callable[[], None], environment: str, finished: Finished) -> bool:
    """Do a step of a case; whether it can go on. If not, its row says why."""
    try:
        step()
    except WorkerError as error:
        row = replace(
            entry.job.row,
            kind="measured",
            status=error.status,
            message=str(error),
            environment=environment,
            date=_now(),
        )
        finished(row)
        return False
    return True


def _get_ready(entry: _Entry, request: dict[str, Any]) -> None:
    entry.ready = entry.worker.ask(request)


def _time(entry: _Entry) -> None:
    answer = entry.worker.ask({"round": True})
    entry.spans.append(answer["spans"])
    entry.user_ms.append(answer["user_ms"])


def _finish(entry: _Entry, sample: Path, environment: str) -> Row:
    """The row of a case whose rounds are over. Raises `WorkerError` for an image that is none."""
    sample.parent.mkdir(parents=True, exist_ok=True)
    memory = entry.worker.ask({"finish": str(sample)})
    rounds = tuple(spans[WHOLE] for spans in entry.spans)
    stages = tuple(
        replace(stage, **_stage_statistics(entry.spans, stage.name))
        for stage in entry.job.row.stages
    )
    return replace(
        entry.job.row,
        kind="measured",
        environment=environment,
        date=_now(),
        timer=entry.ready["timer"],
        attention=entry.ready["attention"],
        rounds_ms=rounds,
        **statistics_of(rounds),
        user_ms=median(entry.user_ms) if entry.job.case.device == "cpu" else None,
        build_seconds=entry.job.build_seconds,
        load_seconds=entry.ready["load_seconds"],
        first_seconds=entry.ready["first_seconds"],
        **memory,
        stages=stages,
    )


def _stage_statistics(rounds: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    samples = [spans[name] for spans in rounds if name in spans]
    if not samples:
        return {}
    values = statistics_of(samples)
    return {key: value for key, value in values.items() if key != "min_ms"}


def _read_sample(samples: Path, row: Row) -> Any:
    path = samples / f"{_safe(row.key)}.npy"
    return np.load(path) if path.is_file() else None


def _file_name(case: Case) -> str:
    return _safe(case.key)


def _safe(key: str) -> str:
    return key.replace("/", "_")


def _image_key(row: Row) -> tuple[Any, ...]:
    """Rows that have this in common must come to the same image."""
    return (
        row.space,
        row.variant,
        row.reduced,
        row.output_size,
        row.precision,
        row.steps,
        row.weights,
    )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
