"""One case in a process of its own: `python -m pid_bench.worker`, driven by `pid_bench.runner`.

A `pid_engines.child`. It is asked, and answers:

    {"ceilings": precision, ..}     {"matmul_tflop_per_s", "copy_gb_per_s"}
    {"case": .., "materials": ..}   {"ready": true}, after a decode that may compile
    {"round": number}               {"done": true}, after a decode that is timed
    {"finish": PATH}                {"spans": [{"decode": ms, stage: ms, ..}, ..] of the rounds,
                                    "measured": members of `Measured`}; pixels go to PATH

or {"error", "status"}, when it cannot.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pid_bench import hardware, measure
from pid_bench.cases import PID, Case
from pid_bench.contenders import Materials, make_contender
from pid_bench.images import sampled
from pid_engines.child import PartDone, serve
from pid_runtime.errors import memory_shortage


class Worker:
    """What the process is to do, one method for every kind of request."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._free = 0
        self._case: Any = None
        self._contender: Any = None
        self._image: Any = None
        self._spans: list[dict[str, float]] = []
        self._user_ms: list[float] = []
        self._measured: dict[str, Any] = {}

    def answer(self, request: dict[str, Any], progress: PartDone) -> dict[str, Any]:
        """Do what is asked; what a library raises is that case's result."""
        try:
            if "ceilings" in request:
                return _ceilings(request["ceilings"], request["device"], request["threads"])
            if "case" in request:
                return self._prepare(Case(**request["case"]), Materials(**request["materials"]))
            return self._finish(Path(request["finish"])) if "finish" in request else self._round()
        except Exception as error:  # noqa: BLE001
            return failure(error)

    def _prepare(self, case: Case, materials: Materials) -> dict[str, Any]:
        self._free = measure.free_bytes(case.device)
        self._case, self._contender = case, make_contender(case, materials)
        loaded = time.monotonic()
        self._decode()
        first = time.monotonic()
        for _ in range(measure.WARMUPS[case.device] - 1):
            self._decode()
        measure.reset_peaks(case.device)
        self._measured = {
            "load_seconds": loaded - self._begin,
            "first_seconds": first - loaded,
            "timer": self._contender.clock.timer,
            "attention": self._contender.attention,
        }
        return {"ready": True}

    def _round(self) -> dict[str, Any]:
        before = measure.process_seconds()
        self._spans.append(self._decode())
        self._user_ms.append(1000 * (measure.process_seconds() - before))
        return {"done": True}

    def _decode(self) -> dict[str, float]:
        self._image = None  # or two images would be held at a time
        self._image = self._contender.decode()
        return self._contender.clock.read()

    def _finish(self, sample: Path) -> dict[str, Any]:
        case = self._case
        self._measured |= measure.peaks(case.device, self._free)
        if case.device == "cpu":
            self._measured["user_ms"] = median(self._user_ms)
        image = _on_host(self._image)
        self._contender.close()
        wanted = (1, 3, case.height, case.width)
        if image.shape != wanted or not np.isfinite(image).all():
            shape = "x".join(map(str, image.shape))
            raise ValueError(f"expected finite pixels {wanted}, but got {shape} or NaN among them")
        if case.pipeline == PID:
            np.save(sample, sampled(image))
        return {"spans": self._spans, "measured": self._measured}


def _ceilings(precision: str, device: str, threads: int) -> dict[str, float]:
    return {
        "matmul_tflop_per_s": hardware.matmul_tflop_per_s(precision, device, threads),
        "copy_gb_per_s": hardware.copy_gb_per_s(device, threads),
    }


def failure(error: BaseException) -> dict[str, str]:
    """What went wrong, in one line, and whether memory was short."""
    text = " ".join((str(error) or type(error).__name__).split())
    short = memory_shortage(error) is not None
    return {"error": text[:300], "status": "oom" if short else "error"}


def _on_host(image: Any) -> NDArray[np.float32]:
    if isinstance(image, np.ndarray):
        return image
    return torch.from_dlpack(image).float().cpu().numpy()


if __name__ == "__main__":
    sys.exit(serve(Worker().answer))
