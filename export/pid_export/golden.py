"""Golden files: decodes of small networks whose weights follow a rule, to agree with to 1e-4.

tests/golden/README.md describes the format.
"""

import json
import math
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_export.bundle import ExportOptions, export_bundle
from pid_export.errors import ExportInputError
from pid_export.verify import DecodeInputs, load_network
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.network import unpatchify
from pid_ref.sampler import sample, timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.decoder import Decoder
from pid_runtime.errors import NotFiniteError

TOLERANCE = 2e-4
"""Largest absolute difference from a golden file, over outputs of order 1.

The time features of the files were computed with a float32 exp that rounds one of its 128 values
the other way than exactly; that alone is 1.7e-4 in one file, 1.3e-4 in one, and under 1e-4 in the
others.
"""


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    path: Path
    config: PidConfig
    seed: int
    inputs: DecodeInputs
    velocity: NDArray[np.float32]
    """First network output `[B, 3, H, W]`."""
    states: list[NDArray[np.float32]]
    """State `[B, 3, H, W]` after every step."""

    @property
    def outputs(self) -> list[NDArray[np.float32]]:
        """The velocity, then the states."""
        return [self.velocity, *self.states]

    @property
    def weights(self) -> RandomWeights:
        """The network's weights, by the rule."""
        return RandomWeights(state_shapes(self.config), self.seed)


def read_golden(path: Path) -> Golden:
    """Read a golden file. Raises `ExportInputError` when it is none."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            config = PidConfig.from_upstream(json.loads(metadata["config"]))
            times = timesteps(int(metadata["steps"]))
            if json.loads(metadata["t_list"]) != list(times):
                raise ValueError(f"its times are {metadata['t_list']}, not {list(times)}")
            steps = range(len(times) - 1)
            names = ["in/noise", *(f"in/eps{i}" for i in steps[:-1])]
            noise = [file.get_tensor(name) for name in names]
            states = [file.get_tensor(f"out/x{i + 1}") for i in steps]
            golden = Golden(
                path,
                config,
                int(metadata["seed"]),
                DecodeInputs(
                    file.get_tensor("in/latent"),
                    file.get_tensor("in/caption"),
                    file.get_tensor("in/sigma"),
                    noise,
                ),
                file.get_tensor("out/v0"),
                states,
            )
            shapes = {array.shape for array in (*noise, golden.velocity, *states)}
            if len(shapes) != 1:
                raise ValueError(f"its images have different shapes: {sorted(shapes)}")
            return golden
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ExportInputError(
            f"expected a golden file (see tests/golden), but got {path}: {error}"
        ) from None


def reference_error(golden: Golden) -> float:
    """Largest difference of the reference, in float64, from a golden file, over all its outputs."""
    return max(map(largest_difference, _reference_outputs(golden, torch.float64), golden.outputs))


def tolerance_here(golden: Golden, device: str = "cpu") -> float:
    """Largest difference of a float32 program from a golden file on this machine.

    That is `TOLERANCE`, or how far the reference itself is off and twice what it loses from
    float64 to float32 here, on `device` of torch. These small networks make some rounding errors a
    thousand times larger, and which ones a processor makes depends on its vector units.
    """
    exact = _reference_outputs(golden, torch.float64)
    rounded = _reference_outputs(golden, torch.float32, device)
    off = max(map(largest_difference, exact, golden.outputs))
    lost = max(map(largest_difference, rounded, exact))
    if not math.isfinite(lost) or not off <= TOLERANCE:
        return TOLERANCE
    return max(TOLERANCE, off + 2 * lost)


def _reference_outputs(
    golden: Golden, dtype: torch.dtype, device: str = "cpu"
) -> list[NDArray[np.float32]]:
    """The reference's first velocity, and its state after every step."""
    net = load_network(golden.config, golden.weights).to(device, dtype)
    outputs: list[NDArray[np.float32]] = []

    def keep(step: int, velocity: torch.Tensor, state: torch.Tensor) -> None:
        kept = [velocity, state] if step == 0 else [state]
        outputs.extend(tensor.cpu().numpy() for tensor in kept)

    inputs = golden.inputs
    noise = [torch.from_numpy(n).to(device) for n in inputs.noise]
    sample(
        net,
        torch.from_numpy(inputs.latent).to(device),
        torch.from_numpy(inputs.caption).to(device),
        torch.from_numpy(inputs.sigma).to(device),
        noise[0],
        noise[1:],
        steps=len(golden.states),
        on_step=keep,
    )
    return outputs


@contextmanager
def open_program(
    golden: Golden, backend: str, device: str | None = None
) -> Generator[Decoder, None, None]:
    """A decoder of a golden file's network, exported to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_golden(golden, bundle)
        with Decoder.open(bundle, backend, device) as decoder:
            yield decoder


def export_golden(golden: Golden, bundle: Path, **options: Any) -> Manifest:
    """Export a golden file's network for decodes up to the file's own size.

    options: of `ExportOptions`; float32 unless they say else.
    """
    height, width = golden.velocity.shape[-2:]
    tokens = (height // golden.config.patch_size) * (width // golden.config.patch_size)
    chosen = ExportOptions(buckets=(("golden", tokens),), **options)
    origin = {"random_seed": golden.seed}
    return export_bundle(bundle, golden.config, golden.weights, chosen, weights=origin)


def decode_golden(
    golden: Golden, decoder: Decoder, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float32]:
    """Decode a golden file's input with the file's noise: an image `[B, 3, H, W]`, in [-1, 1]."""
    inputs = golden.inputs
    return decoder.decode(
        inputs.latent,
        inputs.caption,
        sigma=inputs.sigma,
        noise=inputs.noise[0],
        step_noise=inputs.noise[1:],
        steps=len(golden.states),
        progress=progress,
    )


def program_error(golden: Golden, decoder: Decoder) -> float:
    """Largest difference of the exported program from a golden file, over every step's state."""
    height, width = golden.velocity.shape[-2:]
    errors: list[float] = []

    def check(step: int, _steps: int) -> None:
        tokens = torch.from_numpy(decoder.state())
        state = unpatchify(tokens, height, width, golden.config.patch_size)
        errors.append(largest_difference(state.numpy(), golden.states[step - 1]))

    with suppress(NotFiniteError):  # `check` has seen it
        decode_golden(golden, decoder, check)
    return max(errors)


def largest_difference(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite when something is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return math.inf
    return float(np.abs(got - want).max())
