"""Decoders of one bundle, each in a thread of its own, behind a queue that is bounded."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pid_runtime.decoder import Bundle, Decoder, Progress

_log = logging.getLogger(__name__)

Work = Callable[[Decoder, Progress], bytes]
"""What is to be done with a decoder; it passes the progress on to the decode."""


class CancelledError(Exception):
    """Whoever asked for this has gone."""


@dataclass(frozen=True)
class Job:
    """Work in the queue, or being done."""

    work: Work
    result: "Future[bytes]" = field(default_factory=lambda: Future[bytes]())
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Leave it out, or end it after the step that runs."""
        self._cancelled.set()

    def check(self, *_: Any) -> None:
        """Raise `CancelledError` if nobody waits for it; a decode's progress."""
        if self._cancelled.is_set():
            raise CancelledError


class Workers:
    """Threads that share a bundle's weights; takes jobs from any thread."""

    def __init__(self, bundle: Bundle, count: int = 1, queue_size: int = 16) -> None:
        """Start `count` threads; `queue_size` jobs wait at most."""
        self.bundle = bundle
        self._queue: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._threads = [
            threading.Thread(target=self._serve, args=(bundle.decoder(),), name=f"pid-{index}")
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs no decoder has begun."""
        return self._queue.qsize()

    def submit(self, work: Work) -> Job:
        """Queue work. Raises `queue.Full` when too many wait."""
        job = Job(work)
        self._queue.put_nowait(job)
        return job

    def is_alive(self) -> bool:
        """Whether every thread runs."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Do what is queued, end the threads and close the bundle; again does nothing."""
        for thread in self._threads:
            if thread.is_alive():
                self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self.bundle.close()

    def _serve(self, decoder: Decoder) -> None:
        with decoder:
            while (job := self._queue.get()) is not None:
                try:
                    job.check()
                    job.result.set_result(job.work(decoder, job.check))
                except BaseException as error:  # noqa: BLE001  it is the waiting request's
                    job.result.set_exception(error)
                del job  # its pixels need not stay until the next one comes
