"""A process that is driven by another one in lines of JSON: the one protocol, and both its sides.

The parent writes a request to the child's stdin, and reads from its stdout any number of lines
{"progress": part done, of 1}, and then the answer: one line, {"error": "one line", ..} for a
request that failed. What the child's libraries print goes to stderr. It ends after an error, and
when its stdin does.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

PartDone = Callable[[float], None]
"""Takes how much of a request has been done, of 1."""

Answer = Callable[[dict[str, Any], PartDone], Mapping[str, Any]]
"""Does what a request says, in the child. A mapping with "error" is its last one."""


class ChildError(Exception):
    """A request failed: the child said so, or ended without an answer. The message is one line."""

    def __init__(self, message: str, said: Mapping[str, Any] | None = None, code: int = 0) -> None:
        super().__init__(message)
        self.said = dict(said or {})
        """The child's answer; empty if it gave none."""
        self.killed = code == -signal.SIGKILL
        """Whether it was killed, as it is when it takes more memory than there is."""


class Child:
    """A child as its parent sees it; a context manager that kills it in the end."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a command.

        log: file for its stderr; None for a temporary one, as errors show its last line.
        environment: variables it gets besides those of this process.
        """
        self._log = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **(environment or {})},
            )
        except BaseException:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def ask(
        self, request: Mapping[str, Any], progress: PartDone = lambda done: None
    ) -> dict[str, Any]:
        """The answer to a request. Raises `ChildError` when that is an error, or none comes."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise ChildError(message["error"], message)
            if "progress" not in message:
                return message
            progress(message["progress"])
        raise self._death()

    def end(self) -> None:
        """Let it end, as it has nothing more to do. Raises `ChildError` if it ends badly."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._death()

    def kill(self) -> None:
        """End it at once; may be called from another thread."""
        self._process.kill()

    def _death(self) -> ChildError:
        """Why it ended without a word."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            message = "killed, as happens when the machine runs out of memory"
        elif code < 0:
            message = f"crashed ({signal.Signals(-code).name})"
        else:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            message = f"ended with code {code}: {last}"[:300]
        return ChildError(message, code=code)


class Children:
    """Children that run at the same time, in threads of the parent, and can be killed together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Child] = set()
        self._killed = False

    @contextlib.contextmanager
    def start(
        self, command: Sequence[str | Path], *, log: Path | None = None
    ) -> Generator[Child, None, None]:
        """One more child. Raises `ChildError` when they have been killed."""
        with self._lock:
            if self._killed:
                raise ChildError("not started, as others have failed")
            child = Child(command, log=log)
            self._running.add(child)
        try:
            with child:
                yield child
        finally:
            with self._lock:
                self._running.discard(child)

    def kill(self) -> None:
        """Kill all, and let none begin."""
        with self._lock:
            self._killed = True
            for child in self._running:
                child.kill()


def serve(answer: Answer) -> int:
    """Answer requests until there are no more, in the child; returns its exit code.

    What `answer` raises ends the child with a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent decides, and kills us
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not come between our lines
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # nor after the last words of a death

    def send(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    for line in sys.stdin:
        message = answer(json.loads(line), lambda done: send({"progress": done}))
        send(message)
        if "error" in message:
            return 1
    return 0
