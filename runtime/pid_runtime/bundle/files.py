"""Files: their hashes, and how they are written whole or not at all."""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Generator
from glob import escape
from pathlib import Path

from pid_runtime.errors import PidRuntimeError

NAME_KEPT = 40
"""Characters of a file's name that the name it has while it is written begins with."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal. Raises `PidRuntimeError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise PidRuntimeError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file, text as UTF-8, as `whole_file` does."""
    with whole_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[Path, None, None]:
    """The path of a file to write, beside `path`, whose name it takes when the block ends well.

    An existing file is replaced, and its permissions are kept. What a process that was killed left
    of the same file is removed first. Raises `OSError` when there is no writing.
    """
    remove_left(path)
    aside = path.with_name(partial_name(path, secrets.token_hex(4)))
    try:
        yield aside
        with contextlib.suppress(FileNotFoundError):
            aside.chmod(stat.S_IMODE(path.stat().st_mode))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def partial_name(path: Path, token: str) -> str:
    """What a file or folder is called while this process writes it."""
    return f".{path.name[:NAME_KEPT]}.{os.getpid()}.{token}.partial"


def left_behind(path: Path) -> list[Path]:
    """What processes that do not run any more left of a file or folder they were writing."""
    pattern = f".{escape(path.name[:NAME_KEPT])}.*.partial"
    return [left for left in path.parent.glob(pattern) if not _alive(left)]


def remove_left(path: Path) -> None:
    """Remove the files of `left_behind`."""
    for left in left_behind(path):
        with contextlib.suppress(OSError):
            left.unlink()


def _alive(partial: Path) -> bool:
    """Whether the process that writes this still runs."""
    pid = partial.name.split(".")[-3]
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no number of a process
        return True
    return True
