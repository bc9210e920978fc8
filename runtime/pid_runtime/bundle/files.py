"""Files: their hashes."""

import hashlib
from pathlib import Path

from pid_runtime.errors import PidRuntimeError


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
