"""Normalised latents of pictures, against diffusers' own steps and the golden figures."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fakes.autoencoders import SMALL, small_model, small_rae, small_spec
from pid_pipelines import vaes
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_model import LoadedVae, load_vae, normalization
from pid_pipelines.vaes import VAES
from places import GOLDEN


def loaded(space: str) -> LoadedVae:
    return LoadedVae(small_spec(space), small_model(space), "cpu")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("space", SMALL)
def test_encode_is_what_diffusers_pipelines_do(space: str) -> None:
    image, model = picture(32, 48), small_model(space)
    x = torch.from_numpy(image)
    with torch.no_grad():
        if space == "qwenimage":
            z = model.encode(x[:, :, None]).latent_dist.mode()
            mean, std = (
                torch.tensor(values).view(1, 16, 1, 1, 1)
                for values in (model.config.latents_mean, model.config.latents_std)
            )
            wanted = ((z - mean) / std)[:, :, 0]
        elif space == "flux2":
            z = model.encode(x).latent_dist.mode()
            b, c, h, w = z.shape
            z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
            z = z.reshape(b, 4 * c, h // 2, w // 2)
            mean = model.bn.running_mean.view(1, -1, 1, 1)
            std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
            wanted = (z - mean) / std
        else:
            z = model.encode(x).latent_dist.mode()
            wanted = (z - (model.config.shift_factor or 0)) * model.config.scaling_factor
    with loaded(space) as vae:
        latent = vae.encode(image)
        assert latent.shape == (2, vae.channels, 32 // vae.down, 48 // vae.down)
        assert latent.dtype == np.float32
        np.testing.assert_allclose(latent, wanted.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("space", SMALL)
def test_decode_undoes_the_normalisation(space: str) -> None:
    model = small_model(space)
    with loaded(space) as vae:
        latent = np.random.default_rng(1).standard_normal((1, vae.channels, 2, 3), np.float32)
        image = vae.decode(latent)
        assert image.shape == (1, 3, 2 * vae.down, 3 * vae.down)
    with torch.no_grad():
        factor, shift = normalization(small_spec(space), model)
        z = torch.from_numpy(latent) / factor + shift
        if space == "qwenimage":
            wanted = model.decode(z[:, :, None]).sample[:, :, 0]
        elif space == "flux2":
            wanted = model.decode(torch.nn.functional.pixel_shuffle(z, 2)).sample
        else:
            wanted = model.decode(z).sample
    np.testing.assert_array_equal(image, wanted.numpy())


def test_normalisation_by_the_golden_figures() -> None:
    golden = load_file(GOLDEN / "latents/diffusers_latents.safetensors")
    statistics = SimpleNamespace(
        running_mean=golden["flux2/bn_mean"], running_var=golden["flux2/bn_var"], eps=1e-4
    )
    factor, shift = normalization(VAES["flux2"], SimpleNamespace(bn=statistics))
    raw = torch.nn.functional.pixel_unshuffle(golden["flux2-klein-4b/pipeline_output"], 2)
    normalised = (raw - shift) * factor
    torch.testing.assert_close(normalised, golden["flux2-klein-4b/latent"], rtol=0, atol=1e-6)
    for space, name in (("flux", "zimage"), ("flux", "flux"), ("sd3", "sd3"), ("sdxl", "sdxl")):
        factor, shift = normalization(VAES[space], None)
        raw = golden[f"{name}/latent"] / factor + shift
        torch.testing.assert_close(raw, golden[f"{name}/vae_input"], rtol=0, atol=2e-6)


def test_a_representation_autoencoder() -> None:
    spec, model = small_rae()
    assert spec.side == 64
    image = picture(64, 64)
    with torch.no_grad():
        z = model.encode(torch.from_numpy(image) / 2 + 0.5).latent
        back = 2 * model.decode(z).sample - 1
    assert z.std() > 0.1 and back.std() > 0.01
    with LoadedVae(spec, model, "cpu") as vae:
        latent = vae.encode(image)
        assert latent.shape == (2, 64, 4, 4) and vae.down == 16
        np.testing.assert_array_equal(latent, z.numpy())
        np.testing.assert_array_equal(vae.decode(latent), back.numpy())
        with pytest.raises(PipelineInputError, match=r"\[B, 3, 64, 64\], but got \[2, 3, 64, 80"):
            vae.encode(picture(64, 80))


def test_what_does_not_fit() -> None:
    vae = loaded("flux")
    with pytest.raises(PipelineInputError, match="multiples of 8, but got"):
        vae.encode(picture(12, 16))
    with pytest.raises(PipelineInputError, match=r"\[B, 16, h, w\]"):
        vae.decode(np.zeros((1, 4, 2, 2), np.float32))
    vae.close()
    with pytest.raises(PipelineInputError, match="it was closed"):
        vae.encode(picture(16, 16))


def test_spaces_and_devices_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PipelineInputError, match="but got 'other'"):
        load_vae("other")
    monkeypatch.setitem(vaes.VAES, "flux", small_spec("flux"))
    small_model("flux").save_pretrained(tmp_path)
    for device in ("nowhere", "cuda:9"):
        with pytest.raises(PipelineInputError, match="expected a device of torch") as error:
            load_vae("flux", tmp_path, device)
        assert "\n" not in str(error.value)
    with load_vae("flux", tmp_path) as vae:
        assert vae.encode(picture(16, 16)).shape == (2, 16, 2, 2)
