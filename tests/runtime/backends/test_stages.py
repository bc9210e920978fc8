"""Stages do not leave a part of the network out; what they compute is tested by golden files."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pid_runtime.backends.stages import Dimensions, build_stage
from pid_runtime.errors import PidRuntimeError

NETWORK = Dimensions(
    hidden_size=16,
    num_heads=2,
    mlp_hidden=32,
    text_dim=8,
    text_max_length=4,
    patch_size=2,
    patch_depth=2,
    pixel_hidden_size=4,
    pixel_attn_size=16,
    pixel_num_heads=2,
    pixel_depth=2,
    latent_channels=4,
    latent_unpatchify=1,
    latent_ratio=1,
    latent_hidden=8,
    latent_res_blocks=1,
    latent_padding="zeros",
    latent_gate="channel",
)
L, D, P, A = 3, 16, 2, 16

ROPE = {"rope_cos": (L, 4), "rope_sin": (L, 4)}
LATENT = {"latent_tokens": (1, L, 8), "sigma": (1,)}
GRID = {"pixel_columns": (L, P, 2), "pixel_rows": (L, P, 2)}
STATE = {"state": (1, L, 3 * P * P)}
PIXELS = {"pixels": (1, L, P * P * 4)}
PIXEL_BLOCK = {"s": (1, L, D), "attended": (1, L, A), **ROPE}
UPDATE = {
    "s": (1, L, D),
    "attended": (1, L, A),
    **STATE,
    "noise": (1, L, 3 * P * P),
    "update": (3,),
}
TOKENS = {"x": (1, L, D), "modulation": (6, D), **ROPE}
FIRST_PIXELS = {
    **TOKENS,
    **STATE,
    **GRID,
    "modulation": (4, D),
    "attended": (1, L, D),
    "time_embedding": (D,),
}

Shapes = dict[str, tuple[int, ...]]

CASES: list[tuple[str, dict[str, Any], Shapes, Shapes]] = [
    ("tokens", {"first": False, "inject": True}, TOKENS, {"attended": (1, L, D), **LATENT}),
    ("tokens", {"first": False}, TOKENS, {"attended": (1, L, D)}),
    ("tokens", {"first": True, "inject": True}, TOKENS, LATENT),
    ("pixel_first", {"inject": True}, FIRST_PIXELS, LATENT),
    ("pixels", {"embed": True}, PIXEL_BLOCK, {**STATE, **GRID}),
    ("pixels", {"embed": False}, PIXEL_BLOCK, PIXELS),
    ("update", {"embed": True}, UPDATE, GRID),
    ("update", {"embed": False}, UPDATE, PIXELS),
]
"""A stage, its options, the inputs all such stages have, and those that its parts need."""

WRONG: list[tuple[str, dict[str, Any], Shapes, Shapes]] = [
    ("tokens", {"first": True}, TOKENS, {"attended": (1, L, D)}),
    ("tokens", {"first": True}, TOKENS, LATENT),
    ("pixel_first", {"inject": False}, FIRST_PIXELS, LATENT),
    ("pixels", {"embed": False}, PIXEL_BLOCK, {**PIXELS, **GRID}),
    ("pixels", {"embed": True}, PIXEL_BLOCK, {**PIXELS, **STATE, **GRID}),
    ("update", {"embed": False}, UPDATE, {**PIXELS, **GRID}),
]
"""The same with inputs of parts that the stage lacks."""


def build(kind: str, options: dict[str, Any]) -> nn.Module:
    stage = build_stage(kind, options, NETWORK, "fp32")
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    return stage.eval().requires_grad_(False)


def inputs_of(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("kind", "options", "always", "of_parts"), CASES)
def test_a_missing_input_is_refused(
    kind: str, options: dict[str, Any], always: Shapes, of_parts: Shapes
) -> None:
    stage = build(kind, options)
    inputs = inputs_of(always | of_parts)
    stage(**inputs)
    for name in of_parts:
        kept = {other: tensor for other, tensor in inputs.items() if other != name}
        with pytest.raises(PidRuntimeError, match=rf"get .*{name}.*export the bundle again"):
            stage(**kept)


@pytest.mark.parametrize(("kind", "options", "always", "of_parts"), WRONG)
def test_inputs_of_parts_that_a_stage_lacks_are_refused(
    kind: str, options: dict[str, Any], always: Shapes, of_parts: Shapes
) -> None:
    with pytest.raises(PidRuntimeError, match=r"expected a .*stage to get"):
        build(kind, options)(**inputs_of(always | of_parts))
