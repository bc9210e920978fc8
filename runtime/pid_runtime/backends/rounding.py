"""Numbers of 8 bits in stages: products of rounded matrices, and what rounds them.

A number is stored as x / scale in `float8_e4m3fn` (OCP 8-bit floating point, revision 1.0): three
bits of mantissa, at most 448 in size. Scales are powers of two: multiplying by them is exact in
every float, so that all backends round the same numbers to the same, and what it costs is at most
one power of two at the lower end of the range. Activations have one scale for a tensor, known
beforehand; weights have one for every output. Weights alone may also be integers of 8 bits, whose
scales are any numbers.

The exporter writes the two operations as ONNX's QuantizeLinear and DequantizeLinear, which
compilers look for.
"""

import torch
from torch import Tensor, nn

from pid_runtime.backends.operations import operation

FP8 = torch.float8_e4m3fn
INT8 = torch.int8
LARGEST = 448.0
"""The largest number of E4M3."""
LARGEST_INTEGER = 127

SMALLEST_PRODUCT = 64
"""Least inputs and outputs of a matrix that is worth rounding."""


@operation(
    "quantize(Tensor x, Tensor scale) -> Tensor",
    lambda x, scale: torch.empty_like(x, dtype=FP8),
)
def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """X / scale as FP8, of any shape; what is too large becomes the largest. scale: `[]`."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(FP8)


@operation(
    "dequantize(Tensor x, Tensor scale) -> Tensor",
    lambda x, scale: torch.empty_like(x, dtype=scale.dtype),
)
def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """8-bit numbers as those of the scale's dtype; scale `[]`, or one for each of the last axis."""
    return x.to(scale.dtype) * scale


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """A tensor rounded to FP8, in the dtype of its scale; one that comes as FP8 is read so."""
    return dequantize(x if x.dtype == FP8 else quantize(x, scale), scale)


class Rounded(nn.Module):
    """As `rounded`, with a scale of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.scale)


class Quantized(nn.Module):
    """A tensor as FP8 numbers, for a buffer that holds those."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return quantize(x, self.scale)


class RoundedLinear(nn.Module):
    """x @ weight + bias, with an 8-bit `weight` `[inputs, outputs]` and a scale for each output."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        stored: torch.dtype,
        bias: bool = True,
    ) -> None:
        """stored: `FP8` or `INT8`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, dtype=stored), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product = x @ dequantize(self.weight, self.weight_scale)
        return product if self.bias is None else product + self.bias


def round_weights(weight: Tensor, stored: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights `[inputs, outputs]` and scales `[outputs]` of a `RoundedLinear`, the least that hold.

    weight: float32. stored: `FP8`, whose scales are powers of two, or `INT8`. dtype: the scales'.
    """
    sizes = weight.abs().amax(dim=0).clamp_min(1e-30)  # of nothing, too, a scale that is not 0
    if stored == FP8:
        scale = (sizes.double() / LARGEST).log2().ceil().exp2().to(dtype)
        return (weight / scale.float()).to(FP8), scale
    scale = (sizes / LARGEST_INTEGER).to(dtype)
    rounded_weight = (weight / scale.float()).round().clamp(-LARGEST_INTEGER, LARGEST_INTEGER)
    return rounded_weight.to(INT8), scale


def is_rounded(inputs: int, outputs: int) -> bool:
    """Whether a matrix is large enough to be rounded."""
    return min(inputs, outputs) >= SMALLEST_PRODUCT
