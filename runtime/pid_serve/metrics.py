"""What `/metrics` tells, for Prometheus."""

import contextlib
import time
from collections.abc import Generator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of one application, in a registry of its own."""

    def __init__(self, pools: Mapping[str, Any]) -> None:
        """pools: `service.Workers`, by what they are called here."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pid_requests", "answered", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "pid_seconds",
            "of requests, by stage",
            ["stage"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        read = {
            "pid_queue": ("tasks that no worker has begun", lambda pool: pool.waiting),
            "pid_workers_ready": ("workers that run", lambda pool: pool.ready),
            "pid_worker_restarts": ("workers started again", lambda pool: pool.restarts),
            "pid_memory_bytes": ("of the worker's processes", lambda pool: pool.memory_bytes()),
        }
        for name, (meaning, value) in read.items():
            gauge = Gauge(name, meaning, ["model"], registry=self.registry)
            for model, pool in pools.items():
                gauge.labels(model).set_function(lambda value=value, pool=pool: value(pool))
        for pool in pools.values():
            pool.observe = self.observe

    def observe(self, stage: str, seconds: float) -> None:
        """Count seconds; from any thread."""
        self._seconds.labels(stage).observe(seconds)

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Measure a block."""
        begin = time.perf_counter()
        yield
        self.observe(name, time.perf_counter() - begin)
