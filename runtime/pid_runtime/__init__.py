"""Runs PiD bundles: `Decoder` turns latents into images. Needs neither torch nor onnx."""

import importlib.metadata

from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError

__all__ = [
    "Bundle",
    "Decoder",
    "NotFiniteError",
    "OutOfMemoryError",
    "PidRuntimeError",
    "__version__",
]

try:
    __version__ = importlib.metadata.version("pid-trt")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+not.installed"
