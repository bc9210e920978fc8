"""Times of a decode and its stages, and peaks of memory.

A clock is given to whoever decodes. On the CPU, and for ONNX Runtime, which waits for the device
itself, it reads the wall; for what works on a CUDA stream it records events on that stream, which
are read when the decode is over.
"""

import contextlib
import resource
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

WARMUPS = {"cpu": 1, "cuda": 3}
"""Decodes that are not timed, by device; the first may compile."""

REPEATS = {"cpu": 7, "cuda": 20}
QUICK_REPEATS = {"cpu": 3, "cuda": 20}
"""Timed decodes, by device."""

WHOLE = "decode"
"""The span of a whole decode."""


class Clock:
    """Adds up wall time by span. wait: called at both ends of a span, to let a device finish."""

    timer = "wall"
    """wall or events; see `Measured.timer`."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait = wait
        self._spans: dict[str, float] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Generator[None, None, None]:
        """Time what happens inside."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self._add(name, 1000 * (time.perf_counter() - begin))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are spans."""

        def run(*args: Any) -> Any:
            with self.span(name):
                return call(*args)

        return run

    def read(self) -> dict[str, float]:
        """Milliseconds by span since the last reading; waits for the device."""
        spans, self._spans = self._spans, {}
        return spans

    def _add(self, name: str, elapsed_ms: float) -> None:
        self._spans[name] = self._spans.get(name, 0.0) + elapsed_ms


class EventClock(Clock):
    """Time on a CUDA stream: `stream`, which may be set later, or torch's when None."""

    timer = "events"
    stream: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Generator[None, None, None]:
        stream = self.stream or torch.cuda.current_stream()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((name, begin, end))

    def read(self) -> dict[str, float]:
        for name, begin, end in self._events:
            end.synchronize()
            self._add(name, begin.elapsed_time(end))
        self._events.clear()
        return super().read()


def device_clock(device: str) -> Clock:
    """The clock of what torch does on a device: "cpu" or "cuda"."""
    return EventClock() if device == "cuda" else Clock()


def process_seconds() -> float:
    """Processor time of this process so far, user and system, of all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peaks(device: str) -> None:
    """Begin to watch the peaks of memory anew, as far as the system can do that."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peaks(device: str, free_before: int) -> dict[str, int]:
    """Peaks of memory since the last reset, by field of `Measured`.

    On CUDA those of torch's allocator, and what the driver gave out since `free_before` bytes were
    free: that is what is held, not a peak within a call.
    """
    if device == "cpu":
        return {"peak_rss_bytes": peak_rss_bytes()}
    torch.cuda.synchronize()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_used_bytes": max(0, free_before - free_bytes(device)),
    }


def free_bytes(device: str) -> int:
    """Memory of a GPU that nobody holds; 0 on the CPU, where it is not asked for."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def peak_rss_bytes() -> int:
    """The largest resident memory since the last reset, or since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
