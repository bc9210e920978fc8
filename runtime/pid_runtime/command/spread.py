"""`--ray`: what a command makes, item by item, in the processes of a Ray cluster, by Ray Data.

The command plans as it does alone, and writes all files itself: a process that is killed leaves
nothing behind, and what it worked on is given to another.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import signal
import socket
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.choice import device_name
from pid_runtime.bundle.files import write_whole
from pid_runtime.command import console
from pid_runtime.command.decode_options import whole_number
from pid_runtime.command.images import save_image
from pid_runtime.errors import InputError, PidRuntimeError, memory_shortage

LOCAL = "local"
"""In place of a cluster's address: one of this machine, for as long as the command runs."""

_TRIES = 2
"""How often an actor works on an item before it is reported."""

_DEATHS = 3
"""Actors that may die of one item before it is reported."""

_ANSWER_S = 10.0
"""Seconds until a cluster has answered: Ray waits five minutes, and then ends the process."""

_log = logging.getLogger("pid_runtime")

Save = Callable[[Path, NDArray[np.uint8], Mapping[str, Any] | None], None]
"""Where pictures go: `save_image`, or on a cluster what sends them to the command."""


class Work(Protocol):
    """What an actor holds."""

    def make(self, item: Any, save: Save) -> Any:
        """What the command wants to know of an item; pictures are given to `save`."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of an item."""

    index: int
    """Of the item, in the order in which they were given."""
    made: Any = None
    """What `Work.make` returned."""
    reason: str | None = None
    """Why there is nothing; None if there is."""
    files: Mapping[Path, bytes] = field(default_factory=dict)
    """Pictures, still to be written."""
    notes: tuple[tuple[int, str], ...] = ()
    """What was logged meanwhile: levels and messages."""

    def write(self) -> None:
        """Write the pictures, each whole or not at all. Raises `OSError` when there is no room."""
        for path, content in self.files.items():
            write_whole(path, content)


class Kept:
    """Opens what a command needs and closes it after use, or keeps all of it until the end."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self._parts: dict[str, Any] = {}
        self._opened = contextlib.ExitStack()

    @contextlib.contextmanager
    def part(self, name: str, opener: Callable[[], Any]) -> Generator[Any, None, None]:
        """A part to use in the block; opener: gives its context, if it is not there already."""
        if not self.keeps:
            with opener() as part:
                yield part
            return
        if name not in self._parts:
            self._parts[name] = self._opened.enter_context(opener())
        yield self._parts[name]

    def close(self) -> None:
        """Close what is kept."""
        self._parts.clear()
        self._opened.close()


def add_spread_options(parser: argparse.ArgumentParser) -> None:
    """Whether a command works on a Ray cluster, and with how many actors."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="work on a Ray cluster, or on one of this machine alone",
    )
    parser.add_argument(
        "--actors",
        type=_actors,
        metavar="N",
        help="processes with --ray (default: one for each GPU, on processors for each machine)",
    )


def check_spread(arguments: Namespace) -> None:
    """Raise `PidRuntimeError` for options that do not belong together, or no package for them."""
    if arguments.ray is None:
        if arguments.actors is not None:
            raise PidRuntimeError("expected --ray with --actors, but got none; add it, or drop it")
        return
    console.need_packages(("ray", "pyarrow", "pandas"), "ray")


def spread(
    arguments: Namespace,
    label: str,
    work: Callable[[Namespace], Work],
    items: Sequence[Any],
    warnings: Sequence[str] = (),
) -> Generator[Outcome, None, None]:
    """What came of each item, once, in the order in which it came; their notes are logged.

    arguments: of a command with `add_spread_options`, `--backend`, `--device` and `--threads`.
    work: opens what makes the items, in each actor once, given `arguments` as they are there; it
    and the items must be picklable. warnings: of the items, told once the cluster is there.
    Raises `PidRuntimeError` when the cluster cannot be had, or has no room.
    """
    if not items:
        return
    told: set[str] = set()

    def tell(notes: Iterable[tuple[int, str]]) -> None:
        for level, text in notes:
            if text not in told:
                told.add(text)
                _log.log(level, "%s", text)

    def ready() -> None:
        tell((logging.WARNING, text) for text in warnings)

    with (
        console.progress(label, len(items), quiet=arguments.quiet) as advance,
        contextlib.closing(_by_ray(arguments, work, items, ready)) as outcomes,
    ):
        for outcome in complete(outcomes, len(items)):
            tell(outcome.notes)
            yield outcome
            advance(1)


