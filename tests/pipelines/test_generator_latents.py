"""Latents of generators, against those that diffusers' own steps make of them."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from pid_pipelines.backbones import BACKBONES
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_latents import pid_latent, pid_noise
from pid_pipelines.vaes import VAES
from pid_ref.registry import SPACES, find_space
from pid_runtime.latents import batch_normalization
from places import GOLDEN

Floats = NDArray[np.float32]

SIZE = (64, 96)


@pytest.fixture(scope="module")
def golden() -> dict[str, Floats]:
    with safe_open(GOLDEN / "latents" / "diffusers_latents.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_each_public_backbone_is_in_the_golden_file_or_shares_a_class(
    golden: dict[str, Floats],
) -> None:
    there = {BACKBONES[name.partition("/")[0]].pipeline for name in golden}
    runnable = {each.pipeline for each in BACKBONES.values() if each.pipeline}
    assert runnable - there == {"BooguImagePipeline"}


@pytest.mark.parametrize(
    ("backbone", "output", "latent"),
    [
        *(
            (name, "pipeline_output", "latent")
            for name in ("flux", "flux2", "flux2-klein-4b", "qwenimage", "sd3", "sdxl", "zimage")
        ),
        ("flux2-klein-4b", "step_output", "step_latent"),
    ],
)
def test_outputs_become_latents(
    backbone: str, output: str, latent: str, golden: dict[str, Floats]
) -> None:
    raw = batch_normalization(golden["flux2/bn_mean"], golden["flux2/bn_var"], 1e-4)
    space = find_space(backbone)
    got = pid_latent(space, golden[f"{backbone}/{output}"], SIZE, raw)
    wanted = golden[f"{backbone}/{latent}"]
    assert got.shape == (2, space.channels, 64 // space.down, 96 // space.down)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    assert np.abs(got - wanted[::-1]).max() > 0.1


def test_a_frame_is_left_out_and_squares_need_no_size(golden: dict[str, Floats]) -> None:
    latent = golden["qwenimage/latent"]
    np.testing.assert_array_equal(pid_latent(SPACES["qwenimage"], latent[:, :, None]), latent)
    tokens = golden["flux2/pipeline_output"][:, :16]
    square = pid_latent(SPACES["flux2"], tokens)
    np.testing.assert_array_equal(square[1, :, 1, 2], tokens[1, 6])


def test_noise_of_the_end_and_of_steps(golden: dict[str, Floats]) -> None:
    sigma = float(golden["sdxl/euler_sigma"][0])
    latent, level = pid_noise(SPACES["sdxl"], golden["sdxl/euler_latent"], sigma)
    np.testing.assert_allclose(latent, golden["sdxl/trained_latent"], rtol=0, atol=1e-6)
    assert level == pytest.approx(float(golden["sdxl/trained_sigma"][0]), abs=1e-6)
    same, level = pid_noise(SPACES["sdxl"], latent, sigma, keeps_variance=True)
    assert same is latent and level == pytest.approx(float(golden["sdxl/trained_sigma"][0]))
    for space in ("flux", "sdxl"):
        np.testing.assert_array_equal(pid_noise(SPACES[space], latent, 0.0)[0], latent)
    assert pid_noise(SPACES["flux"], latent, 0.25) == (latent, 0.25)


def test_what_are_no_latents_of_the_space() -> None:
    def array(*shape: int) -> Floats:
        return np.zeros(shape, np.float32)

    cases: list[tuple[str, Floats, Any, str]] = [
        ("flux", array(1, 24, 128), None, r"\[B, 16, h, w\], or tokens \[B, n, 64\], but got"),
        ("sdxl", array(1, 16, 8, 8), None, r"latents of sdxl, \[B, 4, h, w\], but got"),
        ("flux", array(1, 4, 8, 8), None, "latents of flux, "),
        ("flux", array(1, 24, 64), None, "tokens of a square picture, but got 1 x 24; give the h"),
        ("flux", array(1, 24, 64), (64, 64), "tokens of a picture of 64x64, but got 1 x 24"),
        ("flux2", array(1, 32, 8, 8), None, "but got raw ones .*; give the pipeline"),
        ("flux2", array(1, 32, 8, 7), None, "latents of flux2, "),
        ("qwenimage", array(1, 16, 2, 8, 8), None, "latents of qwenimage, "),
    ]
    for space, given, size, message in cases:
        with pytest.raises(PipelineInputError, match=message):
            pid_latent(SPACES[space], given, size)


def test_the_latents_space_has_the_autoencoders_channels() -> None:
    for space, vae in VAES.items():
        assert vae.channels == SPACES[space].channels
