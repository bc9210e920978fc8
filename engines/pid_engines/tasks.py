"""Which engines a bundle needs, and which of them are there already."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from pid_engines.attention_graph import attention_graph
from pid_engines.attentions import (
    LARGEST_FP16_KEYS,
    LARGEST_SCORES,
    Attention,
    find_attentions,
    find_rounded_products,
    overflows,
)
from pid_engines.errors import BuildInputError
from pid_engines.flavors import FIRST_WITH_BF16, FIRST_WITH_FP8, architecture
from pid_engines.keys import engine_key, recorded_key
from pid_engines.options import BuildOptions
from pid_engines.profiles import EnginePlan, plan_engines
from pid_runtime.bundle.engines import Engine, EngineSet
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.manifest import PRECISIONS, Manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """An engine that is needed, and all that identifies it."""

    plan: EnginePlan
    key: str
    attentions: tuple[Attention, ...]
    rounded_products: tuple[str, ...]
    """Products of 8-bit numbers, by node."""
    bf16_island: bool
    content: bytes | None
    """Of the ONNX file to build from, if that is not the bundle's own."""

    @property
    def file(self) -> str:
        return f"{self.plan.name}.engine"


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
    if PRECISIONS[manifest.precision] == "float32":
        raise BuildInputError(
            f"expected a bundle in bf16, fp16, fp8 or int8, but got {manifest.precision}, whose "
            "attention needs all of its scores in memory; export with --precision bf16"
        )
    oldest = options.targets[0] if options.targets else None
    if manifest.precision == "fp8" and oldest and architecture(oldest) < FIRST_WITH_FP8:
        raise BuildInputError(
            f"expected targets from sm{FIRST_WITH_FP8} on for an fp8 bundle, but got {oldest}, "
            "which cannot multiply 8-bit floats; leave it out, or export with --precision bf16"
        )
    if PRECISIONS[manifest.precision] == "bfloat16" and old is not None:
        raise BuildInputError(
            f"expected targets from sm{FIRST_WITH_BF16} on for a {manifest.precision} bundle, but "
            f"got {old}, which has no bfloat16; leave it out, or export with --precision fp16"
        )
    tasks: list[Task] = []
    for plan in plan_engines(manifest, buckets):
        graph = manifest.graphs[plan.graph]
        _check_scores(manifest, plan, buckets)
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
        model = onnx.load_from_string(content) if content else own
        attentions, products = find_attentions(model), find_rounded_products(model)
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
        tasks.append(Task(plan, key, tuple(attentions), tuple(products), island, content))
    return tasks


def _check_scores(manifest: Manifest, plan: EnginePlan, buckets: Sequence[str]) -> None:
    """Raise `BuildInputError` for an attention over more tokens than the builder counts."""
    graph = manifest.graphs[plan.graph]
    if graph.stage != "attention":
        return
    heads = graph.options["heads"]
    for profile, used in zip(plan.profiles, plan.buckets, strict=True):
        keys = max(most for _, _, most in profile.values())
        if heads * keys**2 <= LARGEST_SCORES:
            continue
        name = min(used, key=buckets.index)
        size = manifest.megapixels(manifest.buckets[name].max_tokens)
        others = [other for other in buckets if other not in used]
        fix = (
            f"build the others with --buckets {','.join(others)}"
            if others
            else "export a smaller one"
        )
        raise BuildInputError(
            f"expected at most 2^40 scores of an attention, as many as TensorRT builds, but bucket "
            f"{name} of {size} has {heads} heads x {keys}^2; {fix}"
        )


def onnx_model(path: Path) -> onnx.ModelProto:
    """A graph without its weights. Raises `BuildInputError` when it is none."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BuildInputError(
            f"expected a graph in {path}, but got {error}; export the bundle again"
        ) from None


def current_engines(
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
