"""Autoencoders as graphs: exported, and run without torch by `pid-upscale`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from fakes.autoencoders import (
    SMALL,
    ldm_names,
    small_model,
    small_rae,
    small_siglip,
    small_spec,
)
from pid_export.cli import main
from pid_export.vae import export_vae
from pid_pipelines import upscale_cli, vaes
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vae_graphs import DECODER_FILE, VAE_FILE, OnnxVae
from pid_pipelines.vae_model import LoadedVae, load_vae
from pid_pipelines.vaes import Vae

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
EditBundle = Callable[..., Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small autoencoders are taken for the released ones' sizes."""
    for space in SMALL:
        monkeypatch.setitem(vaes.VAES, space, small_spec(space))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of flux, from a file of its authors, by the command: not to be changed."""
    folder = tmp_path_factory.mktemp("flux")
    tensors = ldm_names(small_model("flux"))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "ae.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vaes.VAES, "flux", small_spec("flux"))
        arguments = ["--space", "zimage", "--vae", str(folder / "ae.safetensors"), "--quiet"]
        assert main([*arguments, "-o", str(folder / "vae")]) == 0
    return folder / "vae"


def same_as_diffusers(space: str, folder: Path) -> None:
    random = np.random.default_rng(0)
    graphs, model = OnnxVae(folder, space), LoadedVae(small_spec(space), small_model(space), "cpu")
    for batch, h, w in ((1, 2, 4), (2, 5, 3)):
        image = random.uniform(-1, 1, (batch, 3, h * model.down, w * model.down)).astype("f4")
        latent = graphs.encode(image)
        assert latent.shape == (batch, model.channels, h, w) and latent.dtype == np.float32
        np.testing.assert_allclose(latent, model.encode(image), rtol=0, atol=1e-4)
        np.testing.assert_allclose(graphs.decode(latent), model.decode(latent), rtol=0, atol=1e-4)


def test_a_space_s_graphs_are_diffusers(flux: Path) -> None:
    same_as_diffusers("flux", flux)
    said = json.loads((flux / VAE_FILE).read_text())
    assert (said["space"], said["kind"], said["down"]) == ("flux", "AutoencoderKL", 8)
    names = [f"{way}.onnx{data}" for way in ("decoder", "encoder") for data in ("", ".data")]
    assert sorted(said["files"]) == names
    assert b"site-packages" not in (flux / "encoder.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("space", [space for space in SMALL if space != "flux"])
def test_every_space_s_graphs_are_diffusers(space: str, tmp_path: Path) -> None:
    small_model(space).save_pretrained(tmp_path / "model")
    export_vae(space, tmp_path / "model", tmp_path / "vae")
    same_as_diffusers(space, tmp_path / "vae")


@pytest.mark.parametrize(
    ("space", "make"),
    [("siglip", small_siglip), pytest.param("dinov2", small_rae, marks=pytest.mark.slow)],
)
def test_graphs_of_those_that_take_squares_alone(
    space: str,
    make: Callable[[], tuple[Vae, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, model = make()
    monkeypatch.setitem(vaes.RAES, space, spec)
    model.save_pretrained(tmp_path / "model")
    said = export_vae(space, tmp_path / "model", tmp_path / "vae")
    assert (DECODER_FILE in said.files) == spec.decodes == (space == "dinov2")
    graphs, loaded = OnnxVae(tmp_path / "vae", space), load_vae(space, tmp_path / "model")
    image = np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 64)).astype("f4")
    latent = graphs.encode(image)
    assert latent.shape == (3, 64, 4, 4)
    np.testing.assert_allclose(latent, loaded.encode(image), rtol=0, atol=1e-4)
    if spec.decodes:
        wanted = loaded.decode(latent)
        np.testing.assert_allclose(graphs.decode(latent), wanted, rtol=0, atol=1e-4)
    else:
        with pytest.raises(PipelineInputError, match="encodes alone"):
            graphs.decode(latent)
    with pytest.raises(PipelineInputError, match=r"\[B, 3, 64, 64\], but got"):
        graphs.encode(image[:, :, :32])


def test_photos_without_torch(flux: Path, edit_bundle: EditBundle, tmp_path: Path) -> None:
    bundle = edit_bundle(lambda manifest: manifest.update(model={"space": "flux"}))
    photo, out = tmp_path / "boat.png", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'diffusers', 'transformers', 'onnx'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from pid_pipelines.upscale_cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    arguments = [str(bundle), str(photo), "--vae", str(flux), "--baseline", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "no caption was given" in done.stderr
    sizes: dict[str, Any] = {}
    for path in out.iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert sizes.keys() == {"boat.png", "boat-vae.png", "boat-sheet.png"}
    assert sizes["boat.png"] == (96, 80) and sizes["boat-vae.png"] == (24, 20)


def test_what_does_not_fit(
    flux: Path, edit_bundle: EditBundle, refusal: Refusal, tmp_path: Path
) -> None:
    with pytest.raises(PipelineInputError, match=r"of sd3, but .* holds that of flux"):
        OnnxVae(flux, "sd3")
    vae = OnnxVae(flux)
    with pytest.raises(PipelineInputError, match="multiples of 8, but got"):
        vae.encode(np.zeros((1, 3, 12, 16), np.float32))
    with pytest.raises(PipelineInputError, match=r"\[B, 16, h, w\]"):
        vae.decode(np.zeros((1, 4, 2, 2), np.float32))
    bundle = edit_bundle(lambda manifest: manifest.update(model={"space": "sd3"}))
    photo = tmp_path / "boat.png"
    Image.new("RGB", (16, 16)).save(photo)
    out = tmp_path / "larger.png"
    assert "holds that of flux" in refusal(
        upscale_cli.main, bundle, photo, "--vae", flux, "-o", out
    )
    target = tmp_path / "vae"
    for arguments, message in (
        (("--vae", photo), "expected --space with --vae"),
        (("--vae", photo, "--space", "flux", "--variant", "2k"), "expected no --variant with"),
        (("--vae", photo, "--space", "flux", "--precision", "bf16"), "expected --precision fp32"),
        (("--vae", photo, "--space", "flux"), "expected a file of weights"),
        (("--vae", photo, "--space", "siglip"), "as transformers saves it, but got the file"),
        (("--vae", photo, "--caption-encoder", "a", "--space", "flux"), "no --caption-encoder"),
    ):
        assert message in refusal(main, *arguments, "-o", target)
        assert not target.exists()
