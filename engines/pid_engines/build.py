"""Builds the engines of a bundle and writes down what was built in its manifest."""

import contextlib
import logging
import resource
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from filelock import FileLock, Timeout

from pid_engines.attention import attention_graph
from pid_engines.child import ChildError, Children, PartDone
from pid_engines.errors import BuildError, BuildInputError
from pid_engines.flavors import BUILDERS, FIRST_WITH_BF16, architecture
from pid_engines.gates import (
    LARGEST_FP16_KEYS,
    Attention,
    Report,
    find_attentions,
    overflows,
    read_report,
)
from pid_engines.keys import engine_key, recorded_key
from pid_engines.profiles import EnginePlan, plan_engines
from pid_engines.worker import BuildRequest, BuildResult
from pid_export.arena import plan_arena
from pid_runtime.bundle.engines import (
    ENGINE_FOLDER,
    Engine,
    EngineBucket,
    EngineSet,
    engine_folder,
    read_engine_sets,
    with_engine_sets,
)
from pid_runtime.bundle.files import check_space, file_sha256, write_whole
from pid_runtime.bundle.flavors import Flavor
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.bundle.manifest import MANIFEST_FILE, Copy, Manifest, Run
from pid_runtime.bundle.sizes import sizes_for
from pid_runtime.errors import PidRuntimeError

_log = logging.getLogger(__name__)

LOG_FOLDER = "logs"
"""Folder of a set, with what parser and builder said: one file per engine."""

TIMING_CACHE_FILE = "timing.cache"

ENGINE_OVERHEAD_BYTES = 2_000_000
"""An engine's size beside its weights, per profile; at full size 0.7 to 1.4 MB were measured."""

PLANS = {"fast": 1 << 24, "lean": 1024}
"""Most tokens of one call of a per-token stage. Its scratch grows with them; 4096, which is what
bundles have, keep a large GPU busy."""

ATTENTION_GRAPH = 1
"""Goes into every engine's key: another number when `attention_graph` writes another graph."""


@dataclass(frozen=True)
class BuildOptions:
    """How engines are to be built."""

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


@dataclass(frozen=True)
class Task:
    """An engine that is needed, and all that identifies it."""

    plan: EnginePlan
    key: str
    attentions: tuple[Attention, ...]
    bf16_island: bool
    content: bytes | None
    """Of the ONNX file to build from, if that is not the bundle's own."""

    @property
    def file(self) -> str:
        return f"{self.plan.name}.engine"


@dataclass(frozen=True)
class Build:
    """What `build_engines` did."""

    set_name: str
    engines: EngineSet
    plans: dict[str, EnginePlan]
    """By the name of the engine's file."""
    reused: frozenset[str]
    """Files of engines that were there already."""
    peak_rss_bytes: int
    """Most host memory: of this process, and of as many builds as ran at the same time."""


def build_engines(
    bundle: Path, options: BuildOptions, progress: PartDone = lambda fraction: None
) -> Build:
    """Build the engines of a bundle that it does not have yet, and record them in its manifest.

    Files and manifest change only when all engines are built; a second builder waits. progress:
    called, from any thread, with the part done since the last call, of 1.
    Raises `BuildInputError`, `PidRuntimeError` for a broken bundle, and `BuildError` for an engine
    that cannot be built or is not what it must be.
    """
    # What makes no sense is refused before a lock is left behind.
    plan_tasks(bundle, read_manifest(bundle, verify=False), options)
    with _locked(bundle):
        manifest = _without_unreadable_sets(read_manifest(bundle), force=options.force)
        planned = _with_plan(manifest, options.plan)
        tasks = plan_tasks(bundle, planned, options)
        old = read_engine_sets(manifest).get(options.set_name)
        folder = engine_folder(bundle, options.set_name)
        built: dict[str, Engine] = {}
        if old is not None and not options.force:
            built = _current(manifest, folder, old, tasks, allow_unfused=options.allow_unfused)
        missing = [task for task in tasks if task.file not in built]
        reused = frozenset(built)
        _check_space(bundle, manifest, missing)
        with _staging(folder) as staging:
            results = _build_all(bundle, manifest, options, missing, staging, progress)
            peaks = sorted((result.peak_rss_bytes for _, result in results.values()), reverse=True)
            for task in missing:
                built[task.file] = _engine(manifest, task, *results[task.file])
            engines = _engine_set(planned, options, tasks, built)
            changed = with_engine_sets(manifest, {options.set_name: engines})
            for task in missing:
                (staging / task.file).replace(folder / task.file)
            write_whole(bundle / MANIFEST_FILE, changed.to_json() + "\n")
        _remove_others(folder, {task.plan.name for task in tasks})
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plans = {task.file: task.plan for task in tasks}
    return Build(options.set_name, engines, plans, reused, own + sum(peaks[: options.jobs]))


