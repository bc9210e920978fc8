"""Turns a checkpoint into a bundle: weights folded, graphs exported, memory planned."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_export.arena import plan_arena
from pid_export.calibration import (
    Calibration,
    check_calibration,
    fold_rounded,
    port_scales,
    rounded_of,
)
from pid_export.contrib import contrib_graph
from pid_export.errors import ExportInputError
from pid_export.fold import fold_graph, fold_tables
from pid_export.graphs import GraphExporter, Placed, check_graph
from pid_export.onnx_ports import OPSET
from pid_export.program import GraphSpec, ProgramSpec, build_program
from pid_export.weights_file import Slot, WeightsWriter
from pid_ref.config import PidConfig
from pid_ref.guided_sampler import BASE_SIZE, FLOW_SHIFT, GUIDANCE, STEPS
from pid_ref.registry import CHECKPOINTS, Checkpoint, LatentSpace
from pid_ref.sampler import timesteps
from pid_ref.trained_sizes import trained_sizes
from pid_runtime.backends.stages import Dimensions, build_stage
from pid_runtime.bundle.files import check_space, whole_folder
from pid_runtime.bundle.json_reader import NAME
from pid_runtime.bundle.manifest import (
    FP8_PRECISIONS,
    MANIFEST_FILE,
    PACKED_DCT,
    PRECISIONS,
    ROUNDED_PRECISIONS,
    WEIGHTS_FILE,
    Bucket,
    Codec,
    File,
    FlowShift,
    Graph,
    Manifest,
    Sampler,
)
from pid_runtime.bundle.manifest_check import check_manifest
from pid_runtime.bundle.sizes import sizes_for
from pid_runtime.bundle.source import Constant

BUCKETS = {"2k": 18_816, "3k": 36_864, "4k": 65_536}
"""Budgets of tokens of 16x16 pixels: 2688x1792, 3072x3072 and 4096x4096, or as much in another
shape."""

MAX_TOKENS = 1 << 20
"""Largest token budget, 16384x16384."""

CHUNK_TOKENS = 4096
"""Tokens of one call of a per-token stage: they fill a GPU, and their scratch stays small."""

CALIBRATION_FILE = "calibration.json"
"""In a bundle in fp8: what `pid-calibrate` wrote of it."""

STEP_COUNTS = (1, 2, 4)
MAX_FREE_STEPS = 100
"""Most steps of a decode at arbitrary times."""


@dataclass(frozen=True)
class ExportOptions:
    """How a bundle is to be made."""

    precision: str = "fp32"
    """One of `PRECISIONS`: dtype of activations and matrix weights."""
    buckets: tuple[tuple[str, int], ...] = tuple(BUCKETS.items())
    """Names and token budgets."""
    steps: int | None = None
    """Steps of a decode that does not say: 1, 2 or 4, of undistilled networks up to 100; None for
    4, or 25."""
    arbitrary_timesteps: bool = False
    """Keep the timestep network instead of its values at the student's times."""
    undistilled: bool = False
    """Of a network that takes many steps and guidance; implies `arbitrary_timesteps`."""
    chunk_tokens: int = CHUNK_TOKENS
    """Largest number of tokens in one call of a per-token stage."""
    calibration: Calibration | None = None
    """How large numbers are; of fp8 alone, which needs one."""
    keep: tuple[str, ...] = ()
    """Graphs whose products, or attentions, fp8 and int8 do not round."""

    @property
    def rounds(self) -> bool:
        """Whether the precision is one of those that round to 8 bits."""
        return self.precision in ROUNDED_PRECISIONS

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportInputError(
                f"expected precision {_listed(PRECISIONS)}, but got {self.precision!r}"
            )
        needs_calibration = self.precision in FP8_PRECISIONS
        if needs_calibration != (self.calibration is not None) or (self.keep and not self.rounds):
            raise ExportInputError(
                "expected a calibration for fp8 alone, and graphs to keep for fp8 or int8, but got "
                f"precision {self.precision}; pid-calibrate makes one"
            )
        if self.steps is None:
            return
        if self.undistilled and not 0 < self.steps <= MAX_FREE_STEPS:
            raise ExportInputError(
                f"expected from 1 to {MAX_FREE_STEPS} steps, but got {self.steps}; 25 are usual"
            )
        if not self.undistilled and self.steps not in STEP_COUNTS:
            raise ExportInputError(
                f"expected {_listed(STEP_COUNTS)} steps, but got {self.steps}; only undistilled "
                "checkpoints take others"
            )


