"""Rounding to 8 bits, as NumPy's extension types do it."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pid_runtime.backends.rounding import (
    FP8,
    INT8,
    LARGEST,
    Quantized,
    Rounded,
    RoundedLinear,
    dequantize,
    is_rounded,
    quantize,
    round_weights,
    rounded,
)
from pid_runtime.backends.stages import Attention, RoundedAttention, Rounding


def of(values: Tensor, scale: float) -> Tensor:
    """Values rounded to multiples of a scale by another library."""
    stored = (values.numpy() / np.float32(scale)).clip(-LARGEST, LARGEST)
    return torch.from_numpy(stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)) * scale


@pytest.mark.parametrize("scale", [2.0**-5, 1.0, 8.0])
def test_numbers_are_rounded_to_the_nearest(scale: float) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500) * 30, torch.randn(500) * 0.01, torch.tensor([1e6, -1e6])])
    at = torch.tensor(scale)
    stored = quantize(values, at)
    assert stored.dtype == FP8 and torch.equal(dequantize(stored, at), of(values, scale))
    assert stored.float().abs().max() == LARGEST  # and not NaN, as what is too large becomes
    assert torch.equal(rounded(values, at), rounded(stored, at))


def test_what_comes_in_8_bits_is_read_so() -> None:
    place, leave = Rounded(torch.float32), Quantized(torch.float32)
    for module in (place, leave):
        module.load_state_dict({"scale": torch.tensor(0.25)})
    values = torch.randn(3, 5)
    assert torch.equal(place(leave(values)), of(values, 0.25))
    assert torch.equal(place(values), of(values, 0.25))


def test_a_product_has_a_scale_for_every_output() -> None:
    linear = RoundedLinear(4, 3, torch.float32, FP8)
    scales = torch.tensor([0.5, 1.0, 2.0])
    weight = torch.arange(12.0).reshape(4, 3)
    state = {"weight": weight.to(FP8), "weight_scale": scales, "bias": torch.ones(3)}
    linear.load_state_dict(state)
    assert torch.equal(linear(torch.eye(4)), weight * scales + 1)


@pytest.mark.parametrize("stored", [FP8, INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_with_the_least_scale_that_holds_them(
    stored: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 9) * torch.logspace(-3, 3, 9)
    weight[:, 4] = 0
    rounded_weight, scale = round_weights(weight, stored, dtype)
    assert (rounded_weight.dtype, scale.dtype) == (stored, dtype)
    used = rounded_weight.float().abs().amax(0)
    assert used[4] == 0
    error = (rounded_weight.float() * scale.float() - weight).abs()
    if stored == FP8:
        assert used[torch.arange(9) != 4].min() >= LARGEST / 2
        assert torch.equal(scale.double().log2(), scale.double().log2().round())
        assert (error <= 2.0**-4 * weight.abs() + 2.0**-10 * scale.float()).all()
    else:
        assert used[torch.arange(9) != 4].min() >= 126
        assert (error <= 1.01 * scale.float()).all()


def test_small_matrices_are_left_as_they_are() -> None:
    assert is_rounded(64, 64) and not is_rounded(63, 4096) and not is_rounded(4096, 63)
    rounding = Rounding(products=True)
    assert isinstance(rounding.operand(48, 64, torch.float32), nn.Identity)
    assert isinstance(rounding.linear(64, 64, torch.float32), RoundedLinear)
    assert not isinstance(Rounding().linear(64, 64, torch.float32), RoundedLinear)


def test_attention_is_exact_but_for_rounding() -> None:
    """In parts of its queries, in 8-bit numbers or floats."""
    torch.manual_seed(1)
    scales = {"q": 2.0**-6, "k": 2.0**-6, "v": 2.0**-6, "attended": 2.0**-7, "weights": 2.0**-8}
    q, k, v = (torch.randn(2, rows, 32) for rows in (9, 17, 17))
    attention = RoundedAttention(2, torch.float32, scales)
    got = attention(q, k, v)
    rounded_ends = [rounded(x, torch.tensor(scales[n])) for n, x in (("q", q), ("k", k), ("v", v))]
    want = Attention(2)(*rounded_ends)
    assert got.shape == want.shape and 0 < (got - want).abs().max() < 0.08 * want.abs().max()
    stored = [quantize(x, torch.tensor(scales[n])) for n, x in (("q", q), ("k", k), ("v", v))]
    attended = attention(*stored)
    assert attended.dtype == FP8
    assert torch.equal(attended.float() * scales["attended"], got)
    attention.QUERIES = 4
    assert torch.allclose(attention(q, k, v), got, atol=1e-6)
