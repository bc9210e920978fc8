"""Bundles whose own program is a lean one, which any backend runs."""

import shutil
from dataclasses import replace
from pathlib import Path

from pid_engines.lean import lean_program
from pid_export.arena import plan_arena
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Bucket, Manifest
from pid_runtime.bundle.sizes import Sizes, sizes_for
from pid_runtime.interpreter import with_chunk


def in_slices(manifest: Manifest, tokens: int) -> Manifest:
    """The manifest with chunks of no more tokens."""
    buckets = {
        name: replace(bucket, chunk_tokens=min(tokens, bucket.chunk_tokens))
        for name, bucket in manifest.buckets.items()
    }
    return replace(manifest, buckets=buckets)


def largest_sizes(manifest: Manifest, bucket: Bucket) -> Sizes:
    """What a bucket is planned for."""
    rows = manifest.sampler.max_steps
    across = manifest.tokens_per_latent
    return with_chunk(sizes_for(manifest.network, across, rows, bucket.max_tokens), bucket)


def lean(manifest: Manifest) -> Manifest:
    """The manifest with a lean program, and buckets planned for it."""
    changed = lean_program(manifest)
    buckets: dict[str, Bucket] = {}
    for name, bucket in manifest.buckets.items():
        plan = plan_arena(changed.buffers, changed.program, largest_sizes(manifest, bucket))
        buckets[name] = replace(bucket, arena_bytes=plan.arena_bytes, offsets=plan.offsets)
    return replace(changed, buckets=buckets)


def copy_with(bundle: Path, folder: Path, manifest: Manifest) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle, folder)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")
    return folder


def lean_copy(bundle: Path, folder: Path, tokens: int) -> Path:
    """A copy of a bundle with a lean program and chunks of no more tokens."""
    return copy_with(bundle, folder, lean(in_slices(read_manifest(bundle, verify=False), tokens)))
