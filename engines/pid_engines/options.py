"""How engines are to be built."""

from dataclasses import dataclass, replace
from typing import Any

from pid_engines.flavors import BUILDERS
from pid_engines.lean import lean_program
from pid_runtime.bundle.flavors import Flavor
from pid_runtime.bundle.manifest import Manifest

PLANS = {"fast": 1 << 24, "lean": 1024}
"""Most tokens of one slice of a chunked instruction. Scratch grows with them; 4096, which is what
bundles have, keep a large GPU busy. `lean` runs a program of its own too: see `pid_engines.lean`.
"""

ATTENTION_GRAPH = 1
"""Goes into every engine's key: another number when `attention_graph` writes another graph."""


@dataclass(frozen=True)
class BuildOptions:
    """What `pid-build` is asked for."""

    flavor: Flavor
    version: str
    """Of the flavour's library."""
    targets: tuple[str, ...]
    """GPU architectures, oldest first."""
    buckets: tuple[str, ...] | None = None
    """Names of the buckets to build for; all of the bundle's when None."""
    plan: str = "fast"
    """One of `PLANS`."""
    opt_level: int = 3
    """0 to 5: how long the builder searches."""
    workspace_bytes: int = 0
    """Most scratch of a kernel; 0 leaves it to the library."""
    jobs: int = 1
    """Engines built at the same time."""
    force: bool = False
    """Build again what is there already."""
    allow_unfused: bool = False
    """Take an engine whose attention is not fused."""

    @property
    def flags(self) -> dict[str, Any]:
        """The options as the manifest records them."""
        flags: dict[str, Any] = {
            "opt_level": self.opt_level,
            "workspace_bytes": self.workspace_bytes,
            "attention_graph": ATTENTION_GRAPH,
        }
        return flags | {name: True for name, _ in BUILDERS[self.flavor.name].flags}

    @property
    def set_name(self) -> str:
        """What the engines are called in the manifest, and their folder."""
        lean = () if self.plan == "fast" else (self.plan,)
        return "-".join((self.flavor.name, self.version, *self.targets, *lean))


def with_plan(manifest: Manifest, plan: str) -> Manifest:
    """The manifest with the program of a plan, and buckets of no longer chunks than it has."""
    if plan == "lean":
        manifest = lean_program(manifest)
    most = PLANS[plan]
    buckets = {
        name: replace(bucket, chunk_tokens=min(bucket.chunk_tokens, most))
        for name, bucket in manifest.buckets.items()
    }
    return replace(manifest, buckets=buckets)
