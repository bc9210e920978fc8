"""Autoencoders in every layout that others write, read into the real classes of diffusers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from fakes.autoencoders import SMALL, ldm_names, small_model, small_rae, small_spec, wan_names
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_files import find_vae, read_vae
from pid_pipelines.vaes import VAES


def same(model: Any, other: Any) -> None:
    wanted, got = model.state_dict(), other.state_dict()
    assert list(wanted) == list(got)
    for name, value in wanted.items():
        if value.is_floating_point() and "time_conv" not in name:
            assert got[name].dtype == torch.float32
            assert torch.equal(value, got[name]), name


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous().clone() for name, value in tensors.items()}


@pytest.mark.parametrize("space", SMALL)
def test_a_folder_of_diffusers(space: str, tmp_path: Path) -> None:
    model = small_model(space)
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline"):
        same(model, read_vae(space, small_spec(space), folder))


@pytest.mark.parametrize("space", SMALL)
def test_a_file_of_diffusers(space: str, tmp_path: Path) -> None:
    model = small_model(space)
    save_file(contiguous(model.state_dict()), tmp_path / "vae.safetensors")
    same(model, read_vae(space, small_spec(space), tmp_path / "vae.safetensors"))


@pytest.mark.parametrize("space", ["flux", "sd3", "sdxl", "flux2"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_of_the_authors(space: str, prefix: str, tmp_path: Path) -> None:
    model = small_model(space)
    tensors = {f"{prefix}{name}": value for name, value in ldm_names(model).items()}
    assert f"{prefix}encoder.down.0.block.0.conv1.weight" in tensors
    if prefix:
        tensors["model.diffusion_model.other.weight"] = torch.zeros(2)
    save_file(contiguous(tensors), tmp_path / "ae.safetensors")
    same(model, read_vae(space, small_spec(space), tmp_path / "ae.safetensors"))


@pytest.mark.parametrize("flat", [False, True])
def test_wans_names(flat: bool, tmp_path: Path) -> None:
    model, path = small_model("qwenimage"), tmp_path / "QwenImage_VAE_2d.pth"
    tensors = wan_names(model, flat=flat)
    assert "decoder.upsamples.4.residual.2.weight" in tensors
    torch.save(tensors, path)
    read = read_vae("qwenimage", small_spec("qwenimage"), path)
    if not flat:
        same(model, read)
    image = torch.rand(1, 3, 1, 16, 24) * 2 - 1
    with torch.no_grad():  # a file without the time axis still gives the same for a picture
        latents = [each.encode(image).latent_dist.mode() for each in (model, read)]
        torch.testing.assert_close(*latents, rtol=0, atol=1e-6)
        images = [each.decode(latents[0]).sample for each in (model, read)]
        torch.testing.assert_close(*images, rtol=0, atol=1e-6)


Spoil = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "mid" not in k}, "is missing; take the file"),
        (lambda t: {k: v for k, v in t.items() if "encoder" not in k}, "holds no encoder"),
        (lambda t: t | {"bn.running_mean": torch.zeros(4)}, "bn.running_mean is none of its"),
        (lambda t: {"weight": torch.zeros(2)}, "its first tensor is 'weight'"),
        (lambda t: {}, "its first tensor is 'none'"),
    ],
)
def test_a_file_that_is_none(spoil: Spoil, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ae.safetensors"
    save_file(contiguous(spoil(ldm_names(small_model("flux")))), path)
    with pytest.raises(PipelineInputError, match=message) as error:
        read_vae("flux", small_spec("flux"), path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("evil.pth", "expected a file of weights"),
        ("cut.safetensors", "expected a file of weights"),
        ("list.pth", "holds a list"),
    ):
        with pytest.raises(PipelineInputError, match=message):
            read_vae("flux", small_spec("flux"), tmp_path / name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ("sd3", "flux", "factor 0.3611, shift 0.1159.*factor 1.5305, shift 0.0609"),
        ("sdxl", "flux", "of 16 channels.*has 4; take that of flux"),
        ("qwenimage", "flux", "AutoencoderKL, but .*AutoencoderKLQwenImage"),
        ("flux", "flux2", "AutoencoderKLFlux2, but .*AutoencoderKL;"),
    ],
)
def test_a_folder_of_another_space(held: str, asked: str, message: str, tmp_path: Path) -> None:
    small_model(held).save_pretrained(tmp_path)
    with pytest.raises(PipelineInputError, match=message):
        read_vae(asked, small_spec(asked), tmp_path)


def test_a_file_of_another_space(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save(ldm_names(small_model("sdxl")), path)
    with pytest.raises(PipelineInputError, match=r"of 16 channels, but .* has 4"):
        read_vae("flux", small_spec("flux"), path)
    with pytest.raises(PipelineInputError, match="holds one of Stable Diffusion's or FLUX's"):
        read_vae("qwenimage", small_spec("qwenimage"), path)
    torch.save(wan_names(small_model("qwenimage"), flat=True), path)
    with pytest.raises(PipelineInputError, match="holds one of Wan's or Qwen-Image's"):
        read_vae("flux", small_spec("flux"), path)


def test_a_representation_autoencoder(tmp_path: Path) -> None:
    spec, model = small_rae()
    model.save_pretrained(tmp_path / "rae")
    same(model, read_vae("dinov2", spec, tmp_path / "rae"))
    for other, message in (
        (replace(spec, channels=768), "of 768 channels, but that of .*rae has 64"),
        (
            replace(spec, config={**spec.config, "encoder_input_size": 448}),
            "dinov2 of 32x32 tokens, but .*rae holds dinov2 of 4x4 tokens; take nyu-visionx/RAE-d",
        ),
        (
            replace(spec, config={**spec.config, "encoder_type": "mae"}),
            "expected the autoencoder of dinov2, mae of 4x4",
        ),
    ):
        with pytest.raises(PipelineInputError, match=message):
            read_vae("dinov2", other, tmp_path / "rae")
    newer = replace(spec, kind="AutoencoderOfLater")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "config.json").write_text('{"_class_name": "AutoencoderOfLater"}')
    with pytest.raises(
        PipelineInputError, match=r"^expected a diffusers with AutoencoderOfLater, but got 0"
    ):
        read_vae("dinov2", newer, tmp_path / "later")
    (tmp_path / "model.pt").touch()
    with pytest.raises(PipelineInputError, match="as diffusers saves it, but got the file"):
        read_vae("dinov2", spec, tmp_path / "model.pt")
    small_model("flux").save_pretrained(tmp_path / "flux")
    with pytest.raises(PipelineInputError, match=r"AutoencoderRAE, but .* holds AutoencoderKL"):
        read_vae("dinov2", spec, tmp_path / "flux")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PipelineInputError, match=r"no config.json that names its class"):
        read_vae("flux", small_spec("flux"), tmp_path)
    small_model("flux").save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PipelineInputError, match="that diffusers loads") as error:
        read_vae("flux", small_spec("flux"), tmp_path)
    assert "\n" not in str(error.value)


def test_where_autoencoders_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = find_vae("flux", VAES["flux"], None)
    assert found == tmp_path / "checkpoints/ae.safetensors"
    assert find_vae("sd3", VAES["sd3"], None) == tmp_path / "checkpoints/sd3_vae"
    assert asked == [
        ("nvidia/PiD", ["checkpoints/ae.safetensors"]),
        ("nvidia/PiD", ["checkpoints/sd3_vae/**"]),
    ]
    assert "non-commercial" in caplog.text
    asked.clear()
    assert find_vae("flux", VAES["flux"], "someone/autoencoder") == tmp_path
    assert [patterns[0] for _, patterns in asked] == ["vae/config.json", "config.json"]
    (tmp_path / "vae").mkdir()
    asked.clear()
    assert find_vae("flux", VAES["flux"], "someone/pipeline") == tmp_path and len(asked) == 1
    with pytest.raises(PipelineInputError, match="is neither file nor folder"):
        find_vae("flux", VAES["flux"], "missing/ae.safetensors")


def test_an_autoencoder_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(PipelineInputError) as error:
        find_vae("flux", VAES["flux"], None)
    assert str(error.value) == (
        "expected the autoencoder of flux (checkpoints/ae.safetensors of nvidia/PiD), but it is "
        "not in the cache and the hub cannot be reached; fetch it by other means and pass --vae "
        "FILE_OR_DIR"
    )


def test_released_sizes_are_those_of_the_classes() -> None:
    for space, spec in VAES.items():
        assert spec.channels in (4, 16, 128) and spec.down == (16 if space == "flux2" else 8)
        assert spec.factor is None or np.size(spec.factor) in (1, spec.channels)
