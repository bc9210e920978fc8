"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pid_export.errors import ExportInputError
from pid_runtime.bundle.files import left_behind


def check_new(output: Path) -> None:
    """Raise `ExportInputError` when there is something at `output` already."""
    try:
        taken = os.path.lexists(output)  # a link that leads nowhere is in the way, too
    except OSError as error:
        raise _unwritable(output, error) from None
    if taken:
        raise ExportInputError(
            f"expected a new folder, but {output} exists already; choose another or remove it"
        )


@contextmanager
def new_folder(output: Path) -> Generator[Path, None, None]:
    """A temporary folder beside `output` that takes its name only when all went well.

    What an export that was killed left there is removed first.
    Raises `ExportInputError` when `output` exists or cannot be made.
    """
    check_new(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in left_behind(output):
            shutil.rmtree(left, ignore_errors=True)
        prefix = f".{output.name}.{os.getpid()}."
        folder = Path(tempfile.mkdtemp(".partial", prefix, output.parent))
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(output)
        except OSError:
            check_new(output)  # somebody else may have finished first
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise `ExportInputError` when `needed` bytes, and a little more, do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise ExportInputError(
            f"expected {needed / 1e9:.2f} GB of free disk for the bundle, but {folder.parent} has "
            f"{free / 1e9:.2f} GB; free some or choose another place with -o"
        )


def _unwritable(output: Path, error: OSError) -> ExportInputError:
    return ExportInputError(
        f"expected to write {output}, but got: {error.strerror}; choose another place with -o"
    )
