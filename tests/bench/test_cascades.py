"""Cascades: their sizes are the released models', and they turn a latent into pixels."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pid_bench import work
from pid_bench.cascades import (
    CASCADES,
    OPT_IN,
    LanczosResize,
    build_cascade,
    lanczos_matrix,
    over_tiles,
    tile_starts,
)
from pid_bench.cases import Case
from pid_bench.diffusers_modules import (
    UPSCALER_VAE,
    Sd3Velocity,
    UpscalerVelocity,
    VaeDecode,
    VaeEncode,
)
from pid_bench.errors import BenchInputError
from pid_bench.rrdbnet import DenseBlock, RRDBNet
from pid_bench.stage import Pipeline, normal
from pid_bench.work import count, total
from pid_pipelines.vae_model import normalization
from pid_pipelines.vaes import VAES
from pid_ref.registry import find_space

META = torch.device("meta")
CPU = torch.device("cpu")
SHALLOW = 0.01
"""A depth that leaves one block."""


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decode(
    pipeline: Pipeline, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Mapping[str, nn.Module]]:
    modules = pipeline.build(device, dtype)
    with torch.no_grad():
        return pipeline.run(modules, normal(pipeline.latent_shape, device, torch.float32)), modules


def cascade(
    name: str, space: str, height: int, width: int, *, depth: float = 1.0, steps: int = 0
) -> Pipeline:
    return build_cascade(
        Case(name, "eager", space, "", width, height, "fp32", "cpu", 1, steps, depth, "random")
    )


# The modules


@pytest.mark.parametrize(
    ("name", "make", "millions"),
    [
        ("FLUX decoder", lambda: VaeDecode(VAES["flux"]), 49.55),
        ("SD3 decoder", lambda: VaeDecode(VAES["sd3"]), 49.55),
        ("SD3 encoder", lambda: VaeEncode(VAES["sd3"]), 34.27),
        ("SD3 medium transformer", Sd3Velocity, 2028.33),
        ("x4 upscaler UNet", UpscalerVelocity, 473.40),
        ("RRDBNet x4", RRDBNet, 16.70),
    ],
)
def test_released_parameter_counts(name: str, make: Any, millions: float) -> None:
    with META:
        assert round(parameters(make()) / 1e6, 2) == millions, name


def test_the_flop_of_a_dense_block_and_of_the_net() -> None:
    def conv(inputs: int, outputs: int) -> int:  # per pixel
        return 2 * 9 * inputs * outputs

    dense = sum(conv(64 + 32 * i, 32) for i in range(4)) + conv(64 + 32 * 4, 64)
    with META:
        block, net = DenseBlock(64, 32), RRDBNet()
        features, image = torch.empty(1, 64, 6, 8), torch.empty(1, 3, 6, 8)
    assert work.count_calls(block, (features,), {}, 1).flop == 48 * dense
    low = conv(3, 64) + 23 * 3 * dense + conv(64, 64)
    doubled, high = conv(64, 64), conv(64, 64) + conv(64, 64) + conv(64, 3)
    expected = 48 * (low + 4 * doubled + 16 * high)
    assert work.count_calls(net, (image,), {}, 1).flop == expected


def test_rrdbnet_quadruples_and_stays_near_its_input() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        assert RRDBNet(blocks=1)(torch.rand(2, 3, 5, 7)).shape == (2, 3, 20, 28)
        x = torch.randn(1, 8, 4, 4)
        block = DenseBlock(8, 4)
        nn.init.zeros_(block.merge.weight)
        nn.init.ones_(block.merge.bias)  # pyright: ignore[reportArgumentType]
        assert torch.allclose(block(x), x + 0.2)


def narrow_vae(space: str) -> VaeDecode:
    """The decoder of a space with few channels: what it decodes is not looked at."""
    if space == "qwenimage":
        config: dict[str, Any] = {"base_dim": 4}
    else:
        config = {"block_out_channels": (4,) * 4, "norm_num_groups": 2}
    spec = VAES[space]
    return VaeDecode(replace(spec, config={**spec.config, **config}))


@pytest.mark.parametrize("space", VAES)
def test_latents_are_denormalised_by_the_spaces_rule(
    space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = narrow_vae(space)
    latent = normal((1, find_space(space).channels, 2, 3), CPU, torch.float32)
    seen: list[Tensor] = []

    def vae_decode(z: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append(z)
        return (z,)

    monkeypatch.setattr(module.vae, "decode", vae_decode)
    rule = find_space(space)
    if space == "flux2":
        module.vae.bn.running_mean.fill_(0.25)
        module.vae.bn.running_var.fill_(4.0)
        factor, shift = normalization(VAES[space], module.vae)
        module.factor.copy_(factor)
        module.shift.copy_(shift)
        module(latent)
        # Channel 4 c + 2 row + column is at (row, column) of each 2x2 patch of channel c.
        assert seen[0].shape == (1, 32, 4, 6)
        corner = latent[:, 4 * 5 + 2 * 1 + 0] * (4.0 + 1e-4) ** 0.5 + 0.25
        assert torch.allclose(seen[0][:, 5, 1::2, 0::2], corner)
    elif space == "qwenimage":
        module(latent)
        mean, std = (module.vae.config[f"latents_{name}"] for name in ("mean", "std"))
        assert rule.factor is not None and rule.shift == tuple(mean)
        assert rule.factor == tuple(1 / value for value in std)
        assert seen[0].shape == (1, 16, 1, 2, 3)
        assert torch.allclose(seen[0][:, 3, 0], latent[:, 3] * std[3] + mean[3])
    else:
        module(latent)
        assert rule.factor is not None and rule.shift is not None
        (factor,), (shift,) = rule.factor, rule.shift
        assert torch.allclose(factor * (seen[0] - shift), latent, atol=1e-6)


def test_the_encoder_normalises_as_the_decoder_denormalises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(
        VAES["sd3"],
        config={**VAES["sd3"].config, "block_out_channels": (4,) * 4, "norm_num_groups": 2},
    )
    encoder, decoder = VaeEncode(spec), VaeDecode(spec)
    image = normal((1, 3, 16, 16), CPU, torch.float32)
    seen: list[Tensor] = []

    def vae_decode(z: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append(z)
        return (z,)

    monkeypatch.setattr(decoder.vae, "decode", vae_decode)
    with torch.no_grad():
        decoder(encoder(image))
        mean = encoder.vae.encode(image).latent_dist.mean
    assert mean.shape == (1, 16, 2, 2)
    assert torch.allclose(seen[0], mean, atol=1e-6)


# Resizing, tiles, steps


@pytest.mark.parametrize(
    ("size", "target"), [((5, 9), (20, 36)), ((8, 8), (8, 8)), ((7, 4), (9, 15))]
)
def test_lanczos_is_pillows(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).standard_normal(size, np.float32)
    ours = LanczosResize(size, target)(torch.tensor(image)[None, None])[0, 0]
    theirs = Image.fromarray(image).resize((target[1], target[0]), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=2e-6)


def test_lanczos_keeps_a_flat_image_flat() -> None:
    assert torch.allclose(lanczos_matrix(5, 20).sum(dim=1), torch.ones(20))


@pytest.mark.parametrize(
    ("size", "starts"),
    [
        (8, [0]),
        (64, [0]),
        (65, [0, 1]),
        (120, [0, 56]),  # 64 + 64 - 8
        (121, [0, 56, 57]),
        (256, [0, 56, 112, 168, 192]),
    ],
)
def test_tile_starts(size: int, starts: list[int]) -> None:
    assert tile_starts(size) == starts


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [(2048, 2048, 5 * 5), (4096, 4096, 9 * 9), (2688, 1536, 6 * 4), (512, 256, 1)],
)
def test_the_transformer_is_called_once_per_tile(width: int, height: int, tiles: int) -> None:
    pipeline = cascade("vae+onestep-sd3", "flux", height, width)
    calls = {stage.name: stage.calls for stage in pipeline.stages}
    assert calls == {
        "vae decode": 1,
        "resize": 1,
        "sd3 vae encode": 1,
        "sd3 transformer": tiles,
        "sd3 vae decode": 1,
    }


def test_tiles_blend_into_what_they_agree_on() -> None:
    latent = normal((1, 2, 30, 17), CPU, torch.float64)
    shapes: list[tuple[int, ...]] = []

    def double(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape))
        return 2 * part

    assert torch.allclose(over_tiles(double, latent, tile=12, overlap=4), 2 * latent)
    assert shapes == [(1, 2, 12, 12)] * (4 * 2)
    assert torch.allclose(over_tiles(double, latent), 2 * latent)  # one tile, smaller than 64


def test_tiles_fade_into_each_other() -> None:
    numbers = iter((1.0, 2.0))
    line = over_tiles(
        lambda part: torch.full_like(part, next(numbers)), torch.zeros(1, 1, 1, 14), 9, 4
    )
    # 14 wide: tiles at 0..8 and 5..13 share 5..8, where their weights are 4 3 2 1 and 1 2 3 4.
    expected = [1.0] * 5 + [1.2, 1.4, 1.6, 1.8] + [2.0] * 5
    assert torch.allclose(line[0, 0, 0], torch.tensor(expected))


# Whole cascades


@pytest.mark.parametrize(
    ("name", "space"),
    [*((name, "flux") for name in CASCADES), *(("vae+lanczos", space) for space in VAES)],
)
def test_a_full_size_decode_has_the_work_of_its_stages(name: str, space: str) -> None:
    pipeline = cascade(name, space, 2048, 1536, depth=SHALLOW, steps=2)
    with FlopCounterMode(display=False) as counter:
        image, modules = decode(pipeline, META, torch.bfloat16)
    assert image.shape == (1, 3, 2048, 1536) and image.dtype == torch.float32
    assert pipeline.encoded == (384, 512)
    assert list(modules) == [stage.name for stage in pipeline.stages]
    counted = total(count(stage, torch.bfloat16) for stage in pipeline.stages)
    assert counter.get_total_flops() == counted.flop


@pytest.mark.parametrize("space", VAES)
def test_every_space_decodes_to_finite_pixels(space: str) -> None:
    pipeline = cascade("vae+lanczos", space, 128, 64)
    image, _ = decode(pipeline, CPU)
    assert image.shape == (1, 3, 128, 64)
    assert image.isfinite().all() and image.std() > 0.01


@pytest.mark.parametrize(
    ("name", "reduced"),
    [
        ("vae+lanczos", ""),
        ("vae+rrdbnet", "1 of 23 blocks"),
        pytest.param("vae+onestep-sd3", "1 of 24 blocks", marks=pytest.mark.slow),
        pytest.param("vae+sdx4", "1 of 2 blocks", marks=pytest.mark.slow),
    ],
)
def test_a_small_cascade_ends_in_finite_pixels(name: str, reduced: str) -> None:
    pipeline = cascade(name, "flux", 64, 64, depth=SHALLOW, steps=2)
    assert pipeline.reduced == reduced
    image, modules = decode(pipeline, CPU)
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all() and image.std() > 0.01
    with torch.no_grad():
        again = pipeline.run(modules, normal(pipeline.latent_shape, CPU, torch.float32))
        other = pipeline.run(modules, normal(pipeline.latent_shape, CPU, torch.float32, seed=1))
    assert torch.equal(again, image)
    assert not torch.equal(other, image)


def test_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    stage = cascade("vae+rrdbnet", "sdxl", 256, 256, depth=SHALLOW).stages[1]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (stage.build(CPU, torch.float32).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_pixels_are_finite() -> None:
    pipeline = cascade("vae+rrdbnet", "sdxl", 64, 64, depth=SHALLOW)
    image, modules = decode(pipeline, CPU, torch.bfloat16)
    assert {p.dtype for module in modules.values() for p in module.parameters()} == {torch.bfloat16}
    assert image.dtype == torch.float32 and image.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("space", ["flux2", "qwenimage"])
@pytest.mark.parametrize("name", ["vae+onestep-sd3", "vae+sdx4"])
def test_bf16_pixels_of_the_others_are_finite(name: str, space: str) -> None:
    pipeline = cascade(name, space, 64, 64, depth=SHALLOW, steps=2)
    assert decode(pipeline, CPU, torch.bfloat16)[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASCADES)
def test_full_size_bf16_pixels_are_finite(name: str) -> None:
    pipeline = cascade(name, "flux", 2048, 2048, steps=2)
    image, _ = decode(pipeline, torch.device("cuda"), torch.bfloat16)
    assert image.shape == (1, 3, 2048, 2048) and image.isfinite().all()


def test_depth_keeps_a_share_of_the_blocks() -> None:
    pipeline = cascade("vae+rrdbnet", "flux", 256, 256, depth=0.5)
    assert pipeline.reduced == "12 of 23 blocks"
    whole = cascade("vae+rrdbnet", "flux", 256, 256)
    assert whole.reduced == ""
    works = [count(each.stages[1], torch.float32).parameters for each in (pipeline, whole)]
    assert works[0] < 0.55 * works[1]


def test_the_calls_of_the_upscaler_are_steps_and_guidance() -> None:
    pipeline = cascade("vae+sdx4", "flux", 2048, 2048, steps=20)
    unet = next(stage for stage in pipeline.stages if stage.name == "sdx4 unet")
    assert (unet.steps, unet.cfg, unet.tiles, unet.calls) == (20, 2, 1, 40)
    assert set(OPT_IN) <= set(CASCADES)
    with META:
        assert VaeDecode(UPSCALER_VAE)(torch.empty(1, 4, 8, 8)).shape == (1, 3, 32, 32)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("vae+lanczos", "flux2", 64, 96),
            {},
            "expected width and height in multiples of 64 for flux2, but got 96x64",
        ),
        (
            ("vae+lanczos", "flux", 0, 64),
            {},
            "expected width and height in multiples of 32 for flux, but got 64x0",
        ),
        (
            ("vae+rrdbnet", "flux", 64, 64),
            {"depth": 0.0},
            "expected a depth above 0 and at most 1, but got 0.0",
        ),
        (
            ("vae+sdx4", "flux", 64, 64),
            {"steps": 0},
            "expected 1 to 1000 steps, but got 0",
        ),
    ],
)
def test_refusals(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchInputError) as refused:
        cascade(*arguments, **options)
    assert str(refused.value) == message


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    pipeline = cascade("vae+rrdbnet", "flux", 64, 64)
    with pytest.raises(BenchInputError, match=r"pip install 'pid-trt\[bench\]'$"):
        pipeline.build("meta", torch.float32)
