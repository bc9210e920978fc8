"""Runs PiD bundles: `Decoder` turns latents into images. Needs neither torch nor onnx.

The names below are imported when they are first used, so that a command begins at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pid_runtime.decoder import Bundle, Decoder
    from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError

    __version__: str

__all__ = [
    "Bundle",
    "Decoder",
    "NotFiniteError",
    "OutOfMemoryError",
    "PidRuntimeError",
    "__version__",
]

_MODULES = {
    "Bundle": "decoder",
    "Decoder": "decoder",
    "NotFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "PidRuntimeError": "errors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pid-trt")
    except PackageNotFoundError:
        return "0+not.installed"
