"""torch.onnx's table of how to write operations in ONNX, made once.

torch makes it anew for every graph, which takes a fifth of a trace's time.
"""

import contextlib
import importlib
from collections.abc import Generator
from typing import Any
from unittest.mock import patch

_made: dict[str, Any] = {}
"""Tables, by what they were made of."""


@contextlib.contextmanager
def kept_translations() -> Generator[None, None, None]:
    """Let torch.onnx take a copy of the table it made before, where this torch has such a table."""
    try:
        module = importlib.import_module("torch.onnx._internal.exporter._registration")
        registry = module.ONNXRegistry
        make = registry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def copied(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, options))
        if key not in _made:
            _made[key] = make(*arguments, **options)
        copy = registry.__new__(registry)
        copy.__dict__.update(_made[key].__dict__)
        copy.functions = {target: list(known) for target, known in copy.functions.items()}
        return copy

    with patch.object(registry, "from_torchlib", staticmethod(copied)):
        yield