def complete(outcomes: Iterable[Outcome], count: int) -> Generator[Outcome, None, None]:
    """Every item's outcome once: of what never came, that it did not."""
    left = set(range(count))
    for outcome in outcomes:
        if outcome.index in left:
            left.remove(outcome.index)
            yield outcome
    for index in sorted(left):
        yield Outcome(
            index, reason="every actor that took it died, of a crash or too little memory"
        )


class Actor:
    """Works on one item after another, and keeps what it has opened."""

    def __init__(self, opener: Callable[[], Work], folder: str) -> None:
        """folder: that of the command, in which names of files are meant."""
        self._opener, self._folder = opener, folder
        self._work: Work | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of one item as Ray Data has it: pickled, as is what comes of it."""
        index, item = pickle.loads(batch["item"][0])
        return {"outcome": [pickle.dumps(self.outcome(index, item))]}

    def outcome(self, index: int, item: Any) -> Outcome:
        """What comes of an item, which is tried again if it fails.

        All is opened anew before that, unless the item is at fault.
        """
        notes: list[tuple[int, str]] = []
        reason = ""
        with _noting(notes):
            for _ in range(_TRIES):
                files: dict[Path, bytes] = {}

                def save(
                    path: Path,
                    pixels: NDArray[np.uint8],
                    record: Mapping[str, Any] | None,
                    files: dict[Path, bytes] = files,
                ) -> None:
                    files[path] = _encoded(path, pixels, record)

                try:
                    made = self._opened().make(item, save)
                except Exception as error:  # noqa: BLE001  the command tells it
                    reason = _reason(error)
                    if not isinstance(error, InputError) or memory_shortage(error):
                        self.close()
                else:
                    return Outcome(index, made, None, files, tuple(notes))
        return Outcome(index, reason=reason, notes=tuple(notes))

    def close(self) -> None:
        """Close what it has opened; the next item opens it again."""
        work, self._work = self._work, None
        if work is not None:
            work.close()

    def _opened(self) -> Work:
        if self._work is None:
            try:
                os.chdir(self._folder)
            except OSError as error:
                raise PidRuntimeError(
                    f"expected the folder {self._folder} on every machine of the cluster, but got: "
                    f"{error.strerror}; use one that they share"
                ) from None
            self._work = self._opener()
        return self._work


@dataclass(frozen=True)
class Room:
    """What actors take of a cluster."""

    actors: int
    cpus: int
    """Of each."""
    gpus: int
    """Of each."""


def plan_room(
    nodes: Sequence[tuple[int, int]], actors: int | None, threads: int | None, *, on_gpu: bool
) -> Room:
    """Where actors go; nodes: processors and GPUs of each machine. None for what nobody asked.

    Raises `PidRuntimeError` when there is no room for them.
    """
    if on_gpu:
        has = sum(gpus for _, gpus in nodes)
        if not has or (actors or 0) > has:
            raise PidRuntimeError(
                f"expected {actors or 1} GPUs in the Ray cluster, but it has {has}; give fewer "
                "--actors, or --device cpu"
            )
        return Room(actors or has, 1, 1)
    wanted = actors or len(nodes)
    each = math.ceil(wanted / len(nodes))
    # Ray itself needs a processor.
    need = threads or max(1, (min(cpus for cpus, _ in nodes) - 1) // each)
    has = sum(cpus // need for cpus, _ in nodes)
    if wanted > has:
        raise PidRuntimeError(
            f"expected room for {wanted} actors of {need} processors in the Ray cluster, but it "
            f"has room for {has}; give other --actors and --threads"
        )
    return Room(wanted, need, 0)


def connect(address: str) -> None:
    """Join a Ray cluster, or start one of this machine for `LOCAL`; signals stay as they are.

    Raises `PidRuntimeError` for a cluster that does not answer.
    """
    import ray  # pyright: ignore[reportMissingImports]

    own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _check_answers(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, SystemExit) as error:
        reason = str(error).partition("\n")[0][:200]
        raise PidRuntimeError(
            f"expected a Ray cluster at {address}, but got: {reason}; ray status says more"
        ) from None
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)  # Ray's would abort


def _check_answers(address: str) -> None:
    """Raise `OSError` if nobody listens at an address of host and port."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()


