"""A session of `pid_serve.pool` without a decoder, whose tasks are words that say what to do; and
one that encodes prompts without a language model.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.errors import PidRuntimeError
from pid_serve.sessions import CaptionTask


@dataclass(frozen=True)
class OpenFake:
    """Opens a session, unless a file is there."""

    unless: Path | None = None

    def __call__(self) -> "FakeSession":
        if self.unless is not None and self.unless.exists():
            raise PidRuntimeError("expected no file, but got one; remove it")
        return FakeSession()


class FakeSession:
    """Gives each task with how many came at once."""

    def __init__(self) -> None:
        self.about = "a fake"

    def run(
        self, tasks: Sequence[str], report: Callable[[Sequence[Any]], None]
    ) -> list[tuple[str, int]]:
        for step in range(3):
            report([f"{task} {step}" for task in tasks])
            if "sleep" in tasks:
                time.sleep(0.3)
            if "stick" in tasks:
                time.sleep(60)
            if "die" in tasks:
                os._exit(7)
            if "refuse" in tasks:
                raise PidRuntimeError("expected another task, but got this; send another")
            if "break" in tasks:
                raise ZeroDivisionError
        return [(task, len(tasks)) for task in tasks]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class OpenWords:
    """Opens an encoder whose embeddings have so many channels."""

    width: int

    def __call__(self) -> "WordsSession":
        return WordsSession(self.width)


class WordsSession:
    """Encodes a prompt by the numbers of its letters."""

    def __init__(self, width: int) -> None:
        self.about = width

    def run(
        self, tasks: Sequence[CaptionTask], report: Callable[[Sequence[Any]], None]
    ) -> list[NDArray[np.float32]]:
        return [
            np.stack([self._encoded(text, task.length) for text in task.texts]) for task in tasks
        ]

    def _encoded(self, text: str, length: int) -> NDArray[np.float32]:
        letters = np.frombuffer(text.encode(), np.uint8) / np.float32(128)
        return np.resize(letters, (length, self.about)).astype(np.float32)

    def close(self) -> None:
        pass
