"""Runs PiD bundles: `Decoder` turns latents into images. Needs neither torch nor onnx."""

from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import PidRuntimeError

__all__ = ["Bundle", "Decoder", "PidRuntimeError"]
