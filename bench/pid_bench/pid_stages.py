"""The work of a PiD decode: of the network as it stands, and of our program of stages."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pid_bench.stage import Stage, normal
from pid_bench.work import NO_WORK, Work, count_calls, total
from pid_export.bundle import STEP_COUNTS, dimensions_of, network_of
from pid_export.calibration import rounded_of
from pid_export.program import ProgramSpec, build_program
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_runtime.backends.stages import DTYPES, build_stage
from pid_runtime.bundle.manifest import FP8_PRECISIONS, INT8_PRECISIONS, Run
from pid_runtime.bundle.sizes import ITEM_BYTES, sizes_of_request

CAPTION_TOKENS = 300
"""Text tokens of a caption embedding as the release makes them."""

KNOWN_TIMES = 1 + max(STEP_COUNTS)
"""Rows of a bundle's modulation table: the single step's time, and those of four steps."""


def caption_tokens_of(config: PidConfig) -> int:
    """Text tokens that decodes with a network are measured with."""
    return min(CAPTION_TOKENS, config.text_max_length)


def reference_step(
    config: PidConfig,
    height: int,
    width: int,
    caption_tokens: int,
    steps: int = 1,
) -> Stage:
    """The reference network at `height` x `width` output pixels, called once per step.

    Raises `PidInputError` unless both are multiples of the network's `size_multiple`.
    """
    h, w = _latent_size(config, height, width)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (
            normal((1, 3, height, width), device, dtype),
            torch.full((1,), 999.0, device=device),
            normal((1, caption_tokens, config.text_dim), device, dtype, seed=1),
            normal((1, config.latent_channels, h, w), device, dtype, seed=2),
            torch.zeros(1, device=device),
        )

    return Stage("pid step", lambda: PidNet(config), inputs, steps=steps)


def program_works(
    config: PidConfig,
    height: int,
    width: int,
    caption_tokens: int,
    steps: int = 4,
    precision: str = "bf16",
    kept: Iterable[str] = (),
) -> dict[str, dict[str, Work]]:
    """A decode by our program, by section and graph: `steps` steps, all else once.

    The modulation table is "table" of the steps. precision: as bundles have it. kept: graphs that
    are not rounded to 8 bits, in a precision that rounds.
    Every graph is counted on all tokens at once: chunks have the same FLOP, but read their weights
    again. Raises `PidInputError` unless height and width are multiples of the network's
    `size_multiple`.
    """
    h, w = _latent_size(config, height, width)
    network = network_of(config)
    dimensions = dimensions_of(network)
    program = _program(config, precision, kept)
    sizes = sizes_of_request(
        network,
        config.tokens_per_latent,
        batch=1,
        latent_height=h,
        latent_width=w,
        text_tokens=caption_tokens,
        rows=KNOWN_TIMES,
    )
    sections: dict[str, dict[str, Work]] = {}
    for section, times in (("prologue", 1), ("step", steps), ("image", 1)):
        works = sections[section] = {"table": _table(program)} if section == "step" else {}
        for run in program.sections[section]:
            if isinstance(run, Run):
                spec = program.graphs[run.graph]
                local = sizes.extended(run.dims)
                with torch.device("meta"):
                    stage = build_stage(spec.stage, spec.options, dimensions, precision)
                    inputs = {
                        name: torch.empty(local.shape(port.shape), dtype=DTYPES[port.dtype])
                        for name, port in spec.inputs.items()
                    }
                # Only attention is run more than once in a step, and it has no parameters.
                work = count_calls(stage, (), inputs, times)
                works[run.graph] = total([work, works.get(run.graph, NO_WORK)])
    return sections


class _AnyScales:
    """Scales, which make no difference to the work."""

    def scale(self, name: str) -> float:
        return 1.0


def _program(config: PidConfig, precision: str, kept: Iterable[str]) -> ProgramSpec:
    """The program of a bundle that does not round these graphs to 8 bits."""
    program = build_program(config, precision, KNOWN_TIMES)
    if precision not in (*INT8_PRECISIONS, *FP8_PRECISIONS):
        return program
    scales = _AnyScales() if precision in FP8_PRECISIONS else None
    return build_program(config, precision, KNOWN_TIMES, rounded_of(scales, program, kept))


def _table(program: ProgramSpec) -> Work:
    """What the bundle keeps instead of the timestep network: weights that no graph holds."""
    sizes = [
        (buffer.dtype, math.prod(int(size) for size in buffer.shape))
        for buffer in program.buffers.values()
        if buffer.kind == "constant"
    ]
    return Work(
        flop=0,
        parameters=sum(count for _, count in sizes),
        weight_bytes=sum(ITEM_BYTES[dtype] * count for dtype, count in sizes),
        bytes_moved=0,
    )


def _latent_size(config: PidConfig, height: int, width: int) -> tuple[int, int]:
    size = config.latent_size(height, width)
    if size is None:
        raise PidInputError(
            f"expected width and height in multiples of {config.size_multiple}, "
            f"but got {width}x{height}"
        )
    return size
