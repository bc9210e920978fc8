"""What every command line of pid-trt shares: arguments, errors, progress, notes and results.

A command is a parser and a function, and its entry point is one line:

    def main(argv: Sequence[str] | None = None) -> int:
        return console.run(_parser(), _decode, argv)

Results go to stdout by `emit`, everything else to stderr. Exit codes: what the function returns
(0 for None), 2 for bad input, 130 when interrupted; a bug keeps its traceback.
"""

import argparse
import contextlib
import errno
import importlib.util
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn

import argcomplete

from pid_runtime import __version__
from pid_runtime.backends.choice import INSTALL_ONNXRUNTIME
from pid_runtime.command.entry import INTERRUPTED
from pid_runtime.errors import InputError, PidRuntimeError, memory_shortage

BAD_INPUT, BROKEN_PIPE = 2, 141
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

_interrupted = threading.Event()
"""Set by Ctrl-C and SIGTERM, as the exception they raise may be lost or changed in a library."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default to its help, where there is one and the help has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        is_plain = isinstance(action.default, str | int | float) and action.default is not False
        if action.default == argparse.SUPPRESS or not is_plain or "(default: " in text:
            return text
        return f"{text} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the options every command has.

    These are `--version`, `--quiet` (no progress, no notes) and `--json` (the result as JSON).
    `examples` is printed as it is below the options.
    """

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        super().__init__(
            prog,
            description=description,
            epilog=examples,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")
        self.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
        self.add_argument("--json", action="store_true", help="print the result as JSON")

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line and exit with code 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; try {self.prog} --help\n")


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    also: tuple[type[Exception], ...] = (),
    extra: str | None = None,
) -> int:
    """Parse `argv` (the process's arguments when None), call `body`, return the exit code.

    What `body` returns is the code (None is 0). `InputError`, and what is in `also`, are bad input:
    their message is printed after the program's name, without a traceback; and so are a full disk,
    memory that ran out and a missing package, with `extra`, what to install of pid-trt for this
    command.
    Raises `SystemExit` as argparse does for wrong arguments and for `--help`.
    """
    _interrupted.clear()
    logging.disable(logging.NOTSET)
    argcomplete.autocomplete(parser)  # ends the process if a shell asks
    try:
        arguments = parser.parse_args(argv)
        set_up_logging(quiet=getattr(arguments, "quiet", False))
        _unwind_when_interrupted()
        return body(arguments) or 0
    except KeyboardInterrupt:
        return _fail(parser.prog, "interrupted", INTERRUPTED)
    except _ReaderLeftError:
        # What is left in stdout's buffer is flushed at exit, and must not fail again there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if _interrupted.is_set():
            return _fail(parser.prog, "interrupted", INTERRUPTED)
        if _is_no_space(error):
            where = getattr(error, "filename", None) or "the output's disk"
            return _fail(parser.prog, f"no space left on {where}; free some and run it again")
        if isinstance(error, (InputError, *also)):
            return _fail(parser.prog, str(error))
        if (shortage := memory_shortage(error)) is not None:
            fix = "end other programs, or take a machine with more"
            return _fail(parser.prog, f"expected enough memory, but got {shortage}; {fix}")
        if isinstance(error, ModuleNotFoundError) and (missing := _missing(error, extra)):
            return _fail(parser.prog, missing)
        raise


def need_packages(packages: Sequence[str], extra: str) -> None:
    """Raise `PidRuntimeError` for a package that is not installed, naming the extra that has it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise PidRuntimeError(
                f"expected the package {package!r}, but it is not installed; pip install "
                f"'pid-trt[{extra}]'"
            )


def read_size(text: str) -> tuple[int, int]:
    """Width and height, from 0, of text such as "2048x1536"; `PidRuntimeError` for other text."""
    sides = re.fullmatch("([0-9]{1,8})[xX]([0-9]{1,8})", text)
    if sides is None:
        raise PidRuntimeError(f"expected a size such as 512x512, but got {text[:60]!r}")
    return int(sides[1]), int(sides[2])


@contextlib.contextmanager
def progress(
    label: str, total: float | None, *, quiet: bool = False
) -> Generator[Callable[[float], None], None, None]:
    """Show a progress bar on stderr while the block runs; nothing when stderr is no terminal.

    Gives a function to call with how much of `total` (any unit; None when unknown) was done
    since the last call: `with progress("Decoding", 4) as advance: advance(1)`. That raises
    `KeyboardInterrupt` if the first one was lost.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda amount: _check_interrupted()
        return
    from rich.console import Console  # not needed to decode, and slow to load
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)

        def advance(amount: float) -> None:
            _check_interrupted()
            bar.advance(task, amount)

        yield advance


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of as many cells as text: the columns numbered in `left` to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a command's result on stdout: `text` to read, or `result` as one line of JSON.

    In JSON, numbers that are not finite become null: JSON has no name for them. When nobody reads
    stdout any more, `run` ends quietly with exit code 141.
    """
    line = json.dumps(_finite(result), allow_nan=False) if as_json else text
    try:
        sys.stdout.write(line.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise _ReaderLeftError from None


class _ReaderLeftError(BrokenPipeError):
    """Whoever read stdout has seen enough (`pid-verify ... | head`)."""


class _NoteHandler(logging.Handler):
    """Prints the `pid_*` loggers' records on stderr, warnings with the word in front."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.startswith("pid_")

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        # sys.stderr is looked up each time: a progress bar replaces it to stay the last line.
        sys.stderr.write(f"{level}{record.getMessage()}\n")


def set_up_logging(*, quiet: bool) -> None:
    """Print records of our loggers on stderr: warnings, and unless `quiet` notes."""
    root = logging.getLogger()
    if not any(isinstance(handler, _NoteHandler) for handler in root.handlers):
        root.addHandler(_NoteHandler())
    root.setLevel(logging.WARNING if quiet else logging.INFO)


def _unwind_when_interrupted() -> None:
    """Let SIGTERM clean up as Ctrl-C does, and remember either.

    From then on libraries say no more: what they log of the exception is not the user's business,
    nor that a callback of theirs, such as one of a weak reference, lost it.
    """

    def interrupt(*_: object) -> NoReturn:
        _interrupted.set()
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = _unless_interrupted
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGINT, interrupt)


def _unless_interrupted(unraisable: "sys.UnraisableHookArgs") -> None:
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _check_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _fail(prog: str, message: str, code: int = BAD_INPUT) -> int:
    sys.stderr.write(f"{prog}: {message}\n")
    return code


def _missing(error: ModuleNotFoundError, extra: str | None) -> str | None:
    """What to say of a package that is not installed; None for a module of our own."""
    package = (error.name or "").partition(".")[0]
    if package.startswith("pid_"):
        return None
    cure = None if extra is None else f"pip install 'pid-trt[{extra}]'"
    if package == "onnxruntime":
        cure = INSTALL_ONNXRUNTIME
    if cure is None:
        return None
    return f"expected the package {package!r}, but it is not installed; {cure}"


def _is_no_space(error: Exception) -> bool:
    """Whether the disk is full, also by libraries that only say so in words."""
    return getattr(error, "errno", None) in _NO_SPACE or os.strerror(errno.ENOSPC) in str(error)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
