"""Which sizes the engines of a bundle take: optimisation profiles by graph and bucket."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pid_engines.errors import BuildInputError
from pid_runtime.bundle.engines import Profile, Range
from pid_runtime.bundle.manifest import Bucket, Graph, Manifest, Run, runs_of
from pid_runtime.bundle.sizes import Shape, sizes_for

LARGEST_ASPECT = 8
"""Images up to this many times as wide as high, or as high as wide, are sure to have an engine."""

BAND_SLACK = 1.2
"""How many budgets the largest height times the largest width of a band may be.

Less of it is less scratch, and more profiles, which take longer to build.
"""

ONE_HEAD_TOKENS = 4096
"""Least best and largest size of an attention with one head.

Below it TensorRT for RTX 1.7.1 does not fuse one: 3584 was tried, and 4096 fuses.
"""


FEWEST_FP8_KEYS = 33
"""Of an attention of 8-bit numbers, the least keys of a profile.

TensorRT for RTX 1.7.1 does not fuse one whose profile begins lower: 32 and less were tried, and 33
fuses.
"""


@dataclass(frozen=True)
class EnginePlan:
    """An engine to be built."""

    graph: str
    name: str
    """Of its files, without their endings."""
    profiles: tuple[Profile, ...]
    """Smallest first, as the runtime takes the first one that holds a call's sizes."""
    buckets: tuple[frozenset[str], ...]
    """The buckets that each profile is for."""


def plan_engines(manifest: Manifest, buckets: Sequence[str]) -> list[EnginePlan]:
    """The engines that run every graph of a bundle at every size of these buckets.

    A graph with weights has one engine, so that they are stored and loaded once. A graph without
    has one for every profile, so that the buckets do not depend on each other.
    """
    plans: list[EnginePlan] = []
    for graph, described in manifest.graphs.items():
        users: list[tuple[Profile, set[str]]] = []
        for bucket in sorted(buckets, key=lambda name: manifest.buckets[name].max_tokens):
            for profile in _profiles(manifest, graph, manifest.buckets[bucket]):
                for known, names in users:
                    if known == profile:
                        names.add(bucket)
                        break
                else:
                    users.append((profile, {bucket}))
        users.sort(key=lambda user: _volume(user[0]))
        profiles = tuple(profile for profile, _ in users)
        used = tuple(frozenset(names) for _, names in users)
        if described.weights_bytes or len(used) > len(buckets):
            plans.append(EnginePlan(graph, graph, profiles, used))
            continue
        for profile, names in zip(profiles, used, strict=True):
            first = min(names, key=lambda name: manifest.buckets[name].max_tokens)
            plans.append(EnginePlan(graph, f"{graph}.{first}", (profile,), (names,)))
    return plans


def shape_ranges(shape: Shape, profile: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """The smallest, best and largest shape of a port under a profile."""
    sizes = {"B": (1, 1, 1), **profile}
    return [
        [size if isinstance(size, int) else sizes[size][which] for size in shape]
        for which in range(3)
    ]


def bands(budget: int) -> list[tuple[Range, Range]]:
    """Ranges of h and w that together hold all sizes from 1 with h * w <= budget.

    They do up to an aspect ratio of `LARGEST_ASPECT`. The largest h times the largest w of a band
    is at most `BAND_SLACK` budgets, or as near to it as whole numbers are: a convolution's scratch
    goes with that product, and a single range for all aspect ratios would need eight times as much.
    """
    longest = longest_side(budget)
    found: list[tuple[Range, Range]] = []
    top = 0
    while top < longest:
        low = top + 1
        width = min(longest, budget // low)
        top = min(longest, max(low, int(BAND_SLACK * budget) // width))
        best = (low + top) // 2
        found.append(((1, best, top), (1, min(width, budget // best), width)))
    return found


def longest_side(budget: int) -> int:
    """The longest side of `budget` tokens at the largest aspect ratio."""
    return min(budget, math.isqrt(LARGEST_ASPECT * budget - 1) + 1)


def _profiles(manifest: Manifest, graph: str, bucket: Bucket) -> list[Profile]:
    """The profiles of a graph in a bucket: the sizes of all instructions that run it."""
    described = manifest.graphs[graph]
    symbols = _input_symbols(described)
    runs = (run for each in manifest.instructions() for run in runs_of(each))
    own = [run for run in runs if run.graph == graph]
    if not own:
        raise BuildInputError(
            f"expected the program to run graph {graph!r}, but no instruction does; "
            "export the bundle again"
        )
    profile: Profile = {}
    for symbol in symbols:
        ranges = [_range(manifest, bucket, symbol, run) for run in own]
        least, best, most = max(ranges, key=lambda sizes: sizes[2])
        if described.stage == "attention" and described.options["heads"] == 1:
            best, most = max(best, ONE_HEAD_TOKENS), max(most, ONE_HEAD_TOKENS)
        if described.options.get("fp8_scales") and symbol in described.inputs["k"].shape:
            least = FEWEST_FP8_KEYS
            best, most = max(best, least), max(most, least)
        profile[symbol] = least, best, most
    if {"h", "w"} <= set(symbols):
        return [{**profile, "h": h, "w": w} for h, w in bands(_latent_budget(manifest, bucket))]
    return [profile]


def _range(manifest: Manifest, bucket: Bucket, symbol: str, run: Run) -> Range:
    """Sizes of a symbol of a graph's inputs in one instruction."""
    meant = run.dims.get(symbol, symbol)
    unit, budget = 1, bucket.max_tokens
    if meant in ("h", "w", "Hs", "Ws", "H", "W"):
        if meant in ("h", "w"):
            budget = _latent_budget(manifest, bucket)
        elif meant in ("H", "W"):
            unit = manifest.network["patch_size"]
        return 1, math.isqrt(budget) * unit, longest_side(budget) * unit
    sizes = sizes_for(
        manifest.network, manifest.tokens_per_latent, manifest.sampler.max_steps, budget
    )
    largest = sizes.value(meant)
    if symbol == run.chunk:
        largest = min(largest, bucket.chunk_tokens)
    return 1, largest, largest


def _latent_budget(manifest: Manifest, bucket: Bucket) -> int:
    """Latent pixels of a bucket."""
    return bucket.max_tokens // manifest.tokens_per_latent**2


def _input_symbols(graph: Graph) -> list[str]:
    """Symbols of a graph's inputs, in their order, without the batch."""
    sizes = [size for port in graph.inputs.values() for size in port.shape]
    return [size for size in dict.fromkeys(sizes) if isinstance(size, str) and size != "B"]


def _volume(profile: Profile) -> int:
    return math.prod(largest for _, _, largest in profile.values())
