"""The protocol of child processes, with a child of every kind."""

import sys
import threading
import time
from pathlib import Path

import pytest

from pid_engines.child import Child, ChildError, Children

CHILD = """
import os, signal, sys, time
from pid_engines.child import serve

def answer(request, progress):
    print("a library's words")
    os.system("echo and those of one in C")
    if "exit" in request:
        print("last words", file=sys.stderr)
        os._exit(request["exit"])
    if "signal" in request:
        os.kill(os.getpid(), request["signal"])
    if "raise" in request:
        raise ValueError(request["raise"])
    if "fail" in request:
        return {"error": request["fail"], "status": "oom"}
    if "sleep" in request:
        progress(0.0)
        time.sleep(request["sleep"])
    for step in range(request.get("steps", 0)):
        progress((step + 1) / request["steps"])
    return {"got": request, "variable": os.environ.get("PID_VARIABLE")}

sys.exit(serve(answer))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "child.py").write_text(CHILD)
    return [sys.executable, str(tmp_path / "child.py")]


def test_answers_and_progress(command: list[str], tmp_path: Path) -> None:
    log, done = tmp_path / "log", list[float]()
    with Child(command, log=log, environment={"PID_VARIABLE": "ü"}) as child:
        answer = child.ask({"steps": 4, "text": "é\n"}, done.append)
        assert answer == {"got": {"steps": 4, "text": "é\n"}, "variable": "ü"}
        assert done == [0.25, 0.5, 0.75, 1.0]
        assert child.ask({})["got"] == {}
        child.end()
    assert "a library's words" in log.read_text() and "and those of one in C" in log.read_text()


@pytest.mark.parametrize(
    ("asked", "message", "killed"),
    [
        ({"signal": 9}, "killed, as happens when the machine runs out of memory", True),
        ({"signal": 11}, "crashed (SIGSEGV)", False),
        ({"exit": 3}, "ended with code 3: last words", False),
        ({"exit": 0}, "ended with code 0: last words", False),
        ({"raise": "out of luck"}, "ended with code 1: ValueError: out of luck", False),
        ({"raise": "x" * 999}, "ended with code 1: ValueError: " + "x" * 269, False),
    ],
)
def test_deaths(command: list[str], asked: dict[str, object], message: str, killed: bool) -> None:
    with Child(command) as child:
        child.ask({})
        with pytest.raises(ChildError) as caught:
            child.ask(asked)
        assert (str(caught.value), caught.value.killed) == (message, killed)
        with pytest.raises(ChildError) as caught:
            child.ask({})
        assert str(caught.value) == message and caught.value.said == {}


def test_an_error_is_the_last_answer(command: list[str]) -> None:
    with Child(command) as child:
        with pytest.raises(ChildError, match="no memory") as caught:
            child.ask({"fail": "no memory"})
        assert caught.value.said["status"] == "oom" and not caught.value.killed
        with pytest.raises(ChildError, match="ended with code 1"):
            child.end()


def test_a_command_that_says_nothing() -> None:
    with Child([sys.executable, "-c", ""]) as child:
        with pytest.raises(ChildError, match="ended with code 0: no message"):
            child.ask({"much": "x" * 1_000_000})
        child.end()
    with pytest.raises(FileNotFoundError):
        Child(["/no/such/program"])


def test_the_block_ends_the_child(command: list[str]) -> None:
    with Child(command) as child:
        child.ask({})
        assert Path(f"/proc/{child.pid}").exists()
    assert not Path(f"/proc/{child.pid}").exists()


def test_children_are_killed_together(command: list[str]) -> None:
    children, began, errors = Children(), threading.Barrier(3), list[ChildError]()

    def ready(done: float) -> None:
        began.wait()

    def wait() -> None:
        with children.start(command) as child:
            try:
                child.ask({"sleep": 600}, ready)
            except ChildError as error:
                errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    began.wait(60)
    begin = time.monotonic()
    children.kill()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and all(error.killed for error in errors)
    assert time.monotonic() - begin < 60
    with pytest.raises(ChildError, match="not started"), children.start(command):
        pass
