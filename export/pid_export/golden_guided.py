"""Golden files of undistilled decodes: many steps with guidance, to agree with to 5e-4.

tests/golden/README.md describes the format.
"""

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_export.bundle import ExportOptions, export_bundle
from pid_export.errors import ExportInputError
from pid_export.golden import largest_difference
from pid_export.verify import load_network
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.guided_sampler import sample_guided, shifted_times
from pid_ref.network import unpatchify
from pid_ref.weights import RandomWeights
from pid_runtime.decoder import Decoder
from pid_runtime.errors import NotFiniteError

TOLERANCE = 5e-4
"""Largest absolute difference from a golden file, in float32, over values of order 1: guidance and
small networks amplify rounding."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GoldenGuided:
    """One golden file."""

    path: Path
    config: PidConfig
    seed: int
    steps: int
    guidance: float
    inputs: dict[str, Floats]
    """noise, latent, caption, negative, sigma."""
    unclamped: Floats
    """The last state, `[B, 3, H, W]`."""
    network_times: NDArray[np.float64]
    """1000 t of every step."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.unclamped.shape[2], self.unclamped.shape[3]

    @property
    def weights(self) -> RandomWeights:
        """The network's weights, by the rule."""
        return RandomWeights(state_shapes(self.config), self.seed)


def is_guided(path: Path) -> bool:
    """Whether a file holds undistilled decodes, by its header; not for one that cannot be read."""
    try:
        with safe_open(path, "np") as file:
            return "in/negative" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def read_guided(path: Path) -> GoldenGuided:
    """Read a golden file. Raises `ExportInputError` when it is none."""
    names = ("noise", "latent", "caption", "negative", "sigma")
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            golden = GoldenGuided(
                path,
                PidConfig.from_upstream(json.loads(about["config"])),
                int(about["seed"]),
                int(about["steps"]),
                float(about["cfg_scale"]),
                {name: file.get_tensor(f"in/{name}").astype(np.float32) for name in names},
                file.get_tensor("out/unclamped").astype(np.float32),
                file.get_tensor("out/network_times").astype(np.float64),
            )
        want = 1000 * np.array(shifted_times(golden.steps, *golden.size)[:-1])
        if golden.network_times.shape != want.shape or not np.allclose(
            golden.network_times, want, rtol=1e-6, atol=0
        ):
            raise ValueError(f"its times are {golden.network_times}, not {want}")
        return golden
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ExportInputError(
            f"expected a golden file of guided decodes (see tests/golden), but got {path}: {error}"
        ) from None


def guided_reference_error(golden: GoldenGuided) -> float:
    """Largest difference of the reference, in float64, from a golden file."""
    net = load_network(golden.config, golden.weights).double()
    given = {name: torch.from_numpy(array).double() for name, array in golden.inputs.items()}
    batch = len(given["latent"])
    for name in ("caption", "negative"):
        given[name] = given[name].expand(batch, -1, -1)
    got = sample_guided(
        net, **given, guidance=golden.guidance, times=shifted_times(golden.steps, *golden.size)
    )
    return largest_difference(got.numpy(), golden.unclamped)


def guided_program_error(golden: GoldenGuided, backend: str, device: str | None = None) -> float:
    """Largest difference of the exported program, in float32, from a golden file's last state."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_guided(golden, bundle)
        with Decoder.open(bundle, backend, device) as decoder:
            return decode_error(golden, decoder)


def export_guided(golden: GoldenGuided, bundle: Path) -> None:
    """Export a golden file's network in float32, for decodes up to the file's own size."""
    height, width = golden.size
    tokens = height * width // golden.config.patch_size**2
    options = ExportOptions(buckets=(("golden", tokens),), undistilled=True)
    origin = {"random_seed": golden.seed}
    export_bundle(bundle, golden.config, golden.weights, options, weights=origin)


def decode_error(golden: GoldenGuided, decoder: Decoder) -> float:
    """Largest difference of a decoder of the exported network from a golden file's last state."""
    given = golden.inputs
    states: list[Floats] = []

    def keep(done: int, calls: int) -> None:
        if done == calls:
            states.append(decoder.state())

    with suppress(NotFiniteError):  # the state is compared
        decoder.decode(
            given["latent"],
            given["caption"],
            negative=given["negative"],
            guidance=golden.guidance,
            sigma=given["sigma"],
            noise=given["noise"],
            steps=golden.steps,
            progress=keep,
        )
    state = unpatchify(torch.from_numpy(states[0]), *golden.size, golden.config.patch_size)
    return largest_difference(state.numpy(), golden.unclamped)
