"""What every test has: commands to run, a clean console, and `bundles`."""

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from garbage import pass_over_what_is_there
from ray_nodes import make_ray_python

Main = Callable[[Sequence[str]], int]
RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


def pytest_configure(config: pytest.Config) -> None:
    """Have `bundles`, unless this process only hands out the tests: that needs no torch."""
    hands_out = config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if not hands_out:
        config.pluginmanager.register(importlib.import_module("bundles"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest to make, and go on with what need not wait for it.

    The one is the C++ runtime, of `tests/cpp/test_command.py`, and `golden_bundle`; the other,
    files that use neither: another worker would only wait till they are there. Servers come first
    of these and those: at the end, nothing would be done while their tests wait for them.
    """
    made = {"golden_bundle", "bf16_bundle"}
    waiting = {i.path for i in items if made.intersection(getattr(i, "fixturenames", ()))}

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        path = item.path
        return path.name != "test_command.py", path in waiting, path.parent.name != "serve"

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Have the garbage collector come less often."""
    pass_over_what_is_there()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _pass_over_what_modules_leave() -> Iterator[None]:
    with console_undone():
        yield
    pass_over_what_is_there()


@contextlib.contextmanager
def console_undone() -> Generator[None, None, None]:
    """Commands set up logging and signals for their whole process: undo that."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    disabled, unraisable = root.manager.disable, sys.unraisablehook
    yield
    logging.disable(disabled)
    sys.unraisablehook = unraisable
    root.handlers[:], root.level = handlers, level
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _undo_console() -> Iterator[None]:
    with console_undone():
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that is the same for all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def ray_python(shared_folder: Path) -> Path:
    """A Python with Ray and all that is installed here, made once for all workers of a run."""
    folder = shared_folder / "ray_python"
    with FileLock(shared_folder / "ray_python.lock"):
        return make_ray_python(folder)


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """A function that runs a command's `main` with arguments: exit code, stdout and stderr."""

    def run(main: Main, *arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else -1
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refusal(run_command: RunCommand) -> Refusal:
    """A function that runs a command, which must refuse its input, and gives the one line."""

    def run(main: Main, *arguments: object) -> str:
        code, out, err = run_command(main, *arguments, "--quiet")
        assert (code, out) == (2, ""), err
        assert err.startswith("pid-") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run
