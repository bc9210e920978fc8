"""Golden files of captions: embeddings of texts by a small language model, to agree with to 1e-5.

tests/golden/README.md describes the format; the model lies beside the files.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_export.errors import ExportInputError

if TYPE_CHECKING:
    from pid_pipelines.captions import CaptionEncoder

TOLERANCE = 1e-5
"""Largest absolute difference from a golden file, in float32, over values of order 1."""


@dataclass(frozen=True)
class GoldenCaptions:
    """One golden file."""

    path: Path
    captions: list[str]
    plain: bool
    """Without the instruction in front."""
    embedding: NDArray[np.float32]
    """`[B, T, D]`."""


def is_captions(path: Path) -> bool:
    """Whether a file holds caption embeddings, by its header; not for one that cannot be read."""
    try:
        with safe_open(path, "np") as file:
            return "out/embedding" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def read_captions(path: Path) -> GoldenCaptions:
    """Read a golden file. Raises `ExportInputError` when it is none."""
    try:
        with safe_open(path, "np") as file:
            about, embedding = file.metadata() or {}, file.get_tensor("out/embedding")
        captions = json.loads(about["captions"])
        if [len(captions), int(about["max_length"])] != list(embedding.shape[:2]):
            raise ValueError(f"{len(captions)} captions, but embeddings {embedding.shape}")
        return GoldenCaptions(path, captions, about["chi_prompt"] == "false", embedding)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ExportInputError(
            f"expected a golden file of captions (see tests/golden), but got {path}: {error}"
        ) from None


def caption_error(golden: GoldenCaptions, encoder: "CaptionEncoder") -> float:
    """Largest difference of an encoder, in fp32, from a golden file; infinite for another shape."""
    length = golden.embedding.shape[1]
    got = encoder.encode(golden.captions, length, plain=golden.plain)
    if got.shape != golden.embedding.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.abs(got - golden.embedding).max())
