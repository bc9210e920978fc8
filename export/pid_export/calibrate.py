"""Measuring on decodes: how large numbers are, how many a scale cuts off, what rounding costs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pid_export.bundle import dimensions_of
from pid_export.calibration import (
    ROUNDED_STAGES,
    Calibration,
    attention_scales,
    fold_rounded,
)
from pid_export.errors import ExportInputError
from pid_runtime.backends.rounding import FP8, LARGEST, Quantized, Rounded
from pid_runtime.backends.stages import RoundedAttention, build_stage
from pid_runtime.backends.torch import LoadedStages
from pid_runtime.bundle.manifest import ROUNDED_PRECISIONS, Manifest
from pid_runtime.command.decode_jobs import Inputs, Settings, request_of
from pid_runtime.decoder import Bundle

MOST_CLIPPED = 1e-3
"""Largest share of the numbers of one tensor that may be too large for its scale."""


def calibrate(
    bundle: Path,
    inputs: Sequence[Inputs],
    *,
    described: str,
    percentile: float = 100.0,
    keep: Sequence[str] = (),
    advance: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Measure the numbers of a bundle that rounds nothing, on decodes by torch on the CPU.

    described: what the inputs are, in words. percentile: of each call's values, in size; 100 for
    the largest. keep: graphs that are better not rounded. advance: called after every decode with
    its share of all.
    Files are not hashed: whoever has the bundle has just read or written it.
    Raises `ExportInputError` for a bundle in fp8, and when a number is not finite.
    """
    with Bundle.open(bundle, "torch", "cpu", verify=False) as opened:
        check_unrounded(opened.manifest)
        sizes: dict[str, float] = {}
        for name, place in _places(opened, nn.Identity):
            place.register_forward_hook(_measure(sizes, name, percentile))
        for _ in decode_all(opened, inputs):
            advance(1 / len(inputs))
        model = opened.manifest.model
    origin = model["name"], model["weights"], described, len(inputs)
    return Calibration(*origin, percentile, tuple(keep), sizes)


def decode_all(bundle: Bundle, inputs: Sequence[Inputs]) -> Iterator[NDArray[np.float32]]:
    """Decode inputs one after another, each with its index as the seed: `[B, 3, H, W]`."""
    with bundle.decoder() as decoder:
        for seed, each in enumerate(inputs):
            yield decoder.run(request_of(bundle.manifest, each, Settings(), seed))


def check_unrounded(manifest: Manifest) -> None:
    """Raise `ExportInputError` for a bundle that rounds already."""
    if manifest.precision in ROUNDED_PRECISIONS:
        raise ExportInputError(
            f"expected a bundle in fp32, fp16 or bf16, but got {manifest.precision}, whose numbers "
            "are rounded already; export it again without --precision"
        )


