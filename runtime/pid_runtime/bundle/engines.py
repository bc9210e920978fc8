"""The engines of a bundle: `engines` of the manifest, and which engine runs what.

An engine set is what one `pid-build` made: engines of one library version for some GPU
architectures, in the folder `engines/SET` of the bundle. `pid-build` writes this section and the
TensorRT backend reads it; other backends do not look at it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.flavors import FLAVORS, flavor_for
from pid_runtime.bundle.json_reader import NAME, read_member, require
from pid_runtime.bundle.manifest import (
    SPECIAL,
    Bucket,
    Buffer,
    Graph,
    Instruction,
    Manifest,
    encode_buffers,
    encode_program,
)
from pid_runtime.bundle.manifest_check import check_bucket, check_program
from pid_runtime.errors import PidRuntimeError

ENGINE_FOLDER = "engines"
"""Folder of a bundle in which every engine set has a folder of its own."""

Range = tuple[int, int, int]
"""Smallest, best and largest size."""

Profile = dict[str, Range]
"""Sizes an engine takes: of every symbol of its graph's inputs but B, which is always 1."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TARGET = re.compile(r"sm[0-9]{2,3}")

_require = partial(require, fix="build the engines again with pid-build BUNDLE --force")


@dataclass(frozen=True)
class Engine:
    """One engine file."""

    file: str
    """Its name in the set's folder."""
    bytes: int
    sha256: str
    key: str
    """SHA-256 of all it was built from: by it the builder knows an engine again."""
    graph_sha256: str
    """Of the ONNX file it was built from."""
    weights_sha256: str
    """Of that graph's weights."""
    profiles: tuple[Profile, ...]
    """Its optimisation profiles, in the engine's order."""
    weights_bytes: int
    """Device memory of its weights."""
    scratch_bytes: tuple[int, ...]
    """Device memory an execution context works in, per profile."""
    attentions: int
    """Attentions of the graph."""
    attentions_fused: int
    """Those of them that the builder made one kernel of."""
    bf16_island: bool
    """Whether attention is computed in bfloat16 inside a float16 graph."""
    seconds: float
    """What the build took."""


@dataclass(frozen=True)
class EngineBucket(Bucket):
    """A bucket as engines run it: its arena has a place for every instruction's scratch too.

    An engine's scratch is in use while it runs, and lies where no buffer is in use by then.
    """

    scratch: dict[str, tuple[int, ...]]
    """Offset in bytes of every instruction's scratch for one image, by section."""
    weights_bytes: int
    """Of all engines used, on the device."""
    buffers_bytes: int
    """What the arena would take without scratch."""
    scratch_bytes: int
    """The largest scratch of the engines and profiles used."""
    peak_device_bytes: int
    """Device memory of a decode of one image: `weights_bytes` and `arena_bytes`."""
    attentions: int
    """Attentions run per step."""
    attentions_fused: int

    def scratch_offset(self, section: str, index: int) -> int:
        """Where the scratch of an instruction lies in the arena."""
        return self.scratch[section][index]


@dataclass(frozen=True)
class EngineSet:
    """Engines of every graph, built together."""

    flavor: str
    """Name of one of `FLAVORS`."""
    version: str
    """Of the library that built it, as the library says it: 1.7.1.116."""
    targets: tuple[str, ...]
    """GPU architectures it runs on: sm86."""
    flags: dict[str, Any]
    """Options of the builder. `version_compatible`: later versions of the library run it too."""
    graphs: dict[str, tuple[Engine, ...]]
    """Engines by graph; the first that holds a call's sizes runs it."""
    buckets: dict[str, EngineBucket]
    """The buckets it was built for."""
    buffers: dict[str, Buffer] = field(default_factory=dict)
    """Those of `program`; none without one."""
    program: dict[str, tuple[Instruction, ...]] = field(default_factory=dict)
    """What it runs in place of the bundle's program; empty if it runs that one."""

    def run_by(self, manifest: Manifest) -> Manifest:
        """The bundle's manifest with the buffers and the program that this set runs."""
        if not self.program:
            return manifest
        return replace(manifest, buffers=self.buffers, program=self.program)

    def engine_for(self, graph: str, values: Mapping[str, int]) -> tuple[Engine, int]:
        """The engine, and its optimisation profile, for a call of a graph at these sizes.

        values: at least the symbols of the graph's profiles. Raises `PidRuntimeError` if the
        sizes are in no profile.
        """
        engines = self.graphs.get(graph, ())
        for engine in engines:
            for index, profile in enumerate(engine.profiles):
                if _holds(profile, values):
                    return engine, index
        symbols = sorted(
            {name for each in engines for profile in each.profiles for name in profile}
        )
        sizes = ", ".join(f"{name}={values[name]}" for name in symbols)
        built = ", ".join(self.buckets) or "none"
        raise PidRuntimeError(
            f"expected an engine of graph {graph!r} for {sizes}, but these engines were built for "
            f"buckets {built}; build the bucket with pid-build --buckets"
        )

    def runs_with(self, version: str) -> bool:
        """Whether this version of the library runs these engines."""
        if not self.flags.get("version_compatible"):
            return version == self.version
        own, other = _numbers(self.version), _numbers(version)
        return own[:1] == other[:1] and own <= other

    def build_command(self, bundle: Path | str = "BUNDLE") -> str:
        """The command that builds such a set anew."""
        return build_command(bundle, self.flavor, self.targets)


