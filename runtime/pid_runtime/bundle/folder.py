"""A bundle's folder: its manifest, read and checked, its files, and the constants in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.bundle.manifest import (
    FORMAT,
    FORMAT_VERSIONS,
    MANIFEST_FILE,
    SPECIAL,
    WEIGHTS_FILE,
    Manifest,
)
from pid_runtime.bundle.manifest_check import check_manifest
from pid_runtime.bundle.source import Constant
from pid_runtime.errors import PidRuntimeError

MANIFEST_MAX_BYTES = 1 << 24


def parse_manifest(text: str) -> Manifest:
    """Read and check manifest.json. Raises `PidRuntimeError` when it is not one we can run."""
    try:
        raw: Any = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PidRuntimeError(f"expected {MANIFEST_FILE} to be JSON, but got {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PidRuntimeError(f"expected a {FORMAT} manifest, but {MANIFEST_FILE} is none")
    version = read_member(tuple[int, ...], raw.get("format_version"), "format_version")
    if len(version) != 2 or version[0] not in [major for major, _ in FORMAT_VERSIONS]:
        known = " or ".join(f"{major}.x" for major, _ in FORMAT_VERSIONS)
        raise PidRuntimeError(
            f"expected bundle format {known}, but got version {'.'.join(map(str, version))}; "
            "update pid-trt, or export the bundle again with this version"
        )
    manifest: Manifest = read_member(Manifest, raw, MANIFEST_FILE, SPECIAL)
    check_manifest(manifest)
    return manifest


def read_manifest(bundle: Path, verify: bool = True) -> Manifest:
    """Read a bundle's manifest and check its files.

    verify: hash every file (about a second per 2 GB); otherwise only their sizes are compared.
    Raises `PidRuntimeError` for a missing, altered or newer bundle.
    """
    path = bundle / MANIFEST_FILE
    try:
        with path.open("rb") as stream:
            text = stream.read(MANIFEST_MAX_BYTES + 1)
        if len(text) > MANIFEST_MAX_BYTES:
            raise PidRuntimeError(f"expected {path} to have at most {MANIFEST_MAX_BYTES} bytes")
        manifest = parse_manifest(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise PidRuntimeError(
            f"expected a bundle (a folder with {MANIFEST_FILE}), but cannot read {path}: {error}"
        ) from None
    check_files(bundle, manifest, verify)
    return manifest


def check_files(bundle: Path, manifest: Manifest, verify: bool = True) -> None:
    """Raise `PidRuntimeError` for files that are missing or not what the manifest says.

    verify: hash them; otherwise only their sizes are compared.
    """
    for name, file in manifest.files.items():
        part = bundle / name
        if not part.is_file():
            raise PidRuntimeError(f"{bundle} has no file {name}; export or copy the bundle again")
        size = part.stat().st_size
        if size != file.bytes:
            raise PidRuntimeError(
                f"expected {part} to have {file.bytes} bytes, but it has {size}; "
                "export or copy the bundle again"
            )
        if verify and file_sha256(part) != file.sha256:
            raise PidRuntimeError(
                f"{part} was altered: its SHA-256 is not the manifest's; "
                "export or copy the bundle again"
            )


def read_constants(bundle: Path, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Values of the buffers of kind "constant", float32, by buffer.

    Raises `PidRuntimeError` when the weights file lacks one or holds it in another shape.
    """
    constants: dict[str, NDArray[np.float32]] = {}
    try:
        with safe_open(bundle / WEIGHTS_FILE, "np") as weights:
            for name, buffer in manifest.buffers.items():
                if isinstance(buffer.source, Constant):
                    constants[name] = weights.get_tensor(buffer.source.tensor)
    except (OSError, SafetensorError, TypeError) as error:
        raise PidRuntimeError(f"cannot read constants from {WEIGHTS_FILE}: {error}") from None
    for name, values in constants.items():
        shape = manifest.buffers[name].shape
        if values.dtype != np.float32 or values.shape != shape:
            raise PidRuntimeError(
                f"expected constant {name!r} in {WEIGHTS_FILE} to be float32 of shape {shape}, but "
                f"got {values.dtype} {values.shape}"
            )
    return constants


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number")