def _places(bundle: Bundle, *kinds: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of these kinds in the stages of a bundle in torch, by graph and place."""
    loaded = bundle.graphs
    assert isinstance(loaded, LoadedStages)
    for graph, stage in loaded.stages.items():
        for name, module in stage.named_modules():
            if isinstance(module, kinds):
                yield ".".join(filter(None, (graph, name))), module


def _measure(sizes: dict[str, float], name: str, percentile: float) -> Callable[..., None]:
    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        size = size_of(output, percentile)
        if not math.isfinite(size):
            raise ExportInputError(
                f"expected finite numbers to calibrate on, but got NaN or infinity at {name}; "
                "check the latents, and the weights"
            )
        sizes[name] = max(sizes.get(name, 0.0), size)

    return keep


def clipped_shares(
    bundle: Path,
    inputs: Sequence[Inputs],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """What share of the numbers was too large for its scale, in one call at most, by place.

    bundle: in fp8, decoded by torch on the CPU. Raises `NotFiniteError` for NaN in an image.
    """
    with Bundle.open(bundle, "torch", "cpu", verify=False) as opened:
        shares: dict[str, float] = {}
        count_clipped(opened, shares)
        for _ in decode_all(opened, inputs):
            advance(1 / len(inputs))
    return shares


def count_clipped(opened: Bundle, shares: dict[str, float]) -> None:
    """Fill `shares` with the same as a bundle in fp8, opened in torch, decodes from now on."""
    for name, place in _places(opened, Rounded, Quantized, RoundedAttention):
        place.register_forward_hook(_count_clipped(shares, name))


def most_clipped(shares: Mapping[str, float]) -> tuple[str, float]:
    """The place of which the largest share was too large; "" and 0 where there are none."""
    name = max(shares, key=lambda each: shares[each], default="")
    return name, shares.get(name, 0.0)


def check_clipped(shares: Mapping[str, float]) -> None:
    """Raise `ExportInputError` when too many numbers of one place were too large."""
    name, share = most_clipped(shares)
    if share > MOST_CLIPPED:
        raise ExportInputError(
            f"expected at most {MOST_CLIPPED:.1%} of the numbers beyond FP8's range, but got "
            f"{share:.1%} at {name}; calibrate with more or other latents, with "
            "--percentile 100, or leave that graph as it is with --keep"
        )


def _count_clipped(shares: dict[str, float], name: str) -> Callable[..., None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dtype == FP8:
            clipped = output.float().abs() >= LARGEST
        elif isinstance(module, Rounded) and inputs[0].dtype != FP8:
            clipped = inputs[0].float().abs() > LARGEST * module.scale.float()
        else:
            return
        shares[name] = max(shares.get(name, 0.0), float(clipped.float().mean()))

    return count


@dataclass(frozen=True)
class Cost:
    """What it costs to round one graph alone."""

    graph: str
    rms: float
    """Root mean square of the difference of the images, in [-1, 1]."""

    @property
    def psnr(self) -> float:
        """The same in dB; infinite for no difference."""
        return math.inf if self.rms == 0 else 20 * math.log10(2 / self.rms)


def sensitivity(
    bundle: Path,
    calibration: Calibration,
    inputs: Sequence[Inputs],
    advance: Callable[[float], None] = lambda share: None,
) -> list[Cost]:
    """What it costs to round each graph of a bundle alone, on decodes by torch on the CPU.

    bundle: in fp32, fp16 or bf16. The most expensive first.
    """
    with Bundle.open(bundle, "torch", "cpu", verify=False) as opened:
        manifest, loaded = opened.manifest, opened.graphs
        check_unrounded(manifest)
        assert isinstance(loaded, LoadedStages)
        wanted = list(decode_all(opened, inputs))
        names = [name for name, graph in manifest.graphs.items() if graph.stage in ROUNDED_STAGES]
        costs: list[Cost] = []
        for name in names:
            exact = loaded.stages[name]
            loaded.stages[name] = _rounded_stage(manifest, name, exact, calibration)
            squares = [
                float(np.square(got - want, dtype=np.float64).mean())
                for got, want in zip(decode_all(opened, inputs), wanted, strict=True)
            ]
            loaded.stages[name] = exact
            costs.append(Cost(name, math.sqrt(sum(squares) / len(squares))))
            advance(1 / len(names))
    return sorted(costs, key=lambda cost: -cost.rms)


def _rounded_stage(
    manifest: Manifest, name: str, exact: nn.Module, calibration: Calibration
) -> nn.Module:
    """A graph's stage that rounds inside, and takes and leaves what the exact one does."""
    graph, network = manifest.graphs[name], dimensions_of(manifest.network)
    if graph.stage == "attention":
        options = {**graph.options, "fp8_scales": attention_scales(name, calibration)}
        return build_stage(graph.stage, options, network, manifest.precision)
    with torch.device("meta"):
        options = {**graph.options, "rounding": ["products"]}
        stage = build_stage(graph.stage, options, network, manifest.precision)
    folded = fold_rounded(name, stage, exact.state_dict(), {}, calibration)
    own = {key: folded[key].to(value.dtype) for key, value in stage.state_dict().items()}
    stage.load_state_dict(own, assign=True)
    return stage.eval().requires_grad_(requires_grad=False)


def size_of(values: Tensor, percentile: float) -> float:
    """A percentile of how large values are, from 0 to 100."""
    flat = values.detach().float().abs().flatten()
    if percentile == 100 or not bool(flat.isfinite().all()):
        return float(flat.max())
    return float(flat.kthvalue(max(1, math.ceil(percentile / 100 * flat.numel()))).values)
