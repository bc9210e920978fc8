"""Compares a bundle, stage by stage and as a whole, with the reference network.

A stage is given the reference's own inputs, so its error is its own; the whole decode then shows
how errors add up. The reference runs first and is released before the bundle is opened.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pid_export.bundle import config_of
from pid_export.errors import ExportInputError
from pid_export.fold import fold_tables
from pid_export.reference import Values, reference_buffers
from pid_ref.checkpoint import checkpoint_file, read_checkpoint, state_shapes
from pid_ref.config import PidConfig
from pid_ref.guided_sampler import sample_guided
from pid_ref.hub import cached
from pid_ref.network import PidNet
from pid_ref.registry import CHECKPOINTS
from pid_ref.sampler import sample, timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.backends.memory import Memory
from pid_runtime.backends.rounding import LARGEST
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.manifest import FP8, Buffer, Manifest, Noise, Run, runs_of
from pid_runtime.bundle.sizes import Sizes, sizes_of_request
from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import NotFiniteError
from pid_runtime.interpreter import Program, graph_calls
from pid_runtime.request import check_fits
from pid_runtime.schedule import update_factors

TOLERANCES = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "fp8": 0.5,
    "fp8-fp32": 0.5,
    "int8": 0.2,
    "int8-fp32": 0.2,
}
"""Largest error that passes, by precision, relative to the reference's RMS (at least 1)."""

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Comparison:
    """The error of one output against the reference."""

    name: str
    max_abs_error: float
    """Infinite when the output holds a NaN or infinity."""
    percentiles: tuple[float, ...]
    """Absolute error at `PERCENTILES`."""
    scale: float
    """Root mean square of the reference's values."""
    worst: tuple[int, ...]
    """Index of the largest error."""
    passed: bool


@dataclass(frozen=True)
class DecodeInputs:
    """What one decode to verify is given, as numpy arrays, float32."""

    latent: NDArray[np.float32]
    caption: NDArray[np.float32]
    sigma: NDArray[np.float32]
    noise: list[NDArray[np.float32]]
    """The initial noise `[B, 3, H, W]`, then what is added after each step but the last."""
    negative: NDArray[np.float32] | None = None
    """Of bundles that take guidance."""


def compare(
    name: str, got: NDArray[Any], want: NDArray[np.float32], tolerance: float
) -> Comparison:
    """Error distribution of an output; `tolerance` is relative to the reference's scale (or 1)."""
    want = want.reshape(got.shape)
    scale = float(np.sqrt(np.mean(np.square(want, dtype=np.float64))))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float32) - want)
    error = np.nan_to_num(error, nan=np.inf, posinf=np.inf)
    largest = float(error.max())
    finite = math.isfinite(largest)
    return Comparison(
        name,
        largest,
        tuple(float(p) for p in np.percentile(error, PERCENTILES)) if finite else (math.inf,) * 4,
        scale,
        tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape)),
        finite and largest <= tolerance * max(1.0, scale),
    )


def reference_network(manifest: Manifest, checkpoint: Path | None) -> PidNet:
    """The network a bundle was made from, in float32, with the same weights.

    checkpoint: the file it was exported from; not needed for random weights, for those that are
    part of this package, nor for those that the hub's cache has.
    Raises `ExportInputError` when the weights are needed and not given, are others, or are given
    and not needed.
    """
    config = config_of(manifest.network)
    match manifest.model.get("weights"):
        case {"random_seed": int(seed)}:
            if checkpoint is not None:
                raise ExportInputError(
                    "expected no checkpoint, as this bundle's weights are random, but got "
                    f"{checkpoint}; leave --checkpoint out"
                )
            return load_network(config, RandomWeights(state_shapes(config), seed))
        case {"file": str(name), "sha256": str(sha256)}:
            known = CHECKPOINTS.get(str(manifest.model.get("checkpoint")))
            if checkpoint is None and known is not None:
                checkpoint = known.file or cached(known)
            if checkpoint is None:
                raise ExportInputError(
                    f"expected the checkpoint this bundle was made from, {name}, but got none; "
                    "add --checkpoint PATH"
                )
            file = checkpoint_file(checkpoint)
            if file_sha256(file) != sha256:
                raise ExportInputError(
                    f"expected the checkpoint this bundle was made from, {name}, but got other "
                    f"contents in {file}; pass that file, or export this one"
                )
            return load_network(config, read_checkpoint(checkpoint, config))
        case _:
            raise ExportInputError(
                "expected a bundle that says where its weights came from, but this one does not; "
                "export it again"
            )


def load_network(config: PidConfig, source: Mapping[str, Tensor]) -> PidNet:
    """A float32 network with these weights."""
    with torch.device("meta"):
        net = PidNet(config)
    net.load_state_dict({name: source[name].float() for name in source}, assign=True)
    return net.eval().requires_grad_(False)


