"""Worker processes behind a bounded queue.

A worker is a process that holds what takes memory, such as a decoder with its weights, and a
thread here that gives it tasks. What happens to the process happens to its own task alone: the
task fails with `WorkerLostError`, and the process is started again.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pid_runtime.command import console
from pid_runtime.errors import InputError, OutOfMemoryError, PidRuntimeError, memory_shortage

Task = TypeVar("Task")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# Not fork: a copy of a process with threads and GPU contexts is broken.
_context = multiprocessing.get_context("spawn")

_LONGEST_PAUSE = 30.0
"""Most seconds before a worker that could not be opened again is tried once more."""

_LOOK_SECONDS = 0.2
"""How often a worker without a task looks whether its process is still there."""


class QueueFullError(Exception):
    """Too many tasks wait."""


class WorkerLostError(Exception):
    """The process ended while it worked, or none can be started."""


class CancelledError(Exception):
    """Nobody waits for this any more."""


class Session(Protocol):
    """What a worker holds; made in its process."""

    about: Any
    """What the server is to know of it."""

    def run(self, tasks: Sequence[Any], report: Callable[[Sequence[Any]], None]) -> Sequence[Any]:
        """The result of every task; report: called now and then, with news for every task.

        `report` raises when nobody waits any more. `InputError` is the tasks' fault; after any
        other error the process ends, since what a GPU did wrong it does wrong again.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(eq=False)
