"""Operations of ours: what they cost to call, and what a trace knows of them."""

import subprocess
import sys

import pytest
import torch

from pid_runtime.backends.rounding import dequantize, quantize
from pid_runtime.backends.stages import group_norm


def test_calling_one_loads_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from pid_runtime.backends.stages import group_norm, quantize\n"
        "with torch.inference_mode():\n"
        "    group_norm(torch.ones(1, 4, 2, 2), torch.ones(4), torch.ones(4))\n"
        "    quantize(torch.ones(3), torch.tensor(0.5))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_as_a_trace_expects(dtype: torch.dtype) -> None:
    x, scale = torch.randn(2, 8, 3, 5).to(dtype), torch.tensor(0.5, dtype=dtype)
    rounded = quantize(x, scale)
    weights = torch.rand(8), torch.rand(8)
    for function, given in (
        (quantize, (x, scale)),
        (dequantize, (rounded, scale)),
        (group_norm, (x, *weights)),
    ):
        real, traced = function(*given), function(*(each.to("meta") for each in given))
        assert (traced.shape, traced.dtype) == (real.shape, real.dtype)
        assert traced.stride() == real.stride() and traced.is_meta