def random_inputs(
    manifest: Manifest, height: int, width: int, seed: int, steps: int
) -> DecodeInputs:
    """A decode of normal random inputs at `height` x `width` pixels.

    Raises `ExportInputError` for a size the network cannot make, `PidRuntimeError` for one that
    no bucket holds.
    """
    config = config_of(manifest.network)
    multiple, size = config.size_multiple, config.latent_size(height, width)
    if size is None:
        smaller = "x".join(str(multiple * max(1, side // multiple)) for side in (width, height))
        raise ExportInputError(
            f"expected width and height to be multiples of {multiple}, but got {width}x{height}; "
            f"{smaller} is the next smaller size"
        )
    check_fits(manifest, *size)
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    inputs = DecodeInputs(
        normal(1, config.latent_channels, *size),
        normal(1, config.text_max_length, config.text_dim),
        np.array([0.2], np.float32),
        [normal(1, 3, height, width) for _ in range(steps)],
    )
    if manifest.sampler.guidance == 1:
        return inputs
    return replace(inputs, negative=normal(1, config.text_max_length, config.text_dim))


def reference_image(
    manifest: Manifest, net: PidNet, inputs: DecodeInputs, times: list[float]
) -> NDArray[np.float32]:
    """What the reference decodes, by the bundle's rule and guidance, `[B, 3, H, W]`."""
    if inputs.negative is None:
        return reference_images(net, inputs, times)[-1]
    image = sample_guided(
        net,
        torch.from_numpy(inputs.latent),
        torch.from_numpy(inputs.caption),
        torch.from_numpy(inputs.negative),
        torch.from_numpy(inputs.sigma),
        torch.from_numpy(inputs.noise[0]),
        guidance=manifest.sampler.guidance,
        times=times,
    )
    return image.numpy()


def reference_images(
    net: PidNet, inputs: DecodeInputs, times: list[float]
) -> list[NDArray[np.float32]]:
    """The reference's state `[B, 3, H, W]` after every step."""
    states: list[NDArray[np.float32]] = []
    noise = [torch.from_numpy(n) for n in inputs.noise]
    sample(
        net,
        torch.from_numpy(inputs.latent),
        torch.from_numpy(inputs.caption),
        torch.from_numpy(inputs.sigma),
        noise[0],
        noise[1:],
        times=times,
        on_step=lambda _step, _v, x: states.append(x.numpy().copy()),
    )
    return states


def stage_values(
    manifest: Manifest, net: PidNet, inputs: DecodeInputs, times: list[float]
) -> tuple[Values, Sizes]:
    """Reference values of every buffer in the first step of a decode of one image.

    Raises `ExportInputError` when the program's buffers are not those of the network.
    """
    _, _, h, w = inputs.latent.shape
    known = manifest.sampler.times
    sizes = sizes_of_request(
        manifest.network,
        manifest.tokens_per_latent,
        batch=1,
        latent_height=h,
        latent_width=w,
        text_tokens=inputs.caption.shape[1],
        rows=len(known) or len(times) - 1,
    ).extended({}, row=known.index(times[0]) if known else 0)
    values = reference_buffers(
        net,
        sizes,
        torch.from_numpy(inputs.noise[0]),
        times[0],
        torch.from_numpy(inputs.caption),
        torch.from_numpy(inputs.latent),
        torch.from_numpy(inputs.sigma),
        torch.from_numpy(inputs.noise[-1]),
        torch.tensor(update_factors(times[0], times[1], "sde")),
    )
    _check_program(manifest, values, sizes)
    return values, sizes


def _check_program(manifest: Manifest, values: Values, sizes: Sizes) -> None:
    """Raise `ExportInputError` unless all outputs are written and `values` fit the buffers."""
    instructions = list(manifest.instructions())
    runs = [each for each in instructions if isinstance(each, Run)]
    written = {operand.buffer for run in runs for operand in run.outputs.values()}
    for name, buffer in manifest.buffers.items():
        if buffer.kind == "output" and name not in written:
            raise ExportInputError(
                f"expected a graph that writes {name!r}, but the program has none; "
                "export the bundle again"
            )
    read = {operand.buffer for run in runs for operand in run.inputs.values()}
    buffers = {name: name for name in sorted(written | read)}
    buffers |= {
        f"{each.target}_image": each.target for each in instructions if isinstance(each, Noise)
    }
    for value, name in buffers.items():
        buffer = manifest.buffers[name]
        count = math.prod(sizes.shape(buffer.shape))
        known = value in values and values[value].numel() == count
        if buffer.kind != "table" and not known:
            raise ExportInputError(
                f"expected the buffers of the network in the manifest, but got {name!r} of "
                f"{count} values; export the bundle again"
            )


def verify_sampler(
    manifest: Manifest, net: PidNet, constants: Mapping[str, NDArray[np.float32]]
) -> Iterator[Comparison]:
    """Compare the times of every schedule, and what is folded for them, with the reference's.

    A decode visits the times of one schedule only.
    """
    sampler = manifest.sampler
    if not sampler.times:
        return
    tolerance = TOLERANCES["fp32"]
    for steps, rows in sampler.schedules.items():
        got = np.array([sampler.times[row] for row in rows], np.float32)
        want = np.array(timesteps(int(steps))[:-1], np.float32)
        yield compare(f"schedule {steps}", got, want, tolerance)
    for name, table in fold_tables(net.state_dict(), net.config, sampler.times).items():
        if name in constants:
            yield compare(f"table {name}", constants[name], table.numpy(), tolerance)


def verify_stages(bundle: Bundle, values: Values, sizes: Sizes) -> Iterator[Comparison]:
    """Run every graph on the reference's inputs and compare its outputs, one after another.

    An engine set's own program, which keeps less, is not run as it is: every instruction of the
    bundle's is, in slices as there.
    """
    manifest, memory = bundle.manifest, bundle.graphs.memory()
    graphs = bundle.graphs.graphs(memory)
    bucket = graphs.bucket_for(sizes.value("L"))
    if bundle.graphs.manifest is not manifest:
        manifest = _sliced_as(bundle.graphs.manifest, manifest)
        own = manifest.bucket_for(sizes.value("L"))[1]
        bucket = replace(own, chunk_tokens=min(own.chunk_tokens, bucket.chunk_tokens))
    needed = Program.arena_bytes(bucket, sizes)
    graphs.prepare(graph_calls(manifest, bucket, sizes), needed, sizes.value("B"))
    block = memory.allocate(needed)
    program = Program(manifest, graphs, memory, bucket, sizes, block, bundle.constants)
    tolerance = TOLERANCES[manifest.precision]
    for instruction in manifest.instructions():
        if isinstance(instruction, Noise):
            program.load_noise(instruction, values[f"{instruction.target}_image"].numpy())
            got = memory.read(program.buffer(instruction.target))
            yield compare(instruction.graph, got, values[instruction.target].numpy(), tolerance)
        if not isinstance(instruction, Run):
            continue
        graph = manifest.graphs[instruction.graph]
        for operand in instruction.inputs.values():
            buffer = manifest.buffers[operand.buffer]
            if buffer.kind not in ("table", "constant"):
                value = as_stored(values[operand.buffer].numpy(), buffer)
                memory.write(program.buffer(operand.buffer), value)
        views = {name: program.view(instruction, name, sizes) for name in instruction.outputs}
        for name, view in views.items():  # what a graph leaves unwritten must not pass
            _spoil(memory, view, graph.outputs[name].dtype)
        for call in program.bind_run(instruction, sizes):
            call()
        for name, view in views.items():
            operand = instruction.outputs[name]
            buffer = manifest.buffers[operand.buffer]
            got = memory.read(view)
            got = got * buffer.scale if buffer.dtype == FP8 else got
            at = sizes.index(buffer.shape, operand.start)
            want = values[operand.buffer].numpy().reshape(-1)[at : at + got.size]
            yield compare(f"{instruction.graph} {operand.buffer}", got, want, tolerance)
    # A decode may be given this memory next: it must not find the right values there.
    for name, buffer in manifest.buffers.items():
        if buffer.kind in ("temporary", "output"):
            _spoil(memory, program.buffer(name), buffer.dtype)
    graphs.close()


def _sliced_as(run: Manifest, manifest: Manifest) -> Manifest:
    """The manifest with its graphs cut as a manifest of the same graphs cuts them."""
    chunks = {each.graph: each.chunk for part in run.instructions() for each in runs_of(part)}
    program = {
        section: tuple(
            replace(each, chunk=chunks.get(each.graph, each.chunk))
            if isinstance(each, Run)
            else each
            for each in instructions
        )
        for section, instructions in manifest.program.items()
    }
    return replace(manifest, program=program)


def as_stored(values: NDArray[np.float32], buffer: Buffer) -> NDArray[np.float32]:
    """Values as a buffer has them: of 8-bit ones what is too large is the largest."""
    if buffer.dtype != FP8:
        return values
    return np.clip(values / np.float32(buffer.scale), -LARGEST, LARGEST, dtype=np.float32)


def _spoil(memory: Memory, tensor: Any, dtype: str) -> None:
    """Fill a tensor with NaN; bytes with 255, four of which are a NaN to whoever has them next."""
    garbage = np.uint8(255) if dtype == "uint8" else np.float32(np.nan)
    memory.write(tensor, np.full(tuple(tensor.shape), garbage))


def verify_decode(
    decoder: Decoder, inputs: DecodeInputs, times: list[float], want: NDArray[np.float32]
) -> Comparison:
    """Compare a whole decode's final image with the reference's."""
    known = bool(decoder.manifest.sampler.times)
    try:
        got = decoder.decode(
            inputs.latent,
            inputs.caption,
            sigma=inputs.sigma,
            noise=inputs.noise[0],
            step_noise=None if inputs.negative is not None else inputs.noise[1:],
            negative=inputs.negative,
            steps=len(times) - 1 if known else None,
            times=None if known else times,
        )
    except NotFiniteError:
        got = np.full_like(want, np.nan)
    # Guidance makes every difference of the two branches so many times larger.
    tolerance = TOLERANCES[decoder.manifest.precision] * decoder.manifest.sampler.guidance
    return compare("whole decode", got, np.clip(want, -1, 1), tolerance)
