"""Checkpoints of released kinds with networks that are small."""

from dataclasses import replace
from typing import Any

import torch

from pid_ref.checkpoint import state_shapes
from pid_ref.registry import Checkpoint, find_checkpoint
from pid_ref.weights import RandomWeights

State = dict[str, torch.Tensor]


def small(space: str, variant: str, **dimensions: Any) -> Checkpoint:
    """A released checkpoint with a network of a few thousand parameters."""
    checkpoint = find_checkpoint(space, variant)
    usual = {
        "latent_hidden": 8,
        "latent_res_blocks": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_depth": 2,
        "pixel_hidden_size": 4,
        "pixel_attn_size": 16,
        "pixel_num_heads": 2,
        "pixel_depth": 1,
        "text_dim": 8,
        "text_max_length": 4,
    }
    return replace(checkpoint, config=replace(checkpoint.config, **(usual | dimensions)))


def weights(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> State:
    """Random weights that fit, by their names."""
    random = RandomWeights(state_shapes(checkpoint.config), seed=1)
    return {name: tensor.to(dtype) for name, tensor in random.items()}


def halves(state: State, pixels: int, layer: str = "") -> State:
    """The weights as some repackagings have them: pixel modulations in two parts."""
    split = State()
    for name, value in state.items():
        stem, found, leaf = name.rpartition("adaLN_modulation.0.")
        if not (found and name.startswith("pixel_blocks")):
            split[name] = value
            continue
        rows = value.reshape(pixels, 6, -1, *value.shape[1:])
        for part, half in (("msa", rows[:, :3]), ("mlp", rows[:, 3:])):
            joined = half.reshape(-1, *value.shape[1:]).contiguous()
            split[f"{stem}adaLN_modulation_{part}{layer}.{leaf}"] = joined
    return split
