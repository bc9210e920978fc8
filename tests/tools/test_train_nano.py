"""The training of `nano`: where it starts, and that it can be stopped and goes on."""

import json
from pathlib import Path
from typing import Any

import nano_sketch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_nano
from nano_crops import crop, crops_file, in_sizes, reduce
from nano_photos import draw_leaves
from numpy.typing import NDArray
from safetensors.torch import load_file

from pid_ref.checkpoint import state_shapes
from pid_ref.registry import NANO_CONFIG


@pytest.fixture(scope="module")
def tool() -> Any:
    train_nano.SKETCH_ITERATIONS = 3
    return train_nano


@pytest.fixture(scope="module")
def pictures() -> Any:
    return in_sizes(draw_leaves(2, 300, seed=1))


@pytest.fixture(scope="module")
def crops(pictures: Any) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    images = torch.stack([crop(rng, pictures, 128, 128) for _ in range(16)])
    return ((images + 1) * 127.5).round().to(torch.uint8).numpy()


def test_what_is_trained_decodes_at_every_time(tool: Any, crops: NDArray[np.uint8]) -> None:
    """The whole network decodes the picture that was trained, from any noise."""
    net = tool.new_network(0, nano_sketch.train_sketch(crops, 0, 3), crops)
    tool.keep_time(net)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(crops[:4]).float() / 127.5 - 1
    before = tool.picture_of(net, *(noisy := tool.noisy(rng, images))).detach()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0)
    stage = tool.Stage(1, 0, borders=3.0, beyond=0.015)
    for _ in range(4):
        optimizer.zero_grad()
        tool.learn(net, rng, [crops], torch.device("cpu"), stage)[0].backward()
        optimizer.step()
    tool.tell_time(net)
    net.eval()
    latent, sigma = noisy
    caption = torch.zeros(4, *tool.EMPTY_CAPTION)
    with torch.no_grad():
        picture = tool.picture_of(net, latent, sigma)
        assert float((picture - before).square().mean().sqrt()) > 0.02  # it learnt something
        for t in (0.999, 0.866, 0.634, 0.342):
            x = t * torch.from_numpy(rng.standard_normal(picture.shape, np.float32)) + picture
            v = net(x, torch.full((4,), 1000 * t), caption, latent, sigma)
            assert float((x - t * v - picture).square().mean().sqrt()) < 0.01, t


def test_the_network_starts_as_the_sketch(tool: Any, crops: NDArray[np.uint8]) -> None:
    """To the border: what is left out are combinations of features that matter least."""
    images = torch.from_numpy(crops[:4]).float() / 127.5 - 1
    sketch = nano_sketch.train_sketch(crops, 0, 30)
    for block in sketch.blocks:
        for conv in block.convs:
            conv.conv.bias.data.uniform_(-0.5, 0.5)
    net = tool.new_network(0, sketch, crops).eval()
    with torch.no_grad():
        features = sketch.features(torch.from_numpy(reduce(images)))
        tokens = net.lq_proj(torch.from_numpy(tool.latent_of(images)))[..., nano_sketch.OWN]
        wanted = F.pixel_unshuffle(features, 4).flatten(2).transpose(1, 2)
        np.testing.assert_allclose(tokens, wanted, atol=0.02)
        found = tool.picture_of(net, torch.from_numpy(tool.latent_of(images)), torch.zeros(4))
        drawn = sketch(torch.from_numpy(reduce(images)))
        assert float((found - drawn).square().mean()) < 0.02 * float(drawn.var())
        error = float((found - images).square().mean())
        assert error < 0.35 * float(images.var())


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tool: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "CROPS", ((2, 6, 2), (3, 4, 2)))
    monkeypatch.setattr(tool, "STAGES", (tool.Stage(2, 5e-4, 0, 0), tool.Stage(1, 2e-4, 3, 0.015)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    tool.train(pictures, whole, 3, 0, 1e9)
    for iteration in (1, 2):
        tool.train(pictures, parts, 3, 0, 0.0)
        last = (parts / "log.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["iteration"] == iteration
    tool.train(pictures, parts, 3, 0, 1e9)
    expected, found = (load_file(folder / "nano.safetensors") for folder in (whole, parts))
    assert {name: tuple(each.shape) for name, each in found.items()} == state_shapes(NANO_CONFIG)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_crops_follow_from_seed_and_index(pictures: Any, tmp_path: Path) -> None:
    files = [crops_file(tmp_path, pictures, 0, 2, count) for count in (3, 5)]
    few, more = (np.load(file) for file in files)
    assert few.shape == (3, 3, 64, 64) and few.dtype == np.uint8
    assert np.array_equal(few, more[:3]) and len({crop.tobytes() for crop in more}) == 5
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_black_and_white_may_lie_beyond(tool: Any) -> None:
    """What can be seen counts as it is; what is as good as black must be blacker, or as black."""
    image, found = torch.tensor([0.5, -1, -0.99, -1, 1]), torch.tensor([0.3, -0.9, -1.1, -1.2, 1])
    wanted = [-0.2, 0.115, 0, 0, -0.015]
    assert tool.error_of(found, image, 0.015).tolist() == pytest.approx(wanted, abs=1e-6)
    plain = [-0.2, 0.1, -0.11, -0.2, 0]
    assert tool.error_of(found, image, 0).tolist() == pytest.approx(plain, abs=1e-6)


def test_steps_across_the_borders_of_tokens_count(tool: Any) -> None:
    """Of errors: none within a token, the step's square on one of the lines between two."""
    error = torch.zeros(2, 3, 32, 64)
    error[1, :, :, 16:] = 0.5  # one of three lines between columns
    assert tool.border_error(error).tolist() == pytest.approx([0, 0.25 / 3 / 2])
    error[1, :, :, 16:] = 0
    error[1, :, 4:12, 4:12] = 7.0
    assert tool.border_error(error).tolist() == [0, 0]
