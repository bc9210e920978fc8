"""The reference: its configuration, its sampler, and what it refuses."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.sampler import STUDENT_TIMES, sample, timesteps
from pid_ref.weights import RandomWeights

CONFIG = PidConfig(
    hidden_size=32,
    num_heads=2,
    patch_depth=2,
    pixel_hidden_size=4,
    pixel_attn_size=16,
    pixel_num_heads=2,
    pixel_depth=1,
    text_dim=8,
    text_max_length=4,
    latent_hidden=8,
    latent_res_blocks=1,
)
BATCH, HEIGHT, WIDTH = 2, 32, 64


@pytest.fixture(scope="module")
def net() -> PidNet:
    net = PidNet(CONFIG)
    net.load_state_dict(dict(RandomWeights(state_shapes(CONFIG), 0)))
    return net.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int) -> list[Tensor]:
    return [normal(BATCH, 3, HEIGHT, WIDTH, seed=i) for i in range(count)]


def inputs() -> dict[str, Any]:
    return {
        "latent": normal(BATCH, CONFIG.latent_channels, 1, 2, seed=10),
        "caption": normal(BATCH, 3, CONFIG.text_dim, seed=11),
        "sigma": torch.tensor([0.0, 0.7]),
        "noise": images(1)[0],
    }


def message(call: Callable[[], object]) -> str:
    """The one line of a refusal."""
    with pytest.raises(PidInputError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("expected ") and "but got" in text and "\n" not in text
    return text


# Times


def test_times_are_the_students() -> None:
    student = torch.tensor(STUDENT_TIMES).tolist()
    assert timesteps(4) == tuple(student)
    assert timesteps(2) == (student[0], student[2], 0)
    assert timesteps(1) == (1, 0)


@pytest.mark.parametrize("steps", [-1, 0, 3, 5, 8])
def test_other_numbers_of_steps_are_refused(net: PidNet, steps: int) -> None:
    wanted = f"expected 1, 2 or 4 steps, but got {steps}"
    assert message(lambda: timesteps(steps)) == wanted
    assert message(lambda: sample(net, **inputs(), steps=steps)) == wanted


# The sampler


@pytest.mark.parametrize("rule", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_decode_follows_the_rule(net: PidNet, rule: Any, steps: int) -> None:
    noise, *later = images(steps)
    seen: list[tuple[int, Tensor, Tensor]] = []
    given: dict[str, Any] = inputs() | {"noise": noise}
    image = sample(
        net, **given, step_noise=later, steps=steps, rule=rule, on_step=lambda *s: seen.append(s)
    )
    assert [step for step, _, _ in seen] == list(range(steps))
    assert torch.equal(image, seen[-1][2]) and image.dtype == torch.float32
    state = noise
    for (step, velocity, after), (t, t_next) in zip(seen, pairwise(timesteps(steps)), strict=True):
        with torch.no_grad():
            moment = torch.full((BATCH,), 1000 * t)
            v = net(state, moment, given["caption"], given["latent"], given["sigma"])
        torch.testing.assert_close(velocity, v, rtol=0, atol=0)
        if rule == "ode":
            expected = state + (t_next - t) * v
        else:
            expected = state - t * v
            if t_next:
                expected = (1 - t_next) * expected + t_next * later[step]
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
        state = after


def test_the_last_step_adds_no_noise_and_ode_none_at_all(net: PidNet) -> None:
    generator = torch.Generator()
    before = generator.get_state()
    sample(net, **inputs(), step_noise=generator, rule="ode")
    assert torch.equal(generator.get_state(), before)
    sample(net, **inputs(), step_noise=generator, steps=1)
    assert torch.equal(generator.get_state(), before)
    many, none = (
        sample(net, **inputs(), step_noise=noises, rule="ode") for noises in (images(9), None)
    )
    assert torch.equal(many, none)


def test_a_seed_is_a_generator(net: PidNet) -> None:
    def decode(seed: int) -> Tensor:
        return sample(net, **inputs(), step_noise=torch.Generator().manual_seed(seed))

    first = decode(1)
    assert torch.equal(first, decode(1))
    assert not torch.allclose(first, decode(2), atol=0.1)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(first.shape, generator=generator) for _ in range(3)]
    assert torch.equal(first, sample(net, **inputs(), step_noise=drawn))


def test_without_step_noise_torch_draws_it(net: PidNet) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = sample(net, **inputs())
    seeded = sample(net, **inputs(), step_noise=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, seeded)


def test_a_batch_is_its_images(net: PidNet) -> None:
    noises = images(3)
    both = sample(net, **inputs(), step_noise=noises)
    for b in range(BATCH):
        one: dict[str, Any] = {name: tensor[b : b + 1] for name, tensor in inputs().items()}
        alone = sample(net, **one, step_noise=[noise[b : b + 1] for noise in noises])
        torch.testing.assert_close(alone[0], both[b], rtol=0, atol=2e-5)


def test_times_of_ones_own(net: PidNet) -> None:
    own = sample(net, **inputs(), step_noise=images(3), times=timesteps(4))
    assert torch.equal(own, sample(net, **inputs(), step_noise=images(3)))
    visited: list[int] = []
    times = [1.0, 0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0]
    sample(net, **inputs(), times=times, on_step=lambda step, *_: visited.append(step))
    assert visited == list(range(7))


def test_a_network_in_bfloat16_decodes_to_float32(net: PidNet) -> None:
    half = PidNet(CONFIG).bfloat16().eval()
    half.load_state_dict(net.state_dict())
    want = sample(net, **inputs(), steps=1)
    got = sample(half, **inputs(), steps=1)
    assert got.dtype == torch.float32 and half.s_embedder.proj.weight.dtype == torch.bfloat16
    assert 0 < (got - want).abs().mean() < 0.1 * want.abs().mean()


@pytest.mark.parametrize(
    "times", [[], [0.0], [1.0], [1.0, 0.5], [0.5, 0.7, 0.0], [0.5, 0.5, 0.0], [1.5, 0.0]]
)
def test_impossible_times_are_refused(net: PidNet, times: list[float]) -> None:
    text = message(lambda: sample(net, **inputs(), times=times))
    assert "times descending from at most 1 to 0" in text


def test_step_noises_that_do_not_fit_are_refused(net: PidNet) -> None:
    for noises in ([], images(2), images(4), [noise[:1] for noise in images(3)]):
        text = message(lambda noises=noises: sample(net, **inputs(), step_noise=noises))
        assert "expected 3 step noises of shape (2, 3, 32, 64)" in text


@pytest.mark.parametrize(
    "sigma", [[0.0, 1.1], [-0.1, 0.0], [float("nan"), 0.0], [0.0], [0.0] * 3, [[0.0, 0.0]], 0.0]
)
def test_sigmas_that_do_not_fit_are_refused(net: PidNet, sigma: Any) -> None:
    wrong: dict[str, Any] = inputs() | {"sigma": torch.tensor(sigma)}
    assert "2 sigmas in [0, 1]" in message(lambda: sample(net, **wrong))


def test_an_unknown_rule_is_refused(net: PidNet) -> None:
    rule: Any = "sdee"
    assert "rule sde or ode" in message(lambda: sample(net, **inputs(), rule=rule))


# The network's inputs


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"noise": (BATCH, 3, 48, 64)}, "multiples of 32, but got 48x64"),
        ({"noise": (BATCH, 3, 32, 65)}, "multiples of 32, but got 32x65"),
        ({"noise": (BATCH, 3, 0, 64)}, "multiples of 32, but got 0x64"),
        ({"noise": (BATCH, 1, 32, 64)}, "image of shape (B, 3, H, W), but got (2, 1, 32, 64)"),
        ({"noise": (3, 32, 64)}, "image of shape (B, 3, H, W), but got (3, 32, 64)"),
        ({"noise": (BATCH, 3, 64, 64)}, "latent of shape (2, 16, 2, 2) for a 64x64 image"),
        ({"noise": (1, 3, 32, 64)}, "latent of shape (1, 16, 1, 2)"),
        ({"latent": (BATCH, 4, 1, 2)}, "latent of shape (2, 16, 1, 2)"),
        ({"latent": (BATCH, 16, 2, 1)}, "latent of shape (2, 16, 1, 2)"),
        ({"latent": (BATCH, 16, 2)}, "latent of shape (2, 16, 1, 2)"),
        ({"caption": (BATCH, 3, 9)}, "embedding of shape (2, T, 8), but got (2, 3, 9)"),
        ({"caption": (1, 3, 8)}, "embedding of shape (2, T, 8), but got (1, 3, 8)"),
        ({"caption": (3, 8)}, "embedding of shape (2, T, 8), but got (3, 8)"),
        ({"caption": (BATCH, 5, 8)}, "1 to 4 caption tokens, but got 5"),
        ({"caption": (BATCH, 0, 8)}, "1 to 4 caption tokens, but got 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    net: PidNet, wrong: dict[str, tuple[int, ...]], part: str
) -> None:
    given: dict[str, Any] = inputs() | {name: torch.zeros(shape) for name, shape in wrong.items()}
    assert part in message(lambda: sample(net, **given))


def test_a_dinov2_latent_counts_for_64_pixels() -> None:
    config = replace(CONFIG, latent_channels=768, latent_down=16)
    net = PidNet(config)
    caption = torch.zeros(1, 1, 8)
    net.check_inputs(torch.zeros(1, 3, 64, 128), caption, torch.zeros(1, 768, 1, 2))
    text = message(
        lambda: net.check_inputs(torch.zeros(1, 3, 96, 128), caption, torch.zeros(1, 768, 1, 2))
    )
    assert "multiples of 64, but got 96x128" in text


# The configuration


def test_a_configuration_survives_json() -> None:
    assert PidConfig.from_json(json.dumps(asdict(CONFIG))) == CONFIG
    assert PidConfig.from_json("{}") == PidConfig()


def wrong_configurations() -> Iterator[tuple[str, str]]:
    yield "not JSON", "dimensions as JSON"
    yield "[" * 100_000, "dimensions as JSON"
    yield '{"hidden_size": ' + "9" * 5000 + "}", "JSON"
    yield "[]", "JSON object"
    yield "null", "JSON object"
    for fields, part in (
        ({"hidden": 64}, "but got 'hidden'"),
        ({"hidden_size": "64"}, "hidden_size to be an integer"),
        ({"hidden_size": 64.0}, "hidden_size to be an integer"),
        ({"hidden_size": True}, "hidden_size to be an integer"),
        ({"hidden_size": 10**12}, "hidden_size to be an integer from 1"),
        ({"hidden_size": 100}, "hidden_size to be a multiple of 96"),
        ({"num_heads": 0}, "num_heads to be an integer from 1"),
        ({"num_heads": -24}, "num_heads to be an integer from 1"),
        ({"num_heads": 384}, "heads at least 8 wide"),
        ({"pixel_num_heads": 288}, "heads at least 8 wide"),
        ({"patch_size": 0}, "patch_size to be an integer from 1"),
        ({"patch_size": 48}, "rope_reference to be a multiple of 48"),
        ({"patch_size": 64}, "to be a multiple of patch_size 64"),
        ({"latent_unpatchify": 0}, "latent_unpatchify to be an integer from 1"),
        ({"latent_unpatchify": 3}, "latent_channels to be a multiple of 9"),
        ({"latent_interval": 0}, "latent_interval to be an integer from 1"),
        ({"latent_res_blocks": -1}, "latent_res_blocks to be an integer from 0"),
        ({"latent_padding": "reflect"}, "latent_padding to be 'zeros' or 'replicate'"),
        ({"latent_gate": ["token"]}, "latent_gate to be 'channel' or 'token'"),
        ({"pixel_gate": 1}, "pixel_gate to be true or false"),
        ({"pixel_depth": 0}, "pixel_depth to be an integer from 1"),
        ({"text_dim": 0}, "text_dim to be an integer from 1"),
        ({"scale": 1}, "to be a multiple of patch_size 16"),
    ):
        yield json.dumps(fields), part


@pytest.mark.parametrize(
    ("text", "part"), list(wrong_configurations()), ids=lambda value: value[:40]
)
def test_impossible_configurations_are_refused(text: str, part: str) -> None:
    assert part in message(lambda: PidConfig.from_json(text))
