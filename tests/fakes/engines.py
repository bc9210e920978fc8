"""Engines that nothing built."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from lean_bundles import in_slices, lean
from pid_engines.keys import engine_key
from pid_runtime.bundle.engines import (
    Engine,
    EngineBucket,
    EngineSet,
    Profile,
    engine_folder,
    with_engine_sets,
)
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest

VERSION = "1.7.1.116"
"""Of TensorRT for RTX."""


def add_engines(
    bundle: Path,
    name: str,
    *,
    flavor: str = "tensorrt-rtx",
    version: str = VERSION,
    targets: tuple[str, ...] = ("sm86", "sm89"),
    scratch_bytes: int = 4096,
    peak_device_bytes: int = 1 << 20,
    is_lean: bool = False,
) -> EngineSet:
    """Add a set of engines, which nothing built, to a bundle; `fakes.gpu` runs them.

    There is one per graph, but one per bucket of a graph without weights. is_lean: with a program
    of its own, in slices of 5 tokens.
    """
    manifest = read_manifest(bundle, verify=False)
    run = lean(in_slices(manifest, 5)) if is_lean else manifest
    folder = engine_folder(bundle, name)
    folder.mkdir(parents=True)
    flags = {"opt_level": 3, "workspace_bytes": 0}
    graphs: dict[str, tuple[Engine, ...]] = {}
    for graph, described in manifest.graphs.items():
        engines: list[Engine] = []
        largest = [("", 4096)]
        if not described.weights_bytes:
            largest = [(f".{b}", bucket.max_tokens) for b, bucket in manifest.buckets.items()]
        for number, (suffix, tokens) in enumerate(largest):
            file = f"{graph}{suffix}.engine"
            blob = json.dumps({"graph": graph, "file": file}).encode()
            (folder / file).write_bytes(blob)
            profiles = (_profile(manifest, graph, tokens),)
            key = engine_key(
                manifest,
                graph,
                flavor=flavor,
                version=version,
                targets=targets,
                flags=flags,
                profiles=profiles,
                bf16_island=False,
            )
            engines.append(
                Engine(
                    file=file,
                    bytes=len(blob),
                    sha256=hashlib.sha256(blob).hexdigest(),
                    key=key,
                    graph_sha256=manifest.files[described.file].sha256,
                    weights_sha256=described.weights_sha256,
                    profiles=profiles,
                    weights_bytes=described.weights_bytes,
                    scratch_bytes=(scratch_bytes * (number + 1),),
                    attentions=0,
                    attentions_fused=0,
                    bf16_island=False,
                    seconds=0.5,
                )
            )
        graphs[graph] = tuple(engines)
    buckets: dict[str, EngineBucket] = {}
    for number, (bucket, plan) in enumerate(run.buckets.items()):
        room = -(-scratch_bytes * (number + 1) // 256) * 256
        buckets[bucket] = EngineBucket(
            max_tokens=plan.max_tokens,
            chunk_tokens=plan.chunk_tokens,
            arena_bytes=plan.arena_bytes + room,
            offsets=plan.offsets,
            scratch={
                section: (plan.arena_bytes,) * len(instructions)
                for section, instructions in run.program.items()
            },
            weights_bytes=0,
            buffers_bytes=plan.arena_bytes,
            scratch_bytes=room,
            peak_device_bytes=peak_device_bytes * (number + 1),
            attentions=0,
            attentions_fused=0,
        )
    engine_set = EngineSet(flavor, version, targets, flags, graphs, buckets)
    if is_lean:
        engine_set = replace(engine_set, buffers=run.buffers, program=run.program)
    changed = with_engine_sets(manifest, {name: engine_set})
    (bundle / MANIFEST_FILE).write_text(changed.to_json())
    return engine_set


def _profile(manifest: Manifest, graph: str, tokens: int) -> Profile:
    """An optimisation profile for up to as many tokens, and all of the text."""
    ports = manifest.graphs[graph].inputs.values()
    symbols = {size for port in ports for size in port.shape if isinstance(size, str)} - {"B"}
    most = tokens + manifest.network["text_max_length"]
    return dict.fromkeys(sorted(symbols), (1, tokens, most))
