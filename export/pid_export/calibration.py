"""How large the numbers are that fp8 rounds, as a file, and the scales that follow."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pid_export.errors import ExportInputError
from pid_export.program import ProgramSpec, RoundedParts
from pid_runtime.backends.rounding import (
    LARGEST,
    Quantized,
    Rounded,
    RoundedLinear,
    round_weights,
)
from pid_runtime.backends.stages import ATTENTION_ENDS
from pid_runtime.bundle.manifest import FP8 as FP8_NAME
from pid_runtime.bundle.manifest import Run

WEIGHT_SCALE = 2.0**-8
"""Of an attention's weights, which are at most 1."""

PIXEL_STAGES = ("pixel_first", "pixels", "update")
ROUNDED_STAGES = ("attention", "tokens", *PIXEL_STAGES)

FORMAT = "pid-calibration"
FORMAT_VERSION = (1, 0)


@dataclass(frozen=True)
class Calibration:
    """The size of every tensor that fp8 may round, in decodes of one network."""

    model: str
    """Name of the network, as in a bundle's manifest."""
    weights: dict[str, Any]
    """Where its values come from, as there."""
    inputs: str
    """What was decoded, in words."""
    count: int
    """How many decodes."""
    percentile: float
    """Of each call's values, in size; 100 is the largest."""
    keep: tuple[str, ...]
    """Graphs that are better not rounded, which an export that does not say leaves as they are."""
    sizes: dict[str, float]
    """The percentile, at most over all calls, by the graph and the place in its stage."""

    def to_json(self) -> str:
        """The text of a calibration file."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps({**head, **asdict(self)}, indent=1) + "\n"

    def scale(self, name: str) -> float:
        """What numbers at a place are divided by, a power of two.

        Raises `ExportInputError` for a place that was not measured.
        """
        if name not in self.sizes:
            raise ExportInputError(
                f"expected a calibration of every graph, but got none of {name}; "
                "make one with pid-calibrate"
            )
        return scale_of(self.sizes[name])


def scale_of(size: float) -> float:
    """The least power of two by which numbers of this size become no more than FP8's largest."""
    return 2.0 ** math.ceil(math.log2(size / LARGEST)) if size > 0 else 1.0


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises `ExportInputError` when it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT or found["format_version"][0] != FORMAT_VERSION[0]:
            raise ValueError(f"its format is {found['format']} {found['format_version']}")
        sizes = {str(name): float(size) for name, size in found["sizes"].items()}
        if not all(math.isfinite(size) and size >= 0 for size in sizes.values()):
            raise ValueError("a size is negative, infinite or NaN")
        return Calibration(
            str(found["model"]),
            dict(found["weights"]),
            str(found["inputs"]),
            int(found["count"]),
            float(found["percentile"]),
            tuple(str(name) for name in found.get("keep", ())),
            sizes,
        )
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ExportInputError(
            f"expected a calibration that pid-calibrate wrote, but got {path}: {reason}"
        ) from None


def check_calibration(calibration: Calibration, model: str, weights: Mapping[str, Any]) -> None:
    """Raise `ExportInputError` for a calibration of another network, or of other weights."""
    if (calibration.model, calibration.weights) != (model, dict(weights)):
        raise ExportInputError(
            f"expected a calibration of {model} with weights {_words(weights)}, but got one of "
            f"{calibration.model} with {_words(calibration.weights)}; make one with pid-calibrate"
        )


def _words(weights: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in weights.items())


class Scales(Protocol):
    """Of a `Calibration`, or of what stands for one where scales make no difference."""

    def scale(self, name: str) -> float:
        """What numbers at a place are divided by."""
        ...


def rounded_of(
    calibration: Scales | None, program: ProgramSpec, keep: Iterable[str]
) -> RoundedParts:
    """What a program rounds, all but the graphs to keep: weights alone without a calibration.

    Raises `ExportInputError` for a graph that the program has not, or never rounds.
    """
    kept = frozenset(keep)
    roundable = [name for name, spec in program.graphs.items() if spec.stage in ROUNDED_STAGES]
    unknown = kept.difference(roundable)
    if unknown:
        raise ExportInputError(
            f"expected graphs to keep of {', '.join(roundable)}, but got {min(unknown)!r}"
        )
    if calibration is None:
        return RoundedParts(kept, weights=True)
    attentions = {
        name: attention_scales(name, calibration)
        for name in roundable
        if program.graphs[name].stage == "attention" and name not in kept
    }
    pixels = [name for name in roundable if program.graphs[name].stage in PIXEL_STAGES]
    told = None if kept.intersection(pixels) else calibration.scale(f"{pixels[0]}.s")
    return RoundedParts(kept, attentions=attentions, told=told)


def attention_scales(name: str, calibration: Scales) -> dict[str, float]:
    """The scales of an attention graph, as `stages.RoundedAttention` takes them."""
    ends = {end: calibration.scale(f"{name}.ends.{end}") for end in ATTENTION_ENDS}
    return {**ends, "weights": WEIGHT_SCALE}


def fold_rounded(
    graph: str,
    stage: nn.Module,
    folded: Mapping[str, Tensor],
    scales: Mapping[str, float],
    calibration: Calibration | None,
) -> dict[str, Tensor]:
    """A graph's folded weights as its stage has them, some of them rounded to 8 bits.

    stage: the module, with values or without. folded: float32, by name. scales: `port_scales`.
    """
    found = dict(folded)
    for name, module in stage.named_modules():
        if isinstance(module, RoundedLinear):
            weight, scale = round_weights(
                found[f"{name}.weight"].float(), module.weight.dtype, module.weight_scale.dtype
            )
            found[f"{name}.weight"], found[f"{name}.weight_scale"] = weight, scale
        elif isinstance(module, (Rounded, Quantized)):
            end = name.rpartition(".")[2]
            assert calibration is not None
            scale = scales.get(end) or calibration.scale(f"{graph}.{name}")
            found[f"{name}.scale"] = torch.tensor(scale)
    return found


def port_scales(graph: str, program: ProgramSpec) -> dict[str, float]:
    """The scales of a graph's 8-bit inputs and outputs, by port."""
    for section in program.sections.values():
        for each in section:
            if isinstance(each, Run) and each.graph == graph:
                buffers = {
                    name: program.buffers[operand.buffer]
                    for name, operand in {**each.inputs, **each.outputs}.items()
                }
                return {name: b.scale for name, b in buffers.items() if b.dtype == FP8_NAME}
    return {}
