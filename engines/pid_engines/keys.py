"""Keys of engines: by them the builder knows which are there already."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pid_runtime.bundle.engines import Engine, EngineSet, Profile
from pid_runtime.bundle.manifest import Manifest


def engine_key(
    manifest: Manifest,
    graph: str,
    *,
    flavor: str,
    version: str,
    targets: Sequence[str],
    flags: Mapping[str, Any],
    profiles: Sequence[Profile],
    bf16_island: bool,
) -> str:
    """What identifies an engine: SHA-256, as hexadecimal, of all it is built from.

    That is the graph's ONNX file and weights as the manifest has them, and the arguments, as JSON
    with sorted names and without spaces. The order of targets does not matter.
    """
    described = manifest.graphs[graph]
    parts = {
        "graph_sha256": manifest.files[described.file].sha256,
        "weights_sha256": described.weights_sha256,
        "precision": manifest.precision,
        "flavor": flavor,
        "version": version,
        "targets": sorted(targets),
        "flags": dict(flags),
        "profiles": [{name: list(sizes) for name, sizes in each.items()} for each in profiles],
        "bf16_island": bf16_island,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded_key(manifest: Manifest, graph: str, engine_set: EngineSet, engine: Engine) -> str:
    """The key of what the manifest says of an engine: not `engine.key` if it was edited since."""
    return engine_key(
        manifest,
        graph,
        flavor=engine_set.flavor,
        version=engine_set.version,
        targets=engine_set.targets,
        flags=engine_set.flags,
        profiles=engine.profiles,
        bf16_island=engine.bf16_island,
    )
