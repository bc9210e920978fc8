"""Counts what a module has to do, at any size and without running it: on meta tensors.

Counted are matrix products, convolutions and attention, by torch's formulas: 2 FLOP for every
multiply-add. What is done to single elements is neither counted nor charged any traffic.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pid_bench.stage import Stage


class Work(NamedTuple):
    """What some calls of a module, or of several, have to do."""

    flop: int
    """Floating-point operations, 2 per multiply-add."""
    parameters: int
    """Parameters of the modules, once however often they are called."""
    weight_bytes: int
    """Bytes of the parameters and buffers."""
    bytes_moved: int
    """Bytes that counted operations read and write, each operand once per operation.

    Attention reads q, k and v and writes its result: its scores stay where they are made.
    """


NO_WORK = Work(0, 0, 0, 0)


def total(works: Iterable[Work]) -> Work:
    """The work of several modules together."""
    return Work(*map(sum, zip(*works, NO_WORK, strict=True)))


def count(stage: Stage, dtype: torch.dtype) -> Work:
    """All calls of a stage in one decode, with weights and activations of `dtype`."""
    meta = torch.device("meta")
    return count_calls(stage.build(meta, dtype), stage.inputs(meta, dtype), {}, stage.calls)


def count_calls(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], calls: int
) -> Work:
    """`calls` equal calls of a module whose parameters and inputs are meta tensors."""
    traffic = _Traffic()
    with (
        torch.device("meta"),
        torch.no_grad(),
        _WholeAttention(),
        traffic,
        FlopCounterMode(display=False) as counter,
    ):
        module(*args, **kwargs)
    weights = [*module.parameters(), *module.buffers()]
    return Work(
        calls * counter.get_total_flops(),
        sum(parameter.numel() for parameter in module.parameters()),
        sum(weight.nbytes for weight in weights),
        calls * traffic.bytes,
    )


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the operands and results of what the FLOP counter has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            result = out[0] if isinstance(out, tuple) else out  # attention also returns statistics
            operands = tree_leaves((args, kwargs, result))
            self.bytes += sum(each.nbytes for each in operands if isinstance(each, Tensor))
        return out


class _WholeAttention(TorchFunctionMode):
    """Makes attention one operation: meta tensors would get two products and all their scores."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    if attn_mask is not None or options.get("is_causal") or options.get("enable_gqa"):
        raise NotImplementedError("only plain attention is counted: none of our modules has other")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
