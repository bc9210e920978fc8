"""What the manifest says of engines that were built, and the arena that they share with buffers."""

from collections.abc import Mapping, Sequence

from pid_engines.builder_log import BuilderReport
from pid_engines.options import BuildOptions
from pid_engines.tasks import Task
from pid_engines.worker import BuildResult
from pid_export.arena import plan_arena
from pid_runtime.bundle.engines import Engine, EngineBucket, EngineSet
from pid_runtime.bundle.manifest import Manifest, runs_of
from pid_runtime.bundle.sizes import CHUNK, sizes_for


def describe(manifest: Manifest, task: Task, report: BuilderReport, result: BuildResult) -> Engine:
    """What the manifest says of an engine."""
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


def make_set(
    manifest: Manifest, options: BuildOptions, tasks: Sequence[Task], built: Mapping[str, Engine]
) -> EngineSet:
    """The set of these engines, `built` by file."""
    graphs: dict[str, list[Engine]] = {}
    for task in tasks:
        graphs.setdefault(task.plan.graph, []).append(built[task.file])
    buckets = options.buckets or tuple(manifest.buckets)
    has_own_program = options.plan != "fast"
    return EngineSet(
        flavor=options.flavor.name,
        version=options.version,
        targets=options.targets,
        flags=options.flags,
        graphs={graph: tuple(engines) for graph, engines in graphs.items()},
        buckets={name: _plan_bucket(manifest, name, tasks, built) for name in buckets},
        buffers=manifest.buffers if has_own_program else {},
        program=manifest.program if has_own_program else {},
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
    ).extended({}, **{CHUNK: bucket.chunk_tokens})
    needed = {
        section: [
            max((scratch.get(run.graph, 0) for run in runs_of(each)), default=0)
            for each in instructions
        ]
        for section, instructions in manifest.program.items()
    }
    plan = plan_arena(manifest.buffers, manifest.program, sizes, needed)
    steps = [run.graph for each in manifest.program["step"] for run in runs_of(each)]
    runs = [used_engines[graph] for graph in steps if graph in used_engines]
    return EngineBucket(
        max_tokens=bucket.max_tokens,
        chunk_tokens=bucket.chunk_tokens,
        arena_bytes=plan.arena_bytes,
        offsets=plan.offsets,
        scratch=plan.scratch,
        weights_bytes=weights,
        buffers_bytes=plan_arena(manifest.buffers, manifest.program, sizes).arena_bytes,
        scratch_bytes=max(scratch.values()),
        peak_device_bytes=weights + plan.arena_bytes,
        attentions=sum(engine.attentions for engine in runs),
        attentions_fused=sum(engine.attentions_fused for engine in runs),
    )
