"""Bundles with other weights, whose manifests agree with them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fields = dict[str, Any]
Change = Callable[[NDArray[np.float32]], object]


def alter(bundle: Path, folder: Path, changes: Mapping[str, Change]) -> Path:
    """A copy with changed tensors, and a manifest that agrees with them."""
    copy = folder / "altered"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    file, path = copy / "weights.safetensors", copy / "manifest.json"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header: Fields = json.loads(content[8:start])
    manifest: Fields = json.loads(path.read_text())
    for tensor, change in changes.items():
        begin, end = header[tensor]["data_offsets"]
        values = np.frombuffer(content, np.float32, (end - begin) // 4, start + begin)
        before = values.copy()
        change(values.reshape(header[tensor]["shape"]))
        assert not np.array_equal(values, before), f"nothing changed in {tensor}"
    for name, tensors in tensors_of(bundle).items():
        digest = hashlib.sha256()
        for tensor in tensors:
            begin, end = header[tensor]["data_offsets"]
            digest.update(content[start + begin : start + end])
        manifest["graphs"][name]["weights_sha256"] = digest.hexdigest()
    manifest["files"][file.name]["sha256"] = hashlib.sha256(content).hexdigest()
    file.write_bytes(content)
    path.write_text(json.dumps(manifest))
    return copy


def tensors_of(bundle: Path) -> dict[str, list[str]]:
    """Names of the tensors of every graph that has some."""
    with (bundle / "weights.safetensors").open("rb") as file:
        header: Fields = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    tensors = {name: [key for key in header if key.startswith(f"{name}.")] for name in graphs}
    return {name: keys for name, keys in tensors.items() if keys}