class _Job(Generic[Task, Result]):
    task: Task
    report: Callable[[Any], None]
    is_alone: bool = False
    """Whether it shares no batch, since one that it was in failed."""
    result: "Future[Result]" = field(default_factory=lambda: Future[Any]())
    queued: float = field(default_factory=time.perf_counter)

    def settle(self, result: Any = None, error: Exception | None = None) -> None:
        """Answer whoever waits, if anybody does."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.result.set_result(result)
            else:
                self.result.set_exception(error)


class Pool(Generic[Task, Result]):
    """Workers for tasks of one kind; takes tasks from any event loop."""

    def __init__(
        self,
        openers: Sequence[Callable[[], Session]],
        queue_size: int = 16,
        batch: int = 1,
        kind: Callable[[Task], Hashable] = lambda task: None,
        patience: float = 300.0,
    ) -> None:
        """Start a process for every opener, and wait until all are ready.

        openers: make the session in the process, so they can be pickled. queue_size: tasks that
        wait at most. batch: tasks at most that one call of a session gets; kind: what these have
        in common. patience: seconds that a worker may go on when nobody waits for what it does;
        then it is killed. Raises `PidRuntimeError` when a session cannot be opened.
        """
        self.batch, self.patience = batch, patience
        self.observe: Callable[[str, float], None] = lambda stage, seconds: None
        """Called with the seconds of a task's stages, "wait" and "work"."""
        self._kind, self._most = kind, queue_size
        self._jobs: deque[_Job[Task, Result]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._workers = [_Worker(self, opener) for opener in openers]
        try:
            for worker in self._workers:
                worker.wait_until_open()
        except BaseException:
            self.close()
            raise
        self.about: Any = self._workers[0].about

    async def run(self, task: Task, report: Callable[[Any], None] | None = None) -> Result:
        """A task's result. Cancelling this leaves the task out, or ends it after its next step.

        report: called in the event loop with what the session reports; None if nobody looks.
        Raises `QueueFullError`, `WorkerLostError`, and what the session raised.
        """
        loop = asyncio.get_running_loop()

        def pass_on(news: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                if report is not None:
                    loop.call_soon_threadsafe(report, news)

        job = _Job[Task, Result](task, pass_on)
        with self._changed:
            if self._is_closing or not any(worker.is_usable for worker in self._workers):
                raise WorkerLostError("expected a worker, but none can be started")
            self._drop_cancelled()
            if len(self._jobs) >= self._most:
                raise QueueFullError
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.result)

    @property
    def waiting(self) -> int:
        """How many tasks no worker has begun."""
        with self._changed:
            self._drop_cancelled()
            return len(self._jobs)

    @property
    def size(self) -> int:
        """How many workers there are to be."""
        return len(self._workers)

    @property
    def ready(self) -> int:
        """How many workers can take tasks, or have one."""
        return sum(worker.is_open for worker in self._workers)

    @property
    def restarts(self) -> int:
        """How often a worker was started again."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def memory_bytes(self) -> int:
        """Memory of the processes, without what they only mapped of files; 0 if unknown."""
        total = 0
        for pid in self.pids:
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += 1024 * int(
                    Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]
                )
        return total

    def close(self) -> None:
        """Do what is queued, and end the processes; again does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()
        for job in self._jobs:
            job.settle(error=WorkerLostError("the server ends"))

    def take(self, is_alive: Callable[[], bool]) -> "list[_Job[Task, Result]]":
        """For a worker: the next task and what goes with it; nothing when it is to end.

        Raises `EOFError` when its process is not alive.
        """
        with self._changed:
            while True:
                if not is_alive():
                    raise EOFError
                self._drop_cancelled()
                if self._jobs or self._is_closing:
                    break
                self._changed.wait(_LOOK_SECONDS)
            if not self._jobs:
                return []
            first = self._jobs.popleft()
            taken = [first]
            if not first.is_alone:
                kind = self._kind(first.task)
                for job in list(self._jobs):
                    if (
                        len(taken) < self.batch
                        and not job.is_alone
                        and self._kind(job.task) == kind
                    ):
                        taken.append(job)
                        self._jobs.remove(job)
            return taken

    def put_back(self, jobs: "Sequence[_Job[Task, Result]]") -> None:
        """For a worker: have tasks of a batch that failed done one by one, before the others."""
        with self._changed:
            for job in reversed(jobs):
                job.is_alone = True
                self._jobs.appendleft(job)
            self._changed.notify_all()

    def give_up(self, worker: "_Worker") -> None:
        """For a worker that cannot be opened: unless others can be, nobody will do what waits."""
        with self._changed:
            worker.is_usable = False
            if not any(each.is_usable for each in self._workers):
                for job in self._jobs:
                    job.settle(error=WorkerLostError("expected a worker, but none can be started"))
                self._jobs.clear()

    def pause(self, seconds: float) -> bool:
        """For a worker: wait, unless the pool is to end; whether it is not."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, seconds)
            return not self._is_closing

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs if job.result.cancelled()]:
            self._jobs.remove(job)


class _Worker:
    """A process, and the thread that gives it tasks and starts it again when it ends."""

    def __init__(self, pool: Pool[Any, Any], opener: Callable[[], Session]) -> None:
        self.about: Any = None
        self.restarts = 0
        self.is_open = False
        self.is_usable = True
        """Whether it is open, or was not yet found impossible to open again."""
        self._pool, self._opener = pool, opener
        self._process: Any = None
        # The number of a batch that nobody waits for. Not by the pipe, which may be full.
        self._cancelled = _context.RawValue("Q", 0)
        self._batches = 0
        self._failure: Exception | None = None
        self._tried = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="pid-worker")
        self._thread.start()

    def wait_until_open(self) -> None:
        """Raise `PidRuntimeError` when the session could not be opened."""
        self._tried.wait()
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait for what it does; not for weights that load, which nobody will use."""
        process = self._process
        if process is not None and not self.is_open:
            with contextlib.suppress(ValueError):
                process.kill()
        self._thread.join()

    @property
    def pid(self) -> int | None:
        process = self._process
        with contextlib.suppress(ValueError):  # it was closed just now
            return None if process is None else process.pid
        return None

    def _attend(self) -> None:
        pause = 0.5
        while True:
            connection, theirs = _context.Pipe()
            self._process = _context.Process(
                target=_serve,
                args=(theirs, self._opener, self._cancelled, logging.getLogger().level),
                name="pid-worker",
                daemon=True,
            )
            lost = True
            try:
                self._process.start()
                theirs.close()  # or its end would not be seen
                self.about = self._opened(connection)
                self._failure, self.is_open, self.is_usable, pause = None, True, True, 0.5
                self._tried.set()
                while jobs := self._pool.take(self._process.is_alive):
                    self._work(connection, jobs)
                lost = False
            except InputError as error:
                self._failure = error
            except (EOFError, OSError, RuntimeError) as error:
                if not self.is_open:
                    self._failure = PidRuntimeError(
                        "expected a worker to start, but it ended; see what it logged"
                    )
                    self._failure.__cause__ = error
            finally:
                was_open, self.is_open = self.is_open, False
                connection.close()
                code = self._ended(self._process)
            if not lost:
                return
            is_first = not self._tried.is_set()
            self._tried.set()
            if is_first:
                return
            _log.warning("a worker ended with code %s and is started again", code)
            if not was_open:
                self._pool.give_up(self)
                pause = min(2 * pause, _LONGEST_PAUSE)
            if not self._pool.pause(0 if was_open else pause):
                return
            self.restarts += 1

    @staticmethod
    def _opened(connection: Connection) -> Any:
        """What a session that has opened says. Raises `InputError` as it did."""
        about, error = connection.recv()
        if error is not None:
            raise error
        return about

    def _ended(self, process: Any) -> int | None:
        """The exit code of a process that has ended, or is made to."""
        if process.pid is None:
            return None
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        self._process = None
        process.close()
        return code

    def _work(self, connection: Connection, jobs: Sequence[_Job[Any, Any]]) -> None:
        """Have tasks done; raises `EOFError` or `OSError` when the process ends."""
        self._batches += 1
        number, begin = self._batches, time.perf_counter()

        def cancel(_: object) -> None:
            if all(job.result.cancelled() for job in jobs):
                self._cancelled.value = number

        for job in jobs:
            self._pool.observe("wait", begin - job.queued)
            job.result.add_done_callback(cancel)
        error: Exception | None = None
        try:
            connection.send((number, [job.task for job in jobs]))
            while True:
                self._wait(connection, jobs)
                news, results, error = connection.recv()
                if results is not None or error is not None:
                    break
                for job, each in zip(jobs, news, strict=True):
                    job.report(each)
        except (EOFError, OSError):
            self._fail(jobs, WorkerLostError("the worker ended"))
            raise
        self._pool.observe("work", time.perf_counter() - begin)
        if error is not None:
            self._fail(jobs, error)
            if not isinstance(error, InputError):
                raise EOFError  # the process ends itself
            return
        for job, result in zip(jobs, results or (), strict=True):
            job.settle(result)

    def _wait(self, connection: Connection, jobs: Sequence[_Job[Any, Any]]) -> None:
        """Until the process says something, or ends: one that is stuck is made to."""
        deserted: float | None = None
        while not connection.poll(_LOOK_SECONDS):
            if deserted is None and all(job.result.cancelled() for job in jobs):
                deserted = time.monotonic()
            if deserted is not None and time.monotonic() - deserted > self._pool.patience:
                _log.warning("a worker goes on though nobody waits for it, and is killed")
                self._process.kill()
                return

    def _fail(self, jobs: Sequence[_Job[Any, Any]], error: Exception) -> None:
        if len(jobs) > 1:
            self._pool.put_back(jobs)
        else:
            jobs[0].settle(error=error)


def _serve(
    connection: Connection, opener: Callable[[], Session], cancelled: Any, level: int
) -> None:
    """What a worker's process does: open, then work until the other end is closed."""
    # Ctrl-C and SIGTERM may come to the whole group: the server ends workers when they are done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    console.set_up_logging(quiet=level > logging.INFO)
    try:
        session = opener()
    except Exception as error:  # noqa: BLE001  the server tells it
        connection.send((None, portable(error)))
        return
    with contextlib.suppress(EOFError, OSError), contextlib.closing(session):
        connection.send((session.about, None))
        while True:
            number, tasks = connection.recv()

            def report(news: Sequence[Any], number: int = number) -> None:
                if cancelled.value == number:
                    raise CancelledError
                connection.send((news, None, None))

            results, error = None, None
            try:
                results = session.run(tasks, report)
            except CancelledError:
                results = [None] * len(tasks)
            except Exception as raised:  # noqa: BLE001  whoever asked is told
                error = portable(raised)
            connection.send((None, results, error))
            if error is not None and not isinstance(error, InputError):
                return
            del tasks, results, error  # pixels need not stay until the next task comes


def portable(error: Exception) -> Exception:
    """An error that can be sent; what went wrong in others is for the log."""
    shortage = memory_shortage(error)
    if isinstance(error, PidRuntimeError):
        return error
    if shortage is not None:
        return OutOfMemoryError(f"expected enough memory, but got {shortage}")
    if isinstance(error, InputError):
        return PidRuntimeError(str(error))
    _log.error("a worker failed:\n%s", "".join(traceback.format_exception(error)))
    return RuntimeError("the worker failed")
