"""Runs cases: each in a process of its own, in turn, every one written down when it is finished.

On the CPU cases take turns, one decode each per round, so that what else the machine does hurts
all of them; as many as fit in memory take part at a time. On CUDA every case has the GPU to itself.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from pid_bench import hardware
from pid_bench.contenders import Materials
from pid_bench.images import sample_file
from pid_bench.measure import WHOLE
from pid_bench.report import Row, percentiles
from pid_engines.child import Child, ChildError

MEMORY_SHARE = 0.7
"""Of the host's available memory that cases may take at a time."""

PROCESS_BYTES = 1_500_000_000
"""What a case takes besides its weights, roughly: libraries and activations of a small image."""

Finished = Callable[[Row], None]
Status = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A case to run."""

    row: Row
    """What is known of it already."""
    materials: Materials


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

    def succeeds(job: Job, step: Callable[[], None]) -> bool:
        """Do a step of a case; whether it can go on. If not, its row says why."""
        try:
            step()
        except ChildError as error:
            failed = replace(_begun(job, environment), status=status_of(error), message=str(error))
            finished(failed)
            return False
        return True

    samples.mkdir(parents=True, exist_ok=True)
    for group in groups(jobs, int(MEMORY_SHARE * hardware.available_bytes())):
        with contextlib.ExitStack() as stack:
            running: list[_Running] = []
            for job in group:
                status(f"loading {job.row.case.pipeline} {job.row.case.backend}")
                started = _Running(job, stack.enter_context(start_worker(job.row.case.threads)))
                if succeeds(job, started.prepare):
                    running.append(started)
            for number in range(repeats):
                for each in list(running):
                    case = each.job.row.case
                    status(f"{case.pipeline} {case.backend}: {number + 1} of {repeats}")
                    if not succeeds(each.job, each.decode):
                        running.remove(each)
            for each in running:
                succeeds(each.job, lambda e=each: finished(e.finish(samples, environment)))


def groups(jobs: Sequence[Job], memory_bytes: int) -> list[list[Job]]:
    """Jobs that take turns: as many as are sure to fit in memory; on CUDA each on its own.

    Cases of other sizes or precisions are not waited for.
    """
    found: list[list[Job]] = []
    room, kind = 0, None
    for job in jobs:
        need = (job.row.counted.weight_bytes or 0) * 5 // 4 + PROCESS_BYTES
        same = (job.row.case.size, job.row.case.precision)
        if not found or job.row.case.device == "cuda" or need > room or same != kind:
            found.append([])
            room, kind = memory_bytes, same
        found[-1].append(job)
        room -= need
    return found


def measure_ceilings(precision: str, device: str, threads: int) -> dict[str, float]:
    """What the device reaches at best; in a process of its own, as it takes memory.

    Raises `ChildError`.
    """
    with start_worker(threads) as worker:
        return worker.ask({"ceilings": precision, "device": device, "threads": threads})


def start_worker(threads: int) -> Child:
    """A process of `pid_bench.worker`, for one case. threads: on the CPU; 0 for all."""
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return Child([sys.executable, "-m", "pid_bench.worker"], environment=environment)


def status_of(error: ChildError) -> str:
    """The status of a row whose process failed."""
    return "oom" if error.killed else error.said.get("status", "error")


class _Running:
    """A case while it runs. What it is asked raises `ChildError` when the case fails."""

    def __init__(self, job: Job, worker: Child) -> None:
        self.job, self._worker = job, worker
        self._ready: dict[str, Any] = {}
        self._spans: list[dict[str, float]] = []
        self._user_ms: list[float] = []

    def prepare(self) -> None:
        """Load everything, and warm up."""
        asked = {"case": asdict(self.job.row.case), "materials": asdict(self.job.materials)}
        self._ready = self._worker.ask(asked)

    def decode(self) -> None:
        """Time one decode."""
        answer = self._worker.ask({"round": True})
        self._spans.append(answer["spans"])
        self._user_ms.append(answer["user_ms"])

    def finish(self, samples: Path, environment: str) -> Row:
        """The row of a case whose rounds are over; its image leaves some pixels in `samples`."""
        case = self.job.row.case
        memory = self._worker.ask({"finish": str(sample_file(samples, case))})
        measured = replace(
            self.job.row.measured,
            rounds_ms=tuple(spans[WHOLE] for spans in self._spans),
            user_ms=median(self._user_ms) if case.device == "cpu" else None,
            **self._ready,
            **memory,
        )
        stages = tuple(
            replace(stage, **percentiles([s[stage.name] for s in self._spans if stage.name in s]))
            for stage in self.job.row.stages
        )
        return replace(_begun(self.job, environment), measured=measured, stages=stages)


def _begun(job: Job, environment: str) -> Row:
    """The row of a case that runs now."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return replace(job.row, kind="measured", environment=environment, date=date)
