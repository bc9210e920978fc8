"""Operations of ours, which the exporter finds in a traced stage and writes as ONNX has them."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("pid", "DEF")


def operation(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors one of torch's operations, `torch.ops.pid.NAME`.

    schema: its name, arguments and result. like: the same function of tensors without values.
    Not `torch.library.custom_op`, whose first call loads torch's compiler: a second and more.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pid::{name}", like, lib=_LIBRARY)
        return getattr(torch.ops.pid, name)

    return register