def build_command(bundle: Path | str, flavor: str, targets: Sequence[str]) -> str:
    """The command that builds engines of a flavour for GPU architectures."""
    return f"pid-build {bundle} --flavor {flavor} --target {','.join(targets)}"


def engine_folder(bundle: Path, name: str) -> Path:
    """The folder of an engine set's files."""
    return bundle / ENGINE_FOLDER / name


def read_engine_sets(manifest: Manifest) -> dict[str, EngineSet]:
    """The engine sets of a manifest, by name, in the manifest's order.

    Sets of flavours this version does not know are left out, and so are members it does not know.
    Raises `PidRuntimeError` for a section that contradicts itself or the bundle.
    """
    sets: dict[str, EngineSet] = {}
    for name, raw in manifest.engines.items():
        what = f"engines {name[:80]!r}"
        _require(NAME.fullmatch(name) is not None, f"a plain name of {what}", name)
        flavor = raw.get("flavor") if isinstance(raw, dict) else None
        if isinstance(flavor, str) and flavor not in FLAVORS:
            continue
        engine_set: EngineSet = read_member(EngineSet, raw, what, SPECIAL)
        _check_set(manifest, what, engine_set)
        sets[name] = engine_set
    return sets


def with_engine_sets(manifest: Manifest, sets: Mapping[str, EngineSet]) -> Manifest:
    """The manifest with these engine sets added, in place of those of the same names."""
    added = {name: json.loads(json.dumps(_encode(each))) for name, each in sets.items()}
    changed = replace(manifest, engines={**manifest.engines, **added})
    read_engine_sets(changed)
    return changed


def _encode(engine_set: EngineSet) -> dict[str, Any]:
    """A set as JSON, without what it does not need."""
    encoded = asdict(engine_set)
    del encoded["buffers"], encoded["program"]
    if engine_set.program:
        encoded["buffers"] = encode_buffers(engine_set.buffers)
        encoded["program"] = encode_program(engine_set.program)
    return encoded


def choose_engine_set(
    bundle: Path,
    sets: Mapping[str, EngineSet],
    versions: Mapping[str, str],
    target: str,
    name: str | None = None,
) -> str:
    """The name of the engine set to run: the first one these libraries and this GPU run.

    versions: of the libraries installed, by flavour. target: the GPU's architecture, as sm86.
    name: the one to take, if it runs. Raises `PidRuntimeError` if none does, and says why.
    """
    if name is not None and name not in sets:
        known = ", ".join(sets) or "none"
        raise PidRuntimeError(
            f"expected engines of {bundle} ({known}), but got {name!r}; build them with pid-build"
        )
    wanted = sets if name is None else {name: sets[name]}
    reasons = {each: obstacle(wanted[each], versions, target) for each in wanted}
    for each, reason in reasons.items():
        if reason is None:
            return each
    wanted_flavor = next((each for each in FLAVORS if each in versions), "tensorrt-rtx")
    if name is not None:
        wanted_flavor = sets[name].flavor
    flavor = flavor_for(target, versions, wanted_flavor).name
    has = "; ".join(f"{each} {reason}" for each, reason in reasons.items()) or "it has none"
    installed = " or ".join(f"{each} {version}" for each, version in versions.items())
    raise PidRuntimeError(
        f"expected {bundle} to have engines for {installed} on {target}, but {has}; "
        f"build them: {build_command(bundle, flavor, (target,))}"
    )


def obstacle(engine_set: EngineSet, versions: Mapping[str, str], target: str) -> str | None:
    """Why a set does not run here; None if it does. Arguments as of `choose_engine_set`."""
    version = versions.get(engine_set.flavor)
    if version is None:
        return f"needs the {engine_set.flavor} library, which is not installed"
    if not engine_set.runs_with(version):
        return f"was built by {engine_set.flavor} {engine_set.version}, not {version}"
    if target not in engine_set.targets:
        return f"was built for {', '.join(engine_set.targets)}"
    return None