def _with_plan(manifest: Manifest, plan: str) -> Manifest:
    """The manifest with buckets of no longer chunks than a plan has."""
    most = PLANS[plan]
    buckets = {
        name: replace(bucket, chunk_tokens=min(bucket.chunk_tokens, most))
        for name, bucket in manifest.buckets.items()
    }
    return replace(manifest, buckets=buckets)


def plan_tasks(bundle: Path, manifest: Manifest, options: BuildOptions) -> list[Task]:
    """All engines that a bundle needs. Raises `BuildInputError` for what cannot be built."""
    buckets = options.buckets or tuple(manifest.buckets)
    for name in buckets:
        if name not in manifest.buckets:
            raise BuildInputError(
                f"expected buckets of this bundle ({', '.join(manifest.buckets)}), but got "
                f"{name!r}; export it with that bucket, or choose another"
            )
    old = next((t for t in options.targets if architecture(t) < FIRST_WITH_BF16), None)
    if manifest.precision == "fp32":
        raise BuildInputError(
            "expected a bundle in bf16 or fp16, but got fp32, whose attention needs all of its "
            "scores in memory; export with --precision bf16"
        )
    if manifest.precision == "bf16" and old is not None:
        raise BuildInputError(
            f"expected targets from sm{FIRST_WITH_BF16} on for a bf16 bundle, but got {old}, "
            "which has no bfloat16; leave it out, or export with --precision fp16"
        )
    tasks: list[Task] = []
    for plan in plan_engines(manifest, buckets):
        graph = manifest.graphs[plan.graph]
        own = onnx_model(bundle / graph.file)
        island = (
            manifest.precision == "fp16" and overflows(plan.profiles) and bool(find_attentions(own))
        )
        if island and (graph.stage != "attention" or old is not None):
            why = f"{old} has none" if old is not None else f"graph {plan.graph!r} does more"
            raise BuildInputError(
                f"expected at most {LARGEST_FP16_KEYS} keys in float16, but engine {plan.name} has "
                f"more, and cannot use bfloat16 as {why}; leave the bucket out with --buckets, or "
                f"build for targets from sm{FIRST_WITH_BF16} on from an export with "
                "--precision bf16"
            )
        content = None
        if graph.stage == "attention":
            content = attention_graph(graph, bf16_island=island)
        attentions = find_attentions(onnx.load_from_string(content) if content else own)
        key = engine_key(
            manifest,
            plan.graph,
            flavor=options.flavor.name,
            version=options.version,
            targets=options.targets,
            flags=options.flags,
            profiles=plan.profiles,
            bf16_island=island,
        )
        tasks.append(Task(plan, key, tuple(attentions), island, content))
    return tasks


