"""Runs cases: each in a process of its own, in turn, every one written down when it is finished.

On the CPU cases take turns, one decode each per round, so that what else the machine does hurts
all of them; as many as fit in memory take part at a time. On CUDA every case has the GPU to itself.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
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

    def answer(job: Job, worker: Child, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the worker says; None when the case failed, and its row says why."""
        try:
            return worker.ask(request)
        except ChildError as error:
            failed = replace(_begun(job, environment), status=status_of(error), message=str(error))
            finished(failed)
            return None

    samples.mkdir(parents=True, exist_ok=True)
    for group in groups(jobs, int(MEMORY_SHARE * hardware.available_bytes())):
        with contextlib.ExitStack() as stack:
            running: list[tuple[Job, Child]] = []
            for job in group:
                case = job.row.case
                status(f"loading {case.pipeline} {case.backend}")
                worker = stack.enter_context(start_worker(case.threads))
                asked = {"case": asdict(case), "materials": asdict(job.materials)}
                if answer(job, worker, asked):
                    running.append((job, worker))
            for number in range(repeats):
                for job, worker in list(running):
                    case = job.row.case
                    status(f"{case.pipeline} {case.backend}: {number + 1} of {repeats}")
                    if not answer(job, worker, {"round": number}):
                        running.remove((job, worker))
            for job, worker in running:
                sample = sample_file(samples, job.row.case)
                if said := answer(job, worker, {"finish": str(sample)}):
                    finished(_with_times(_begun(job, environment), said))


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


def _with_times(row: Row, said: Mapping[str, Any]) -> Row:
    """A row with what its worker measured."""
    spans = said["spans"]
    times = tuple(each[WHOLE] for each in spans)
    stages = tuple(
        replace(stage, **percentiles([each[stage.name] for each in spans if stage.name in each]))
        for stage in row.stages
    )
    measured = replace(row.measured, rounds_ms=times, **said["measured"])
    return replace(row, measured=measured, stages=stages)


def _begun(job: Job, environment: str) -> Row:
    """The row of a case that runs now."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return replace(job.row, kind="measured", environment=environment, date=date)