def check_engine_set(
    bundle: Path, manifest: Manifest, name: str, engine_set: EngineSet, verify: bool = True
) -> None:
    """Raise `PidRuntimeError` when engines are not those of the bundle as it is, or altered.

    The message says what differs and how to rebuild. verify: hash the files; otherwise only their
    sizes are compared.
    """
    rebuild = f"build them again: {engine_set.build_command(bundle)}"
    for graph, described in manifest.graphs.items():
        engines = engine_set.graphs.get(graph, ())
        if not engines:
            raise PidRuntimeError(f"engines {name} have none for graph {graph!r}; {rebuild}")
        for engine in engines:
            change = _change(manifest, graph, described, engine)
            if change is None:
                change = _damage(engine_folder(bundle, name) / engine.file, engine, verify)
            if change is not None:
                raise PidRuntimeError(f"engines {name} do not fit this bundle: {change}; {rebuild}")


def _change(manifest: Manifest, graph: str, described: Graph, engine: Engine) -> str | None:
    """How the bundle differs from the one an engine was built from."""
    if engine.graph_sha256 != manifest.files[described.file].sha256:
        return f"graph {graph!r} ({described.file}) has changed since they were built"
    if engine.weights_sha256 != described.weights_sha256:
        return f"the weights of graph {graph!r} have changed since they were built"
    return None


def _damage(path: Path, engine: Engine, verify: bool) -> str | None:
    """How an engine's file differs from the one that was built."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != engine.bytes:
        return f"{path} has {size} bytes instead of {engine.bytes}"
    if verify and file_sha256(path) != engine.sha256:
        return f"{path} was altered, its SHA-256 is not the manifest's"
    return None


def _holds(profile: Profile, values: Mapping[str, int]) -> bool:
    return all(least <= values[name] <= most for name, (least, _, most) in profile.items())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))


def _check_set(manifest: Manifest, what: str, engine_set: EngineSet) -> None:
    _require(bool(engine_set.targets), f"targets of {what}", "none")
    for target in engine_set.targets:
        _require(_TARGET.fullmatch(target) is not None, f"targets such as sm86 of {what}", target)
    for graph, engines in engine_set.graphs.items():
        _require(graph in manifest.graphs, f"graphs of the bundle in {what}", graph)
        for engine in engines:
            _check_engine(f"{graph!r} of {what}", manifest.graphs[graph], engine)
    run = engine_set.run_by(manifest)
    if engine_set.program:
        check_program(run)
    for name, bucket in engine_set.buckets.items():
        _require(name in manifest.buckets, f"buckets of the bundle in {what}", name)
        most = manifest.buckets[name].max_tokens
        _require(bucket.max_tokens == most, f"{most} tokens in bucket {name!r} of {what}", "others")
        _check_scratch(run, f"bucket {name!r} of {what}", bucket)


def _check_scratch(manifest: Manifest, what: str, bucket: EngineBucket) -> None:
    counts = {section: len(each) for section, each in manifest.program.items()}
    lengths = {section: len(each) for section, each in bucket.scratch.items()}
    _require(lengths == counts, f"a scratch of {what} for every instruction", lengths)
    offsets = [offset for each in bucket.scratch.values() for offset in each]
    inside = all(offset % 256 == 0 and offset <= bucket.arena_bytes for offset in offsets)
    _require(inside, f"aligned scratch in the arena of {what}", "other")
    check_bucket(manifest, what, bucket, bucket.scratch_bytes * len(offsets))


def _check_engine(what: str, graph: Graph, engine: Engine) -> None:
    _require(NAME.fullmatch(engine.file) is not None, f"a plain file name for {what}", engine.file)
    for digest in (engine.sha256, engine.key, engine.graph_sha256, engine.weights_sha256):
        _require(_SHA256.fullmatch(digest) is not None, f"SHA-256 hashes of {what}", digest)
    _require(bool(engine.profiles), f"profiles of {what}", "none")
    count = len(engine.profiles)
    _require(len(engine.scratch_bytes) == count, f"scratch per profile of {what}", "other")
    fused = engine.attentions_fused <= engine.attentions
    _require(fused, f"at most {engine.attentions} fused of {what}", engine.attentions_fused)
    ports = (*graph.inputs.values(), *graph.outputs.values())
    symbols = {size for port in ports for size in port.shape if isinstance(size, str)} - {"B"}
    for profile in engine.profiles:
        _require(set(profile) <= symbols, f"profiles over sizes of {what}", sorted(profile))
        for sizes in profile.values():
            ordered = len(sizes) == 3 and 0 < sizes[0] <= sizes[1] <= sizes[2]
            _require(ordered, f"smallest, best and largest sizes of {what}", sizes)
