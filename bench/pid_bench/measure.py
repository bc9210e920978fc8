"""Times of a decode and its stages, and peaks of memory.

A clock is given to whoever decodes. On the CPU, and for ONNX Runtime, which waits for the device
itself, it reads the wall; for what works on a CUDA stream it records events on that stream, which
are read when the decode is over.
"""

import contextlib
import resource
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

WARMUPS = {"cpu": 1, "cuda": 3}
"""Decodes that are not timed, by device; the first may compile."""

REPEATS = {"cpu": 7, "cuda": 20}
QUICK_REPEATS = {"cpu": 3, "cuda": 20}
"""Timed decodes, by device."""

WHOLE = "decode"
"""The span of a whole decode."""


class Clock(Protocol):
    """Adds up the time of spans by name."""

    timer: str
    """wall or events; see `Row.timer`."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time what happens inside."""
        ...

    def read(self) -> dict[str, float]:
        """Milliseconds by span since the last reading; waits for the device."""
        ...


class WallClock:
    """Wall time. wait: called at both ends of a span, to let a device finish."""

    timer = "wall"

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait = wait
        self._spans: dict[str, float] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Generator[None, None, None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        elapsed = 1000 * (time.perf_counter() - begin)
        self._spans[name] = self._spans.get(name, 0.0) + elapsed

    def read(self) -> dict[str, float]:
        spans, self._spans = self._spans, {}
        return spans


class EventClock:
    """Time on a CUDA stream. stream: a torch stream, which may be set later; torch's when None."""

    timer = "events"

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Generator[None, None, None]:
        import torch

        stream = self.stream or torch.cuda.current_stream()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((name, begin, end))

    def read(self) -> dict[str, float]:
        spans: dict[str, float] = {}
        for name, begin, end in self._events:
            end.synchronize()
            spans[name] = spans.get(name, 0.0) + begin.elapsed_time(end)
        self._events.clear()
        return spans


def device_clock(device: str) -> Clock:
    """The clock of what torch does on a device: "cpu" or "cuda"."""
    return EventClock() if device == "cuda" else WallClock()


def process_seconds() -> float:
    """Processor time of this process so far, user and system, of all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak_rss() -> bool:
    """Begin to watch the peak anew from what is resident now; whether the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """The largest resident memory since the last reset, or since the process began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CudaMemory:
    """Peaks of a case on CUDA: of torch's allocator, and of all that the driver gave out."""

    def __init__(self) -> None:
        import torch

        torch.cuda.init()
        self._free = torch.cuda.mem_get_info()[0]

    def reset(self) -> None:
        """Begin to watch the allocator's peaks anew."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> Mapping[str, int]:
        """By field of a row. The driver's figure is of what is held, not a peak within a call."""
        import torch

        torch.cuda.synchronize()
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": max(0, self._free - torch.cuda.mem_get_info()[0]),
        }