def onnx_model(path: Path) -> onnx.ModelProto:
    """A graph without its weights. Raises `BuildInputError` when it is none."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BuildInputError(
            f"expected a graph in {path}, but got {error}; export the bundle again"
        ) from None


def _without_unreadable_sets(manifest: Manifest, *, force: bool) -> Manifest:
    """The manifest; with `force` without engines if they make no sense."""
    try:
        read_engine_sets(manifest)
    except PidRuntimeError:
        if not force:
            raise
        return replace(manifest, engines={})
    return manifest


def _current(
    manifest: Manifest,
    folder: Path,
    old: EngineSet,
    tasks: Sequence[Task],
    *,
    allow_unfused: bool,
) -> dict[str, Engine]:
    """Engines that need not be built: they were built from the same, and their files are whole."""
    known = {
        engine.file: engine
        for graph, engines in old.graphs.items()
        for engine in engines
        if engine.key == recorded_key(manifest, graph, old, engine)
    }
    found: dict[str, Engine] = {}
    for task in tasks:
        engine, path = known.get(task.file), folder / task.file
        if engine is None or engine.key != task.key or not path.is_file():
            continue
        if path.stat().st_size != engine.bytes or file_sha256(path) != engine.sha256:
            _log.warning("%s was altered: it is built again", path)
        elif allow_unfused or engine.attentions_fused == engine.attentions:
            found[task.file] = engine
    return found


def _build_all(
    bundle: Path,
    manifest: Manifest,
    options: BuildOptions,
    tasks: Sequence[Task],
    staging: Path,
    progress: PartDone,
) -> dict[str, tuple[Report, BuildResult]]:
    """Build engines into `staging`; reports of the builder and results by the engine's file."""
    logs = engine_folder(bundle, options.set_name) / LOG_FOLDER
    children = Children()

    def build(task: Task) -> tuple[Report, BuildResult]:
        request = request_of(bundle, manifest, options, task, staging)
        log = logs / f"{task.plan.name}.log"
        share = 1 / len(tasks)
        result = _build_one(
            children, request, task.plan.name, log, lambda part: progress(part * share)
        )
        return _checked_report(task, log, options), result

    results: dict[str, tuple[Report, BuildResult]] = {}
    with ThreadPoolExecutor(
        1 if BUILDERS[options.flavor.name].timing_cache else options.jobs
    ) as pool:
        futures = {pool.submit(build, task): task.file for task in tasks}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            children.kill()
            raise
    return results


def request_of(
    bundle: Path, manifest: Manifest, options: BuildOptions, task: Task, staging: Path
) -> BuildRequest:
    """What a worker is to do for a task; the file it is to build from is written if need be."""
    graph = manifest.graphs[task.plan.graph]
    source = bundle / graph.file
    if task.content is not None:
        source = staging / f"{task.plan.name}.onnx"
        source.write_bytes(task.content)
    cache = engine_folder(bundle, options.set_name) / TIMING_CACHE_FILE
    return BuildRequest(
        flavor=options.flavor.name,
        targets=options.targets,
        flags=options.flags,
        onnx=str(source),
        graph=graph,
        profiles=task.plan.profiles,
        engine=str(staging / task.file),
        timing_cache=str(cache) if BUILDERS[options.flavor.name].timing_cache else "",
    )


def _checked_report(task: Task, log: Path, options: BuildOptions) -> Report:
    """What the builder said about an engine. Raises `BuildError` if its attention is not fused."""
    report = read_report(
        log.read_text("utf-8", "replace"), task.attentions, len(task.plan.profiles)
    )
    if isinstance(report, str):
        raise BuildError(f"engine {task.plan.name}: {report}; see {log}")
    count = len(task.attentions)
    if report.attentions_fused < count and not options.allow_unfused:
        raise BuildError(
            f"expected the builder to fuse every attention of engine {task.plan.name}, but it "
            f"fused {report.attentions_fused} of {count}; see {log}, or take it as it is with "
            "--allow-unfused"
        )
    return report


def _build_one(
    children: Children, request: BuildRequest, name: str, log: Path, progress: PartDone
) -> BuildResult:
    """Build an engine in a process of its own. Raises `BuildError` when that fails."""
    done = 0.0

    def advance(part: float) -> None:
        nonlocal done
        if part > done:
            progress(part - done)
            done = part

    try:
        with children.start([sys.executable, "-m", "pid_engines.worker"], log=log) as child:
            result = read_member(BuildResult, child.ask(asdict(request), advance), "result")
            child.end()
    except ChildError as error:
        reason = str(error)
        if error.killed:
            reason = (
                "it was killed, as happens when the machine has too little memory (try --jobs 1)"
            )
        elif not error.said:
            reason = f"the builder {error}"
        raise BuildError(f"cannot build engine {name}: {reason}; see {log}") from None
    advance(1.0)
    return result


