"""The training of `nano`: where it starts, and that it can be stopped and goes on."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pid_ref.checkpoint import state_shapes
from pid_ref.registry import NANO_CONFIG

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(TOOLS))
    try:
        import train_nano  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(TOOLS))
    train_nano.FIT_CROPS = 20
    return train_nano


@pytest.fixture(scope="module")
def pictures(tool: Any) -> Any:
    return tool.in_sizes(tool.draw_leaves(2, 300, seed=1))


def test_it_starts_as_a_linear_decoder_at_every_time(tool: Any, pictures: Any) -> None:
    net = tool.new_network(0, pictures)
    rng = np.random.default_rng(0)
    crops = [tool.crop(rng, pictures, 128, 128) for _ in range(4)]
    image = torch.stack(crops).float()
    latent = torch.from_numpy(tool.encode(tool.reduce(image), tool.NANO_STD))
    nothing = torch.zeros(4)
    errors: list[float] = []
    for steps, step in ((4, 0), (4, 1), (4, 2), (4, 3), (1, 0)):
        at = torch.full((4,), step), torch.full((4,), steps)
        pool = tool.Pool(image, latent, nothing, image.clone(), at[1], at[0])
        noise = torch.from_numpy(rng.standard_normal(image.shape, np.float32))
        with torch.no_grad():
            _, error = tool.loss_of(net, pool, noise, torch.device("cpu"))
        errors.append(float(error.mean()))
    variance = float(image.var())
    assert max(errors) < 0.35 * variance, errors
    assert max(errors) < 1.05 * min(errors), errors


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tool: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "SHAPES", (((2, 2), 2, 1),))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    tool.train(pictures, whole, 3, 0, 1e9)
    tool.train(pictures, parts, 3, 0, 0.0)  # one iteration
    first = json.loads((parts / "log.jsonl").read_text())
    assert first["iteration"] == 1
    tool.train(pictures, parts, 3, 0, 1e9)
    expected, found = (load_file(folder / "nano.safetensors") for folder in (whole, parts))
    assert {name: tuple(each.shape) for name, each in found.items()} == state_shapes(NANO_CONFIG)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
