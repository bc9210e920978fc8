"""Folders of ONNX graphs that stand before the decoder: described, found whole, and opened.

A captioner and a VAE as graphs are such folders: a JSON file, which lists the others.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_runtime.backends.choice import split_device
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.json_reader import read_member


@dataclass(frozen=True)
class GraphFile:
    """A file of such a folder."""

    bytes: int
    sha256: str


class _Description(Protocol):
    @property
    def files(self) -> dict[str, GraphFile]: ...


_Kind = TypeVar("_Kind", bound=_Description)


def files_of(folder: Path, names: Iterable[str]) -> dict[str, GraphFile]:
    """What a description says of files."""
    return {
        name: GraphFile((folder / name).stat().st_size, file_sha256(folder / name))
        for name in names
    }


def read_description(kind: type[_Kind], path: Path, major: int, what: str, option: str) -> _Kind:
    """A description, of this major format version; its files are looked for, and not yet read.

    what: it is of, in words. option: of pid-export that makes it.
    Raises `PipelineInputError` for one of another format, or a file that is not there or cut.
    """
    try:
        raw: Any = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict) or raw.get("format_version", [0])[0] != major:
            raise ValueError(f"it is not of format {major}")
        description = read_member(kind, raw, path.name)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise PipelineInputError(
            f"expected {what}, as pid-export {option} makes it, but cannot read {path}: {error}; "
            "export it again"
        ) from None
    for name, file in description.files.items():
        found = path.parent / name
        size = found.stat().st_size if found.is_file() else None
        if size != file.bytes:
            got = "it is missing" if size is None else f"it has {size}"
            raise PipelineInputError(
                f"expected {file.bytes} bytes in {found}, but {got}; export it again"
            )
    return description


def check_unaltered(folder: Path, files: Mapping[str, GraphFile], names: Iterable[str]) -> None:
    """Raise `PipelineInputError` for the first of these files that is not as it was exported."""
    for name in names:
        if file_sha256(folder / name) != files[name].sha256:
            raise PipelineInputError(
                f"expected {folder} as it was exported, but {name} was altered; export it again"
            )


class Graphs:
    """Graphs of such a folder in ONNX Runtime, opened when first run."""

    def __init__(self, folder: Path, files: Mapping[str, GraphFile], device: str) -> None:
        """device: cpu, cuda or cuda:N, or a provider of ONNX Runtime."""
        self._folder, self._files, self._device = folder, files, device
        self._sessions: dict[str, Any] = {}

    def run(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The one output of a graph, by the name of its file.

        Raises `PipelineInputError` for files that were altered, and `PidRuntimeError` for a
        provider that is not there.
        """
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        (output,) = self._sessions[name].run(None, dict(inputs))
        return np.asarray(output, np.float32)

    def _open(self, name: str) -> Any:
        from pid_runtime.backends.onnxruntime import find_provider, open_session

        own = [each for each in self._files if each.startswith(name)]  # weights lie beside
        check_unaltered(self._folder, self._files, own)
        provider, device_id = split_device(self._device)
        return open_session(self._folder / name, find_provider(provider), device_id)

    def close(self) -> None:
        """Give the memory back that the graphs are and work in."""
        if self._sessions:
            from pid_runtime.backends import scratch

            self._sessions.clear()
            scratch.give_back()