def _by_ray(
    arguments: Namespace,
    work: Callable[[Namespace], Work],
    items: Sequence[Any],
    ready: Callable[[], object],
) -> Generator[Outcome, None, None]:
    import ray  # pyright: ignore[reportMissingImports]

    # It tells on stdout, which is for results, that an actor died.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            connect(arguments.ray)
            import ray.data  # pyright: ignore[reportMissingImports]

            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            nodes = [
                (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
                for node in ray.nodes()
                if node["Alive"]
            ]
            on_gpu = device_name(arguments.backend, arguments.device).startswith("cuda")
            room = plan_room(
                [node for node in nodes if node[0]],
                arguments.actors,
                arguments.threads,
                on_gpu=on_gpu,
            )
            ready()
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.max_errored_blocks = -1  # whose items `complete` reports
            opener = _Opener(work, _for_actor(arguments, room))
            rows = [{"item": pickle.dumps(numbered)} for numbered in enumerate(items)]
            given = ray.data.from_items(rows, override_num_blocks=len(rows))
            # One item at a time for each actor, so that none dies of another.
            pool = ray.data.ActorPoolStrategy(
                size=min(room.actors, len(rows)), max_tasks_in_flight_per_actor=1
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of _retries, which Ray 2.64 will not have
                made = given.map_batches(
                    Actor,
                    fn_constructor_args=(opener, str(Path.cwd())),
                    batch_size=1,
                    compute=pool,
                    num_cpus=room.cpus,
                    num_gpus=room.gpus,
                    ray_remote_args_fn=_retries,
                )
            for row in made.iter_rows():
                yield pickle.loads(row["outcome"])
        except ray.exceptions.RayError as error:
            raise PidRuntimeError(
                f"expected the Ray cluster to work to the end, but got: {_reason(error)}; run it "
                "again with --skip-existing"
            ) from error
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class _Opener:
    work: Callable[[Namespace], Work]
    arguments: Namespace

    def __call__(self) -> Work:
        return self.work(self.arguments)


def _retries() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": _DEATHS - 1}


def _for_actor(arguments: Namespace, room: Room) -> Namespace:
    """The arguments of a command as they are where an actor runs."""
    changed: dict[str, Any] = {"quiet": True}
    if room.gpus:
        changed["device"] = "cuda:0"  # Ray shows every actor its own GPU only
    elif arguments.threads is None:
        changed["threads"] = room.cpus
    return Namespace(**{**vars(arguments), **changed})


@contextlib.contextmanager
def _noting(notes: list[tuple[int, str]]) -> Generator[None, None, None]:
    """Collect what our own loggers say, in place of whoever printed it."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("pid_"):
                notes.append((record.levelno, record.getMessage()))

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers[:] = [Collector()]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _encoded(path: Path, pixels: NDArray[np.uint8], record: Mapping[str, Any] | None) -> bytes:
    """What `save_image` would write."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        save_image(file, pixels, record)
        return file.read_bytes()


def _reason(error: Exception) -> str:
    """In one line, why there is nothing."""
    shortage = memory_shortage(error)
    if shortage is not None:
        return f"expected enough memory, but got {shortage}"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (InputError, OSError)) else f"{type(error).__name__}: {text}"


def _actors(text: str) -> int:
    return whole_number(text, 1, 4096, "4096")
