"""What of a checkpoint goes into a bundle; that it computes the same is tested with the decodes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from pid_export.bundle import config_of, dimensions_of, network_of
from pid_export.fold import fold_graph, fold_tables
from pid_export.program import ProgramSpec, build_program
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.registry import find_checkpoint
from pid_ref.sampler import timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.backends.stages import build_stage

V1 = PidConfig(
    latent_channels=4,
    latent_hidden=8,
    latent_res_blocks=1,
    hidden_size=16,
    num_heads=2,
    patch_depth=3,
    pixel_hidden_size=4,
    pixel_attn_size=16,
    pixel_num_heads=2,
    text_dim=6,
    text_max_length=5,
)
V1PT5 = replace(V1, latent_padding="replicate", latent_gate="token", pixel_gate=True)
CONFIGS = {
    "v1": V1,
    "v1.5": V1PT5,
    "v1.5 flux2": replace(V1PT5, latent_channels=16, latent_down=16, latent_unpatchify=2),
    "one block of each": replace(V1, patch_depth=1, pixel_depth=1),
    "three pixel blocks": replace(V1, pixel_depth=3),
}
TIMES = (timesteps(1)[0], *timesteps(4)[:-1])


class Watched(Mapping[str, torch.Tensor]):
    """A checkpoint that remembers what was read from it."""

    def __init__(self, config: PidConfig) -> None:
        self.tensors = RandomWeights(state_shapes(config), 0)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def shapes_of(config: PidConfig, program: ProgramSpec) -> dict[str, dict[str, torch.Size]]:
    """Shapes of every graph's weights, as its stage has them."""
    dimensions = dimensions_of(network_of(config))
    with torch.device("meta"):
        return {
            name: {
                key: weight.shape
                for key, weight in build_stage(spec.stage, spec.options, dimensions, "fp32")
                .state_dict()
                .items()
            }
            for name, spec in program.graphs.items()
        }


@pytest.mark.parametrize("arbitrary", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_weight_that_matters_is_folded_and_no_other(
    config: PidConfig, arbitrary: bool
) -> None:
    program = build_program(config, "fp32", None if arbitrary else len(TIMES))
    checkpoint = Watched(config)
    for name, shapes in shapes_of(config, program).items():
        folded = fold_graph(program.graphs[name], checkpoint, config)
        assert {key: weight.shape for key, weight in folded.items()} == shapes, name
        assert all(bool(weight.isfinite().all()) for weight in folded.values())
    conditioning = {k for k in checkpoint if "t_embedder" in k or ".adaLN_modulation_" in k}
    assert conditioning <= checkpoint.read if arbitrary else not conditioning & checkpoint.read
    fold_tables(checkpoint, config, TIMES)
    last = f"patch_blocks.{config.patch_depth - 1}"
    dead = {k for k in checkpoint if k.startswith((f"{last}.mlp_y.", f"{last}.attn.proj_y."))}
    assert len(dead) == 5
    assert set(checkpoint) - checkpoint.read == dead


def test_the_table_is_what_the_timestep_network_computes() -> None:
    checkpoint = Watched(V1)
    program = build_program(V1, "fp32", None)
    stage = build_stage("timestep", {}, dimensions_of(network_of(V1)), "fp32")
    stage.load_state_dict(fold_graph(program.graphs["timestep"], checkpoint, V1))
    table = fold_tables(checkpoint, V1, TIMES)
    assert table["modulation"].shape == (len(TIMES), 2, 6 * V1.patch_depth, V1.hidden_size)
    with torch.no_grad():
        for row, time in enumerate(TIMES):
            modulation, embedding = stage(torch.tensor([1000 * time]))
            np.testing.assert_allclose(modulation, table["modulation"][row], rtol=0, atol=1e-5)
            np.testing.assert_allclose(embedding, table["time_embedding"][row], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("space", "variant", "least_gb", "most_gb"),
    [("flux", "2k", 1.83, 1.95), ("flux", "2kto4k", 1.92, 2.03), ("siglip", "2k", 1.84, 1.96)],
)
def test_weights_of_the_released_networks(
    space: str, variant: str, least_gb: float, most_gb: float
) -> None:
    """In bf16; the network as it stands takes 2.72 GB (v1) or 2.80 GB (v1.5)."""
    config = find_checkpoint(space, variant).config
    program = build_program(config, "bf16", len(TIMES))
    dimensions = dimensions_of(network_of(config))
    total = sum(
        4 * math.prod(int(size) for size in program.buffers[name].shape)
        for name in ("modulation", "time_embedding")
    )
    with torch.device("meta"):
        for spec in program.graphs.values():
            stage = build_stage(spec.stage, spec.options, dimensions, "bf16")
            total += sum(w.numel() * w.element_size() for w in stage.state_dict().values())
    assert least_gb <= total / 1e9 <= most_gb


def test_manifest_network_is_the_configuration() -> None:
    network = json.loads(json.dumps(network_of(V1PT5)))
    assert config_of(network) == V1PT5
