"""The encoder of Scale-RAE's latents, with small random weights of the real class."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes.autoencoders import small_model, small_siglip
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.siglip import read_siglip
from pid_pipelines.vae_files import read_vae
from pid_pipelines.vae_model import LoadedVae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("siglip")
    small_siglip()[1].save_pretrained(path)
    return path


def test_a_latent_is_the_last_layer_normed_without_weights(folder: Path) -> None:
    spec, model = small_siglip()
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    tower = getattr(model.vision_model, "vision_model", model.vision_model)
    before: list[torch.Tensor] = []
    tower.post_layernorm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    small = torch.nn.functional.interpolate(
        torch.from_numpy(image), (56, 56), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        tower(small)
    states = before[0].numpy()
    wanted = states - states.mean(-1, keepdims=True)
    wanted /= np.sqrt(states.var(-1, keepdims=True) + 1e-6)
    with LoadedVae(spec, read_vae("siglip", spec, folder), "cpu") as vae:
        latent = vae.encode(image)
        assert latent.shape == (2, 64, 4, 4) and vae.down == 16
        np.testing.assert_allclose(latent[0, :, 1, 2], wanted[0, 6], atol=1e-4)
        np.testing.assert_allclose(latent[1, :, 3, 0], wanted[1, 12], atol=1e-4)
        with pytest.raises(PipelineInputError, match=r"\[B, 3, 64, 64\], but got"):
            vae.encode(image[:, :, :48])
        with pytest.raises(PipelineInputError, match="encodes alone; decode with PiD"):
            vae.decode(latent)


def test_the_vision_half_may_be_saved_alone(folder: Path, tmp_path: Path) -> None:
    spec, model = small_siglip()
    model.vision_model.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        whole, alone = (
            read_siglip("siglip", spec, each).encode(image) for each in (folder, tmp_path)
        )
    torch.testing.assert_close(alone, whole, rtol=0, atol=0)


def test_what_is_no_such_encoder(folder: Path, tmp_path: Path) -> None:
    spec, model = small_siglip()
    with pytest.raises(PipelineInputError, match=r"no config\.json of transformers; take google/s"):
        read_siglip("siglip", spec, tmp_path)
    small_model("flux").save_pretrained(tmp_path / "flux")
    with pytest.raises(PipelineInputError, match=r"no config\.json of transformers"):
        read_siglip("siglip", spec, tmp_path / "flux")
    other = replace(spec, config={**spec.config, "hidden_size": 1152})
    with pytest.raises(
        PipelineInputError,
        match=r"2 of 1152 channels, 56 pixels in patches of 14, but .* holds one of 64 channels",
    ):
        read_siglip("siglip", other, folder)
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(PipelineInputError, match="holds siglip_text_model; take"):
        read_siglip("siglip", spec, tmp_path / "text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(PipelineInputError, match="transformers cannot load") as error:
        read_siglip("siglip", spec, tmp_path / "empty")
    assert "\n" not in str(error.value)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(PipelineInputError, match="as transformers saves it, but got the file"):
        read_vae("siglip", spec, file)


def test_a_file_without_the_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec = small_siglip()[0]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "text" in k}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PipelineInputError, match=r"lacks .*; fetch google/siglip2-so400m"):
        read_siglip("siglip", spec, tmp_path)
