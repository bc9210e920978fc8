"""Caption embeddings that were computed once, kept on disk for any number of processes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pid_runtime.bundle.files import write_whole
from pid_runtime.command.latent_files import open_caption_file
from pid_runtime.errors import PidRuntimeError

FOLDER_VARIABLE = "PID_CAPTION_CACHE"
"""Environment variable with another folder for the cache."""

MOST_BYTES = 2_000_000_000
"""Size the cache is kept below: some 1,400 captions of 300 tokens in bf16."""

CAPTION = "caption"
"""Name of the tensor in an entry, which is a caption file like any other."""


def default_folder() -> Path:
    """Where captions are kept: `$PID_CAPTION_CACHE`, or pid-trt/captions in the user's cache."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pid-trt" / "captions"


class CaptionCache:
    """Embeddings by what they were made from. What was not used for longest goes first."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        """folder: `default_folder` when None; it is made when something is kept."""
        self.folder = folder or default_folder()
        self._most_bytes = most_bytes

    def get(self, key: Mapping[str, Any]) -> NDArray[np.float32] | None:
        """An embedding `[T, D]`, float32; None when it is not there."""
        path = self._path(key)
        try:
            found = open_caption_file(path, CAPTION).read()[0]
        except (PidRuntimeError, OSError):  # not there, just removed or broken: made again
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return found

    def put(self, key: Mapping[str, Any], caption: NDArray[Any]) -> None:
        """Keep an embedding in its own precision. Raises `OSError` when there is no writing."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {name: str(value) for name, value in key.items()}
        write_whole(path, save({CAPTION: np.ascontiguousarray(caption)}, texts))
        self._shrink(keep=path)

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _shrink(self, keep: Path) -> None:
        """Remove what was not used for longest until the rest is small enough."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process removes as well
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most_bytes:
                return
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size
