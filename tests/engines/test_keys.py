"""Keys of engines, and what they depend on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pid_engines.keys import engine_key
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest


@pytest.fixture
def manifest(golden_bundle: Path) -> Manifest:
    return read_manifest(golden_bundle, verify=False)


def test_a_key_depends_on_all_it_is_built_from(manifest: Manifest) -> None:
    def key(manifest: Manifest = manifest, graph: str = "image.0", **changes: Any) -> str:
        arguments: dict[str, Any] = {
            "flavor": "tensorrt-rtx",
            "version": "1.7.1.116",
            "targets": ("sm86", "sm89"),
            "flags": {"opt_level": 3},
            "profiles": ({"L": (1, 2, 3)},),
            "bf16_island": False,
        }
        return engine_key(manifest, graph, **{**arguments, **changes})

    described = manifest.graphs["image.0"]
    file = manifest.files[described.file]
    graph = replace(manifest, files={**manifest.files, described.file: replace(file, sha256="0")})
    reweighed = {**manifest.graphs, "image.0": replace(described, weights_sha256="0")}
    keys = [
        key(),
        key(graph),
        key(replace(manifest, graphs=reweighed)),
        key(replace(manifest, precision="bf16")),
        key(flavor="tensorrt"),
        key(version="1.7.1.117"),
        key(targets=("sm86",)),
        key(flags={"opt_level": 2}),
        key(profiles=({"L": (1, 2, 4)},)),
        key(profiles=({"L": (1, 2, 3)}, {"L": (3, 3, 3)})),
        key(bf16_island=True),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 64 for each in keys)
    assert key(targets=("sm89", "sm86")) == key(profiles=[{"L": [1, 2, 3]}]) == keys[0]


def test_a_key_never_changes(manifest: Manifest) -> None:
    """Or engines that are there would be built again."""
    graph = manifest.graphs["image.0"]
    file = replace(manifest.files[graph.file], sha256="1" * 64)
    manifest = replace(
        manifest,
        files={**manifest.files, graph.file: file},
        graphs={**manifest.graphs, "image.0": replace(graph, weights_sha256="2" * 64)},
    )
    key = engine_key(
        manifest,
        "image.0",
        flavor="tensorrt-rtx",
        version="1.7.1.116",
        targets=("sm89", "sm86"),
        flags={"opt_level": 3, "workspace_bytes": 0, "user_allocation": True},
        profiles=({"L": (1, 2, 3)}, {"L": (4, 5, 6)}),
        bf16_island=True,
    )
    assert key == "07922e4c757298c4cc122e21117ff2f57335c075310c1b04dc57971f829c1f2e"
