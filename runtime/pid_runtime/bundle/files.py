"""Files: their hashes, and how they and folders of them are written whole or not at all."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Generator
from glob import escape
from pathlib import Path

from pid_runtime.errors import PidRuntimeError

NAME_KEPT = 40
"""Characters of a name that the one a file or folder has while it is written begins with."""


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
    aside = _aside(path)
    try:
        yield aside
        with contextlib.suppress(FileNotFoundError):
            aside.chmod(stat.S_IMODE(path.stat().st_mode))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Generator[Path, None, None]:
    """A folder on the disk of `path`, to be removed when the block ends.

    The folders above it are made. What a process that was killed left of the same is removed first.
    Raises `PidRuntimeError` when there is no writing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        aside.mkdir(0o700)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Generator[Path, None, None]:
    """A folder to fill, beside `path`, whose name it takes when the block ends well.

    As `folder_beside`. Raises `PidRuntimeError` when there is something at `path` already, too.
    """
    check_new(path)
    with folder_beside(path) as aside:
        yield aside
        aside.chmod(0o755)
        try:
            aside.rename(path)
        except OSError:
            check_new(path)  # somebody else may have finished first
            raise


def check_new(folder: Path) -> None:
    """Raise `PidRuntimeError` when there is something at `folder` already."""
    try:
        taken = os.path.lexists(folder)  # a link that leads nowhere is in the way, too
    except OSError as error:
        raise _unwritable(folder, error) from None
    if taken:
        raise PidRuntimeError(
            f"expected a new folder, but {folder} exists already; choose another or remove it"
        )


def check_space(folder: Path, needed: int, what: str, otherwise: str) -> None:
    """Raise `PidRuntimeError` when the disk of `folder` has not `needed` bytes for `what`.

    otherwise: what to do if no space can be made.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PidRuntimeError(
            f"expected {needed / 1e9:.2f} GB of free disk for {what}, but {folder} has "
            f"{free / 1e9:.2f} GB; free some or {otherwise}"
        )


def partial_name(path: Path, token: str) -> str:
    """What a file or folder is called while this process writes it."""
    return f".{path.name[:NAME_KEPT]}.{os.getpid()}.{token}.partial"


def _aside(path: Path) -> Path:
    """A name to write `path` by; what processes that run no more left of it is removed."""
    for left in path.parent.glob(f".{escape(path.name[:NAME_KEPT])}.*.partial"):
        if left.is_dir() and not _alive(left):
            shutil.rmtree(left, ignore_errors=True)
        elif not _alive(left):
            with contextlib.suppress(OSError):
                left.unlink()
    return path.with_name(partial_name(path, secrets.token_hex(4)))


def _unwritable(folder: Path, error: OSError) -> PidRuntimeError:
    return PidRuntimeError(
        f"expected to write {folder}, but got: {error.strerror}; choose another place with -o"
    )


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