def parse_buckets(text: str, patch_size: int = 16) -> tuple[tuple[str, int], ...]:
    """Read "2k,4k" or "preview=1024,2k" as budgets of tokens, for a network of this patch size.

    Raises `ExportInputError` for anything else.
    """
    buckets: list[tuple[str, int]] = []
    for part in text.split(","):
        name, given, tokens = part.strip().partition("=")
        if not given and name in BUCKETS:
            buckets.append((name, BUCKETS[name] * 16**2 // patch_size**2))
        elif given and NAME.fullmatch(name) and _is_budget(tokens):
            buckets.append((name, int(tokens)))
        else:
            raise ExportInputError(
                f"expected buckets of {', '.join(BUCKETS)} or NAME=TOKENS, but got {part.strip()!r}"
                "; name them as in preview=4096,4k"
            )
    if len({name for name, _ in buckets}) != len(buckets):
        raise ExportInputError(f"expected every bucket once, but got {text!r}; drop one")
    return tuple(buckets)


def _is_budget(tokens: str) -> bool:
    return re.fullmatch("[0-9]{1,7}", tokens) is not None and 0 < int(tokens) <= MAX_TOKENS


def _listed(values: Iterable[object]) -> str:
    """The values, with "or" before the last."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


def export_bundle(
    output: Path,
    config: PidConfig,
    source: Mapping[str, Tensor],
    options: ExportOptions,
    *,
    checkpoint: Checkpoint | None = None,
    weights: Mapping[str, Any],
    advance: Callable[[float], None] = lambda share: None,
) -> Manifest:
    """Write a bundle to the new folder `output`, whole or not at all.

    source: the checkpoint's tensors by name, read one at a time. checkpoint: what it is a decoder
    for; None for a small configuration. weights: where the values come from, recorded in the
    manifest: {"random_seed": 0} or {"file": name, "sha256": hash}. advance: called with the
    share of the work done since the last call.
    Raises `PidRuntimeError` when `output` exists or cannot be written.
    """
    if config.text_max_length < 2:  # torch.export makes a constant of an axis that is always 1
        raise ExportInputError("expected a text_max_length of at least 2, but got 1")
    takes_any = options.arbitrary_timesteps or options.undistilled
    times = () if takes_any else (timesteps(1)[0], *timesteps(4)[:-1])
    program = build_program(config, options.precision, len(times) or None)
    model = _model(config, checkpoint, weights)
    calibration = options.calibration
    if calibration is not None:
        check_calibration(calibration, model["name"], model["weights"])
    if options.rounds:
        rounded = rounded_of(calibration, program, options.keep)
        program = build_program(config, options.precision, len(times) or None, rounded)
        model["rounding"] = {"kept": list(options.keep)}
    with whole_folder(output) as folder:
        placed, file, hashes = _write_weights(
            folder, config, program, source, options, times, advance
        )
        network = network_of(config)
        exporter = GraphExporter(dimensions_of(network), options.precision)
        files, graphs = {WEIGHTS_FILE: file}, dict[str, Graph]()

        def write(name: str, content: bytes) -> str:
            (folder / name).write_bytes(content)
            files[name] = File(len(content), hashlib.sha256(content).hexdigest())
            return name

        for name, spec in program.graphs.items():
            content = exporter.export(name, spec, placed)
            check_graph(name, content, spec)
            contrib = contrib_graph(name, spec, OPSET)
            graphs[name] = Graph(
                write(f"{name}.onnx", content),
                spec.stage,
                spec.options,
                spec.inputs,
                spec.outputs,
                *hashes[name],
                contrib_file=write(f"{name}.contrib.onnx", contrib) if contrib else None,
            )
            advance((1 - _WEIGHTS_SHARE) / len(program.graphs))
        if calibration is not None:
            text = calibration.to_json().encode()
            model["rounding"] |= {
                "calibration": write(CALIBRATION_FILE, text),
                "inputs": calibration.inputs,
                "percentile": calibration.percentile,
            }
        manifest = Manifest(
            producer=f"pid-trt {version('pid-trt')}",
            model=model,
            precision=options.precision,
            network=network,
            tokens_per_latent=config.tokens_per_latent,
            sampler=_sampler(options, times),
            files=files,
            graphs=graphs,
            buffers=program.buffers,
            buckets=_buckets(config, program, options, len(times) or MAX_FREE_STEPS),
            program=program.sections,
            codec=_codec(checkpoint),
        )
        check_manifest(manifest)
        (folder / MANIFEST_FILE).write_text(manifest.to_json() + "\n", "utf-8")
    return manifest


_WEIGHTS_SHARE = 0.7
"""Share of an export's time that goes into the weights; measured at full size."""


def network_of(config: PidConfig) -> dict[str, Any]:
    """A configuration as the manifest's `network`."""
    return {
        **asdict(config),
        "mlp_hidden": config.mlp_hidden,
        "latent_ratio": config.latent_ratio,
    }


def dimensions_of(network: Mapping[str, Any]) -> Dimensions:
    """The part of a manifest's `network` that stages are built from."""
    return Dimensions(**{field.name: network[field.name] for field in fields(Dimensions)})


def config_of(network: Mapping[str, Any]) -> PidConfig:
    """The configuration a manifest's `network` was written from.

    Raises `ExportInputError` when it does not hold all of it.
    """
    try:
        return PidConfig(**{field.name: network[field.name] for field in fields(PidConfig)})
    except KeyError as error:
        raise ExportInputError(
            f"expected {error} among the network's dimensions in the manifest, but it is absent; "
            "export the bundle again"
        ) from None


def weight_slots(config: PidConfig, program: ProgramSpec, precision: str) -> dict[str, Slot]:
    """What the weights file holds: the folded tables, if any, then the graphs' weights."""
    slots: dict[str, Slot] = {}
    for buffer in program.buffers.values():
        if isinstance(buffer.source, Constant):
            shape = tuple(int(size) for size in buffer.shape)
            slots[buffer.source.tensor] = Slot(torch.float32, shape)
    for name, spec in program.graphs.items():
        for key, parameter in _empty_stage(spec, config, precision).state_dict().items():
            slots[f"{name}.{key}"] = Slot(parameter.dtype, tuple(parameter.shape))
    return slots


def _empty_stage(spec: GraphSpec, config: PidConfig, precision: str) -> torch.nn.Module:
    """A graph's stage without values."""
    with torch.device("meta"):
        return build_stage(spec.stage, spec.options, dimensions_of(network_of(config)), precision)


def _write_weights(
    folder: Path,
    config: PidConfig,
    program: ProgramSpec,
    source: Mapping[str, Tensor],
    options: ExportOptions,
    times: Sequence[float],
    advance: Callable[[float], None],
) -> tuple[dict[str, Placed], File, dict[str, tuple[int, str]]]:
    """Write the weights of all graphs; where they lie, and each graph's bytes and hash."""
    slots = weight_slots(config, program, options.precision)
    total = sum(slot.bytes for slot in slots.values())
    path = folder / WEIGHTS_FILE
    # A little more than the weights, for the graphs and the manifest.
    check_space(folder.parent, total + total // 50, "the bundle", "choose another place with -o")
    hashes: dict[str, tuple[int, str]] = {}
    with WeightsWriter(path, slots, {"format": "pid-bundle"}) as writer:
        if times:
            tables = fold_tables(source, config, times)
            for name in ("modulation", "time_embedding"):
                writer.write(f"table.{name}", tables[name])
        advance(_WEIGHTS_SHARE * (writer.size - writer.data_offset) / total)
        for name, spec in program.graphs.items():
            folded = fold_graph(spec, source, config)
            if options.rounds:
                stage = _empty_stage(spec, config, options.precision)
                folded = fold_rounded(
                    name, stage, folded, port_scales(name, program), options.calibration
                )
            own = [key for key in slots if key.startswith(f"{name}.")]
            if {f"{name}.{key}" for key in folded} != set(own):
                raise AssertionError(f"graph {name}: folded weights are not its stage's parameters")
            digest = hashlib.sha256()
            for key in own:
                digest.update(writer.write(key, folded.pop(key.removeprefix(f"{name}."))))
            own_bytes = sum(slots[key].bytes for key in own)
            hashes[name] = (own_bytes, digest.hexdigest())
            advance(_WEIGHTS_SHARE * own_bytes / total)
        placed = {name: Placed(writer.offsets[name], slot.bytes) for name, slot in slots.items()}
        return placed, File(writer.size, writer.sha256()), hashes


def _buckets(
    config: PidConfig, program: ProgramSpec, options: ExportOptions, rows: int
) -> dict[str, Bucket]:
    buckets: dict[str, Bucket] = {}
    network = network_of(config)
    for name, tokens in options.buckets:
        sizes = sizes_for(network, config.tokens_per_latent, rows, tokens)
        plan = plan_arena(program.buffers, program.sections, sizes)
        chunk = min(tokens, options.chunk_tokens)
        buckets[name] = Bucket(tokens, chunk, plan.arena_bytes, plan.offsets)
    return buckets


def _sampler(options: ExportOptions, times: Sequence[float]) -> Sampler:
    if options.undistilled:
        shift = FlowShift(FLOW_SHIFT, BASE_SIZE)
        steps = options.steps or STEPS
        return Sampler(steps, MAX_FREE_STEPS, (), {}, "dpm++2m", GUIDANCE, shift)
    steps = options.steps or max(STEP_COUNTS)
    if not times:
        return Sampler(steps, MAX_FREE_STEPS, (), {})
    schedules = {
        str(count): tuple(times.index(t) for t in timesteps(count)[:-1]) for count in STEP_COUNTS
    }
    return Sampler(steps, len(times), tuple(times), schedules)


def _model(
    config: PidConfig, checkpoint: Checkpoint | None, weights: Mapping[str, Any]
) -> dict[str, Any]:
    model: dict[str, Any] = {"version": config.version, "weights": dict(weights)}
    if checkpoint is None:
        return {"name": "custom", **model, "latent_convention": "as the network was trained"}
    if checkpoint.name:
        model["checkpoint"] = checkpoint.name
    if "random_seed" not in weights:  # random values are nobody's
        model["weights_license"] = checkpoint.license
    return {
        "name": checkpoint.label,
        **model,
        "space": checkpoint.space.name,
        "variant": checkpoint.variant,
        "variants": sorted(
            {each.variant for each in CHECKPOINTS.values() if each.space == checkpoint.space}
        ),
        "scale": checkpoint.config.scale,
        "distilled": checkpoint.distilled,
        "captioned": checkpoint.captioned,
        **_latents(checkpoint.space),
        "trained_sizes": [list(size) for size in trained_sizes(checkpoint)],
    }


def _latents(space: LatentSpace) -> dict[str, Any]:
    """What a space's latents are; without what is not known of it."""
    comfyui = None
    if space.comfyui == "normalised":
        comfyui = {"factor": [1.0], "shift": [0.0]}
    elif space.comfyui is not None and space.factor is not None and space.shift is not None:
        comfyui = {"factor": list(space.factor), "shift": list(space.shift)}
    known: dict[str, Any] = {
        "latent_convention": space.convention,
        "latent_spread": space.spread and list(space.spread),
        "token_width": space.token_width,
        "comfyui_latent": comfyui,
        "partly_denoised": space.partly_denoised,
    }
    return {name: value for name, value in known.items() if value is not None}


def _codec(checkpoint: Checkpoint | None) -> Codec | None:
    if checkpoint is None or checkpoint.space.std is None:
        return None
    return Codec(PACKED_DCT, checkpoint.space.std)
