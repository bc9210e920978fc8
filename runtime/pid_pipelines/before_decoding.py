"""What runs before a decoder: where it does, and captions for all prompts of a command."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.choice import device_name
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.command.spread import Kept

Floats = NDArray[np.float32]

_log = logging.getLogger("pid_pipelines")


def encode_captions(
    arguments: Namespace, manifest: Manifest, texts: Sequence[str], kept: Kept | None = None
) -> dict[str, Floats]:
    """Embeddings `[1, T, D]` of texts, each once; the language model is gone afterwards.

    arguments: of a command with `--encoder`, `--backend`, `--device` and `--quiet`. kept: keeps the
    language model if it keeps what it opens.
    """
    from pid_pipelines.caption_cache import CaptionCache
    from pid_pipelines.captions import DEFAULT_ENCODER, CaptionEncoder

    def open_encoder() -> CaptionEncoder:
        return CaptionEncoder(
            arguments.encoder or DEFAULT_ENCODER,
            device=captions_device(arguments.encoder, arguments.backend, arguments.device),
            cache=CaptionCache(),
            width=manifest.network["text_dim"],
        )

    length = manifest.network["text_max_length"]
    bar = console.progress("Encoding captions", len(texts), quiet=arguments.quiet)
    with (kept or Kept()).part("captioner", open_encoder) as encoder, bar as advance:
        embeddings = encoder.encode(texts, length, progress=advance)
    return dict(zip(texts, embeddings[:, None], strict=True))


def captions_device(encoder: str | Path | None, backend: str, device: Any) -> str:
    """Where captions are encoded; backend and device: of the decoder."""
    from pid_pipelines.captioner import is_captioner  # needs an extra, which --help does not

    is_graph = encoder is not None and is_captioner(encoder)
    return (graph_device if is_graph else torch_device)(backend, device)


def graph_device(backend: str, device: Any) -> str:
    """Where ONNX Runtime encodes: on the GPU that decodes, if it has CUDA."""
    name = device_name(backend, device)
    if backend == "onnxruntime":
        return name
    from pid_runtime.backends.onnxruntime import is_installed

    return name if name.startswith("cuda") and is_installed("cuda") else "cpu"


def torch_device(backend: str, device: Any) -> str:
    """Where torch runs a model: on the GPU that decodes, if torch has it."""
    name = device_name(backend, device)
    if not name.startswith("cuda"):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return name
    _log.info("torch has no CUDA here: what comes before the decoder runs on the CPU")
    return "cpu"
