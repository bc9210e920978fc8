"""Golden files of latents: what generators give, and what PiD and autoencoders take, to 1e-6.

tests/golden/README.md describes the format.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_export.errors import ExportInputError
from pid_pipelines.generator_latents import pid_latent, pid_noise
from pid_ref.errors import PidInputError
from pid_ref.registry import find_space
from pid_runtime.errors import InputError
from pid_runtime.latents import Normalization, batch_normalization

TOLERANCE = 1e-6
"""Largest absolute difference of a latent from a golden file, in float32, over values of order 1.
What an autoencoder takes is up to ten times as large, and so is what it may differ."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GoldenLatents:
    """One golden file."""

    path: Path
    size: tuple[int, int]
    """Height and width in pixels of the pictures that the latents are of."""
    tensors: dict[str, Floats]
    """By BACKBONE/NAME."""
    batch_normalization: Normalization
    """Of FLUX.2's latents."""
    per_channel: Normalization
    """Of Qwen-Image's."""


def is_latents(path: Path) -> bool:
    """Whether a file holds latents of generators, by its header; not for one not to be read."""
    try:
        with safe_open(path, "np") as file:
            return any(name.endswith("/pipeline_output") for name in set(file.keys()))
    except (OSError, SafetensorError):
        return False


def read_latents(path: Path) -> GoldenLatents:
    """Read a golden file. Raises `ExportInputError` when it is none."""
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in set(file.keys())}
        mean, variance = tensors.pop("flux2/bn_mean"), tensors.pop("flux2/bn_var")
        for name in (name for name in tensors if not name.endswith("_sigma")):
            find_space(name.partition("/")[0])
        return GoldenLatents(
            path,
            (int(about["height"]), int(about["width"])),
            tensors,
            batch_normalization(mean, variance, float(about["bn_eps"])),
            Normalization(
                tuple(1 / std for std in json.loads(about["qwen_latents_std"])),
                tuple(json.loads(about["qwen_latents_mean"])),
            ),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, PidInputError) as error:
        raise ExportInputError(
            f"expected a golden file of latents (see tests/golden), but got {path}: {error}"
        ) from None


def latent_errors(golden: GoldenLatents) -> dict[str, float]:
    """Largest difference from a golden file by what was compared; infinite for another shape."""
    return {name: _difference(got, wanted) for name, got, wanted in _compared(golden)}


def _compared(golden: GoldenLatents) -> Iterator[tuple[str, Floats | None, Floats]]:
    """What is made here and what the file has, of everything that it has; None for a refusal."""
    tensors = golden.tensors
    own = {"flux2": golden.batch_normalization, "qwenimage": golden.per_channel}
    sources = {"pipeline_output": "latent", "step_output": "step_latent"}
    for name in sorted(tensors):
        backbone, _, kind = name.partition("/")
        space = find_space(backbone)
        if kind in sources:
            wanted = tensors[f"{backbone}/{sources[kind]}"]
            try:
                got = pid_latent(space, tensors[name], golden.size, golden.batch_normalization)
            except InputError:
                got = None
            yield f"{backbone}/{sources[kind]}", got, wanted
        elif kind == "vae_input":
            rule = own.get(space.name) or Normalization(space.factor or (), space.shift or ())
            yield name, rule.undo(tensors[f"{backbone}/latent"]), tensors[name]
        elif kind == "euler_latent":
            latent, sigma = pid_noise(
                space, tensors[name], float(tensors[f"{backbone}/euler_sigma"][0])
            )
            yield f"{backbone}/trained_latent", latent, tensors[f"{backbone}/trained_latent"]
            wanted = tensors[f"{backbone}/trained_sigma"]
            yield f"{backbone}/trained_sigma", np.array([sigma], np.float32), wanted


def _difference(got: Floats | None, wanted: Floats) -> float:
    if got is None or got.shape != wanted.shape or not np.isfinite(got).all():
        return math.inf
    scale = max(1.0, float(np.abs(wanted).max()))
    return float(np.abs(got - wanted).max()) / scale
