"""Golden files: decodes of small networks whose weights follow a rule, to agree with to 1e-4.

tests/golden/README.md describes the format.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_export.bundle import ExportOptions, export_bundle
from pid_export.errors import ExportInputError
from pid_export.verify import Case, load_network
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.network import unpatchify
from pid_ref.sampler import sample
from pid_ref.weights import RandomWeights
from pid_runtime.decoder import Decoder

TOLERANCE = 1e-4
"""Largest absolute difference from a golden file, over outputs of order 1."""


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    path: Path
    config: PidConfig
    seed: int
    times: list[float]
    case: Case
    velocity: NDArray[np.float32]
    """First network output `[B, 3, H, W]`."""
    states: list[NDArray[np.float32]]
    """State `[B, 3, H, W]` after every step."""

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
            steps = int(metadata["steps"])
            noise = ["in/noise", *(f"in/eps{i}" for i in range(steps - 1))]
            return Golden(
                path,
                config,
                int(metadata["seed"]),
                json.loads(metadata["t_list"]),
                Case(
                    file.get_tensor("in/latent"),
                    file.get_tensor("in/caption"),
                    file.get_tensor("in/sigma"),
                    [file.get_tensor(name) for name in noise],
                ),
                file.get_tensor("out/v0"),
                [file.get_tensor(f"out/x{i + 1}") for i in range(steps)],
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ExportInputError(f"expected a golden file, but reading {path} failed: {error}") from None


def reference_error(golden: Golden) -> float:
    """Largest difference of the reference network from a golden file, over all its outputs."""
    net = load_network(golden.config, golden.weights)
    errors: list[float] = []

    def check(step: int, velocity: torch.Tensor, state: torch.Tensor) -> None:
        if step == 0:
            errors.append(_difference(velocity.numpy(), golden.velocity))
        errors.append(_difference(state.numpy(), golden.states[step]))

    noise = [torch.from_numpy(n) for n in golden.case.noise]
    sample(
        net,
        torch.from_numpy(golden.case.latent),
        torch.from_numpy(golden.case.caption),
        torch.from_numpy(golden.case.sigma),
        noise[0],
        noise[1:],
        steps=len(golden.states),
        on_step=check,
    )
    return max(errors)


def program_error(golden: Golden, backend: str, device: str | None = None) -> float:
    """Largest difference of the exported program from a golden file, over the state of every step."""
    height, width = golden.velocity.shape[-2:]
    tokens = (height // golden.config.patch_size) * (width // golden.config.patch_size)
    options = ExportOptions(buckets=(("golden", tokens),))
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        origin = {"random_seed": golden.seed}
        export_bundle(bundle, golden.config, golden.weights, options, weights=origin)
        with Decoder.open(bundle, backend, device) as decoder:

            def check(step: int, _steps: int) -> None:
                tokens = torch.from_numpy(decoder.state())
                state = unpatchify(tokens, height, width, golden.config.patch_size)
                errors.append(_difference(state.numpy(), golden.states[step - 1]))

            decoder.decode(
                golden.case.latent,
                golden.case.caption,
                sigma=golden.case.sigma,
                noise=golden.case.noise[0],
                step_noise=golden.case.noise[1:],
                steps=len(golden.states),
                progress=check,
            )
    return max(errors)


def _difference(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite when something is not finite."""
    return float(np.nan_to_num(np.abs(got - want), nan=np.inf).max())
