"""What every command line shares, seen from outside: exit codes, stdout and stderr."""

import contextlib
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable

import pytest

from pid_runtime.command import console
from pid_runtime.errors import PidRuntimeError

EXAMPLES = """examples:
  pid-try 3
    two lines, kept"""


def parser() -> console.ArgumentParser:
    built = console.ArgumentParser("pid-try", "Tries things.", EXAMPLES)
    built.add_argument("count", type=int, nargs="?", default=0)
    return built


def run(body: Callable[[Namespace], int | None], *arguments: str) -> int:
    return console.run(parser(), body, arguments)


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def body(_: Namespace) -> int:
        raise error

    return body


def test_exit_code_is_what_the_command_returns() -> None:
    assert run(lambda arguments: arguments.count, "3") == 3
    assert run(lambda _: None) == 0


def test_help_says_defaults_in_one_way() -> None:
    built = parser()
    built.add_argument("--seed", type=int, default=7, help="of the noise")
    built.add_argument("--threads", type=int, help="on the CPU (default: all cores)")
    built.add_argument("--overwrite", action="store_true", help="replace")
    text = " ".join(built.format_help().split())
    assert "of the noise (default: 7)" in text
    assert "on the CPU (default: all cores) --overwrite replace" in text


def test_a_package_that_is_missing_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = raising(ModuleNotFoundError("No module named 'onnx.checker'", name="onnx.checker"))
    assert console.run(parser(), missing, [], extra="export") == 2
    assert capsys.readouterr().err == (
        "pid-try: expected the package 'onnx', but it is not installed; "
        "pip install 'pid-trt[export]'\n"
    )
    missing = raising(ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"))
    assert console.run(parser(), missing, []) == 2
    assert "'pid-trt[cpu]', or on a machine with an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a bug of ours
        console.run(parser(), raising(ModuleNotFoundError(name="pid_runtime.no")), [], extra="x")


def test_bad_input_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(PidRuntimeError("expected A, but got B"))) == 2
    assert capsys.readouterr() == ("", "pid-try: expected A, but got B\n")


@pytest.mark.parametrize("arguments", [["x"], ["--no-such-option"], ["1", "2"], ["--qui"]])
def test_wrong_arguments_are_one_line_and_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda _: 0, *arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pid-try: ")
    assert err.endswith("; try pid-try --help\n")
    assert err.count("\n") == 1


def test_help_keeps_examples_and_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            run(lambda _: 0, option)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert EXAMPLES in out
    assert "pid-try 0." in out.splitlines()[-1]


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        run(raising(ValueError("a bug")))


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(28, "No space left on device", "/out/weights.bin"), "/out/weights.bin"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the output's disk"),
    ],
)
def test_full_disk_is_one_line(
    error: Exception, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == 2
    assert capsys.readouterr().err == (
        f"pid-try: no space left on {where}; free some and run it again\n"
    )


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_memory_that_ran_out_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith("pid-try: expected enough memory, but got too little")
    assert said.endswith("; end other programs, or take a machine with more\n")


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "pid-try: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_changed(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's tracer fails an assertion when a KeyboardInterrupt unwinds it."""

    def body(_: Namespace) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise AssertionError("an empty stack") from None

    assert run(body) == 130
    assert capsys.readouterr().err == "pid-try: interrupted\n"
    with pytest.raises(AssertionError):
        run(raising(AssertionError("a bug")))


def test_an_interrupt_that_a_library_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Python ignores what is raised in a callback of a weak reference."""

    def body(_: Namespace) -> None:
        with console.progress("Trying", 2) as advance:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            advance(1)
            pytest.fail("it went on")

    assert run(body) == 130
    assert capsys.readouterr().err == "pid-try: interrupted\n"


def test_libraries_say_no_more_of_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    class Thing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def body(_: Namespace) -> None:
        thing = Thing()
        del thing  # Python cannot raise from here, and says so
        logging.getLogger("pid_try").error("a fake tensor failed")
        with console.progress("Trying", 1) as advance:
            advance(1)

    assert run(body) == 130
    assert capsys.readouterr().err == "pid-try: interrupted\n"
    run(lambda _: logging.getLogger("pid_try").warning("heard again"))
    assert capsys.readouterr().err == "warning: heard again\n"


def test_notes_and_warnings_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def body(_: Namespace) -> None:
        logging.getLogger("pid_try.part").info("a note")
        logging.getLogger("pid_try").warning("caption %s", "missing")
        logging.getLogger("somebody_else").info("chatter")

    run(body)
    assert capsys.readouterr() == ("", "a note\nwarning: caption missing\n")
    run(body, "--quiet")
    assert capsys.readouterr() == ("", "warning: caption missing\n")


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"files": [{"error": float("nan"), "passed": True}], "times": (1.5, float("inf"))}
    console.emit(result, "one file", as_json=False)
    console.emit(result, "one file", as_json=True)
    text, line = capsys.readouterr().out.splitlines()
    assert text == "one file"
    expected = {"files": [{"error": None, "passed": True}], "times": [1.5, None]}
    assert json.loads(line) == expected


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("Decoding", 4) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def child(code: str, *, stdout: int, stderr: int) -> int:
    """Exit code of a Python child that runs `code` after importing the console."""
    prelude = "import sys, logging\nfrom pid_runtime.command import console\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        check=False,
    ).returncode


def test_progress_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    code = """
        with console.progress("Decoding", 4) as advance:
            for _ in range(4):
                advance(1)
        with console.progress("Hidden", 4, quiet=True) as advance:
            advance(4)
    """
    assert child(code, stdout=subprocess.DEVNULL, stderr=theirs) == 0
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "Decoding" in shown
    assert "100%" in shown
    assert "Hidden" not in shown


def test_a_reader_that_left_is_no_error() -> None:
    reader, writer = os.pipe()
    error_reader, error_writer = os.pipe()
    os.close(reader)
    code = """
        body = lambda _: console.emit({}, "text\\n" * 100_000, as_json=False)
        sys.exit(console.run(console.ArgumentParser("pid-try", ""), body, []))
    """
    assert child(code, stdout=writer, stderr=error_writer) == 141
    os.close(writer)
    os.close(error_writer)
    with os.fdopen(error_reader) as errors:
        assert errors.read() == ""


def test_a_broken_pipe_elsewhere_is_a_bug() -> None:
    with pytest.raises(BrokenPipeError):
        run(raising(BrokenPipeError()))


def test_runtime_console_loads_without_rich() -> None:
    code = "sys.exit(any(name.split('.')[0] == 'rich' for name in sys.modules))"
    assert child(code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