def _engine(manifest: Manifest, task: Task, report: Report, result: BuildResult) -> Engine:
    graph = manifest.graphs[task.plan.graph]
    return Engine(
        file=task.file,
        bytes=result.bytes,
        sha256=result.sha256,
        key=task.key,
        graph_sha256=manifest.files[graph.file].sha256,
        weights_sha256=graph.weights_sha256,
        profiles=task.plan.profiles,
        weights_bytes=report.weights_bytes,
        scratch_bytes=report.scratch_bytes,
        attentions=len(task.attentions),
        attentions_fused=report.attentions_fused,
        bf16_island=task.bf16_island,
        seconds=result.seconds,
    )


def _engine_set(
    manifest: Manifest, options: BuildOptions, tasks: Sequence[Task], built: Mapping[str, Engine]
) -> EngineSet:
    graphs: dict[str, list[Engine]] = {}
    for task in tasks:
        graphs.setdefault(task.plan.graph, []).append(built[task.file])
    buckets = options.buckets or tuple(manifest.buckets)
    return EngineSet(
        flavor=options.flavor.name,
        version=options.version,
        targets=options.targets,
        flags=options.flags,
        graphs={graph: tuple(engines) for graph, engines in graphs.items()},
        buckets={name: _plan_bucket(manifest, name, tasks, built) for name in buckets},
    )


def _plan_bucket(
    manifest: Manifest, name: str, tasks: Sequence[Task], built: Mapping[str, Engine]
) -> EngineBucket:
    """Plan the arena of a bucket with every engine's scratch in it."""
    weights, scratch = 0, dict[str, int]()
    used_engines: dict[str, Engine] = {}
    for task in tasks:
        engine = built[task.file]
        used = [
            size
            for size, buckets in zip(engine.scratch_bytes, task.plan.buckets, strict=True)
            if name in buckets
        ]
        if used:
            weights += engine.weights_bytes
            scratch[task.plan.graph] = max(scratch.get(task.plan.graph, 0), *used)
            used_engines[task.plan.graph] = engine
    bucket = manifest.buckets[name]
    sizes = sizes_for(
        manifest.network,
        manifest.tokens_per_latent,
        manifest.sampler.max_steps,
        bucket.max_tokens,
    )
    plan = plan_arena(
        manifest.buffers,
        manifest.program,
        sizes,
        {
            section: [
                0 if isinstance(each, Copy) else scratch.get(each.graph, 0) for each in instructions
            ]
            for section, instructions in manifest.program.items()
        },
    )
    steps = [each.graph for each in manifest.program["step"] if isinstance(each, Run)]
    runs = [used_engines[graph] for graph in steps if graph in used_engines]
    return EngineBucket(
        max_tokens=bucket.max_tokens,
        chunk_tokens=bucket.chunk_tokens,
        arena_bytes=plan.arena_bytes,
        offsets=plan.offsets,
        scratch=plan.scratch,
        weights_bytes=weights,
        buffers_bytes=bucket.arena_bytes,
        scratch_bytes=max(scratch.values()),
        peak_device_bytes=weights + plan.arena_bytes,
        attentions=sum(engine.attentions for engine in runs),
        attentions_fused=sum(engine.attentions_fused for engine in runs),
    )


@contextlib.contextmanager
def _locked(bundle: Path) -> Generator[None, None, None]:
    """Keep other builders from this bundle; wait for one that is there already."""
    folder = bundle / ENGINE_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("another pid-build works on %s: waiting for it to end", bundle)
            lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _staging(folder: Path) -> Generator[Path, None, None]:
    """A folder for engines that are not complete yet, in that of their set.

    What a builder that was killed left there is removed: nobody else builds while this one does.
    """
    try:
        (folder / LOG_FOLDER).mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(".partial", ".", folder))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> BuildInputError:
    return BuildInputError(
        f"expected to write {folder}, but got: {error.strerror}; "
        "copy the bundle to where you may write"
    )


def _check_space(bundle: Path, manifest: Manifest, tasks: Sequence[Task]) -> None:
    needed = sum(
        manifest.graphs[task.plan.graph].weights_bytes
        + ENGINE_OVERHEAD_BYTES * len(task.plan.profiles)
        for task in tasks
    )
    check_space(bundle, needed, "the engines", "copy the bundle to another disk")


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove engines and logs of a set that nothing refers to any more."""
    for path in (*folder.glob("*.engine"), *(folder / LOG_FOLDER).glob("*.log")):
        if path.stem not in names:
            path.unlink()
