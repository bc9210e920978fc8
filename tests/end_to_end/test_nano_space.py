"""The space whose latents need no network: registry, bundle, `Decoder.encode`, `pid-upscale`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from pid_export import cli, verify, verify_cli
from pid_pipelines import upscale_cli
from pid_ref import hub
from pid_ref.checkpoint import read_checkpoint, state_shapes
from pid_ref.registry import NANO, NANO_STD, SPACES, Checkpoint
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.folder import parse_manifest, read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, PACKED_DCT
from pid_runtime.bundle.manifest_check import CODEC_SIZES
from pid_runtime.command.images import to_uint8
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano import block_dct, codec
from pid_runtime.nano.photos import padded, photo_size, read_photo, resized
from pid_runtime.noise import standard_normal

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]

SEED = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As the one that ships, but with random weights and fewer blocks."""
    config = replace(NANO.config, patch_depth=1, pixel_depth=1)
    weights = RandomWeights(state_shapes(config), SEED)
    file = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    save_file({name: weights[name].bfloat16() for name in weights}, file)
    return replace(NANO, config=config, file=file)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `checkpoint`, made by the command a user would type."""
    path = tmp_path_factory.mktemp("bundle") / "nano"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "find_checkpoint", lambda space, variant: checkpoint)
        patch.setattr(hub, "download", lambda *_: pytest.fail("nothing is to be downloaded"))
        arguments = ["--space", "nano", "--buckets", "tiny=256", "--quiet", "-o", str(path)]
        assert cli.main(arguments) == 0
    return path


@pytest.fixture(scope="module")
def pid(bundle: Path) -> Decoder:
    return Decoder.open(bundle, threads=1, verify=False)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    planes = [40 + 200 * x // width, 30 + 180 * y // height, 120 + 60 * (x > y)]
    return np.stack(planes, axis=-1).astype(np.uint8)


# Registry


def test_the_space_is_what_the_codec_makes() -> None:
    space = SPACES["nano"]
    assert space is NANO.space and space.std is NANO_STD
    assert (space.channels, space.down) == (block_dct.CHANNELS, block_dct.LATENT_PIXEL)
    assert len(NANO_STD) == len(block_dct.BASIS) and min(NANO_STD) > 0
    assert CODEC_SIZES[PACKED_DCT] == (space.channels, len(NANO_STD))
    assert [each.name for each in SPACES.values() if each.std is not None] == ["nano"]


def test_the_network_is_small_and_has_the_released_head_sizes() -> None:
    config = NANO.config
    assert (config.latent_channels, config.latent_down) == (NANO.space.channels, NANO.space.down)
    assert (config.scale, config.version) == (NANO.space.scale, NANO.version)
    assert (config.head_dim, config.pixel_head_dim) == (64, 72)
    assert sum(map(math.prod, state_shapes(config).values())) <= 6e6


def test_the_weights_that_ship_fit() -> None:
    assert NANO.file is not None
    state = read_checkpoint(NANO.file, NANO)
    assert all(state[name].dtype == torch.bfloat16 for name in state)
    assert all(bool(state[name].isfinite().all()) for name in state)
    assert NANO.file.stat().st_size <= 12e6


# Bundle


def test_the_manifest_says_where_all_comes_from(bundle: Path, checkpoint: Checkpoint) -> None:
    manifest = read_manifest(bundle)
    assert checkpoint.file is not None
    model = manifest.model
    assert model["name"] == "nano any (v1.5)" and model["checkpoint"] == NANO.name
    assert model["weights"]["file"] == checkpoint.file.name
    assert model["captioned"] is False and model["trained_sizes"] == []
    assert "Apache-2.0" in model["weights_license"] and "NVIDIA" not in model["weights_license"]
    assert manifest.codec is not None and manifest.codec.kind == "packed_dct"
    assert manifest.codec.std == tuple(NANO_STD)
    raw = json.loads((bundle / MANIFEST_FILE).read_text())
    assert raw["codec"] == {"kind": "packed_dct", "std": list(NANO_STD)}
    assert raw["format_version"] == [1, 4]


def test_verify_finds_the_weights_itself(
    bundle: Path,
    checkpoint: Checkpoint,
    run_command: RunCommand,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(verify.CHECKPOINTS, NANO.name, checkpoint)
    code, out, _ = run_command(verify_cli.main, bundle, "--backend", "torch", "--quiet")
    assert code == 0, out
    other = tmp_path / "nano.safetensors"
    other.write_bytes(b"of another version")
    monkeypatch.setitem(verify.CHECKPOINTS, NANO.name, replace(checkpoint, file=other))
    assert "but got other contents in " in refusal(verify_cli.main, bundle)


def edited(bundle: Path, **members: Any) -> str:
    raw = json.loads((bundle / MANIFEST_FILE).read_text())
    return json.dumps({**raw, **members})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "in manifest.json, codec, but got []"),
        ({}, "expected a member 'kind'"),
        ({"kind": 3}, "expected a string"),
        ({"kind": "packed_dct"}, "expected 48 usable std of the codec, but the manifest has"),
        ({"kind": "packed_dct", "std": [1.0] * 47}, "expected 48 usable std"),
        ({"kind": "packed_dct", "std": [1.0] * 47 + [0]}, "expected 48 usable std"),
        ({"kind": "packed_dct", "std": [1.0] * 47 + [1e10]}, "expected 48 usable std"),
        ({"kind": "packed_dct", "std": [1.0] * 47 + ["1"]}, "expected a number"),
        ({"kind": "packed_dct", "std": 1.0}, "expected a list"),
    ],
)
def test_codecs_that_make_no_sense(bundle: Path, value: Any, message: str) -> None:
    with pytest.raises(PidRuntimeError) as caught:
        parse_manifest(edited(bundle, codec=value))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_codec_of_other_channels(golden_bundle: Path) -> None:
    raw = json.loads((golden_bundle / MANIFEST_FILE).read_text())
    raw["codec"] = {"kind": "packed_dct", "std": [1.0] * 48}
    with pytest.raises(PidRuntimeError, match="expected 192 latent channels for packed_dct"):
        parse_manifest(json.dumps(raw))


def test_codecs_of_the_future_and_none(bundle: Path) -> None:
    image = np.zeros((1, 3, 8, 8), np.float32)
    later = parse_manifest(edited(bundle, codec={"kind": "wavelet", "levels": 3}))
    for call in (codec.encode, codec.native_decode):
        with pytest.raises(PidRuntimeError, match="but got one with an unknown one, 'wavelet'"):
            call(later, image)
    none = parse_manifest(edited(bundle, codec=None))
    assert none.codec is None and "codec" not in json.loads(none.to_json())
    with pytest.raises(PidRuntimeError, match=r"expected a bundle with a codec, .* one without"):
        codec.encode(none, image)
    assert parse_manifest(later.to_json()) == later


# Decoder


def test_encode_and_the_native_decoder(pid: Decoder) -> None:
    image = picture(16, 24)
    latent = pid.encode(image[None])
    assert latent.shape == (1, 192, 2, 3) and latent.dtype == np.float32
    floats = codec.from_uint8(image)[None]
    np.testing.assert_array_equal(latent, block_dct.encode(floats, NANO_STD))
    for other in (floats, floats.astype(np.float64), torch.from_numpy(floats)):
        np.testing.assert_array_equal(pid.encode(other), latent)
    native = pid.native_decode(latent)
    assert native.shape == (1, 3, 16, 24)
    np.testing.assert_array_equal(native, block_dct.decode(latent, NANO_STD))
    np.testing.assert_array_equal(to_uint8(native)[0], image)


def test_noise_is_mixed_in_by_seed(pid: Decoder) -> None:
    images = np.stack([picture(64, 64)] * 2)
    clean = pid.encode(images)
    noisy = pid.encode(images, sigma=0.25, seed=5)
    noise = (noisy - 0.75 * clean) / 0.25
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(pid.encode(images, sigma=0.25, seed=5), noisy)
    np.testing.assert_array_equal(pid.encode(images[1:], sigma=0.25, seed=6)[0], noisy[1])
    np.testing.assert_array_equal(pid.encode(images, sigma=0.0, seed=5), clean)
    # Nothing of the latent's noise is in the decode's own.
    own = standard_normal(5, 0, noise[0].size).reshape(noise[0].shape)
    assert abs(np.corrcoef(noise[0].ravel(), own.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "expected uint8 images of shape"),
        (np.zeros((1, 3, 8, 8), np.uint8), "expected uint8 images of shape"),
        (np.zeros((1, 12, 8, 3), np.uint8), "multiples of 8, but got"),
        (np.zeros((1, 8, 8, 3), np.float32), "expected images of shape"),
        (np.zeros((1, 3, 8, 8), np.int32), "but got int32; convert them"),
    ],
)
def test_images_that_do_not_fit(pid: Decoder, image: NDArray[Any], message: str) -> None:
    with pytest.raises(PidRuntimeError, match=message):
        pid.encode(image)


def test_photos_may_be_given_as_they_are(pid: Decoder, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", 15, 17)
    want = pid.encode(padded(read_photo(photo), 8)[None])
    assert want.shape == (1, 192, 2, 3)
    np.testing.assert_array_equal(pid.encode(photo), want)
    np.testing.assert_array_equal(pid.encode(str(photo)), want)
    with Image.open(photo) as opened:
        np.testing.assert_array_equal(pid.encode(opened), want)


def test_images_of_another_range_are_refused(pid: Decoder) -> None:
    with pytest.raises(PidRuntimeError, match=r"in \[-1, 1\], but got values up to 255; scale"):
        pid.encode(np.full((1, 3, 8, 8), 255, np.float32))
    assert np.isfinite(pid.encode(np.full((1, 3, 8, 8), 1.2, np.float32))).all()


def test_noise_levels_that_are_none(pid: Decoder) -> None:
    wrong: tuple[Any, ...] = (-0.1, 1.5, math.nan, "0.2", True)
    for sigma in wrong:
        with pytest.raises(PidRuntimeError, match=r"expected sigma in \[0, 1\], but got"):
            pid.encode(np.zeros((1, 3, 8, 8), np.float32), sigma=sigma)


# pid-upscale


def save(path: Path, height: int, width: int, **options: Any) -> Path:
    Image.fromarray(picture(height, width)).save(path, **options)
    return path


def decoded(pid: Decoder, photo: Path, sigma: float = 0.0, seed: int = 0) -> NDArray[np.uint8]:
    """What `pid-upscale` must give, by the functions it is made of."""
    image = read_photo(photo)
    latent = pid.encode(padded(image, 8)[None], sigma=sigma, seed=seed)
    pixels = pid.decode(latent, sigma=sigma, seed=seed, output="uint8")[0]
    return pixels[: 4 * image.shape[1], : 4 * image.shape[2]]


@pytest.mark.parametrize(("height", "width"), [(16, 24), (15, 17), (1, 1), (8, 33)])
def test_photos_of_any_size(
    bundle: Path,
    pid: Decoder,
    run_command: RunCommand,
    tmp_path: Path,
    height: int,
    width: int,
) -> None:
    photo, target = save(tmp_path / "photo.png", height, width), tmp_path / "image.png"
    arguments = (bundle, photo, "-o", target, "--seed", 2, "--json", "--threads", 1)
    code, out, err = run_command(upscale_cli.main, *arguments)
    assert (code, err) == (0, "")  # no warning about captions or sizes either
    (image,) = json.loads(out)["images"]
    assert (image["width"], image["height"]) == (4 * width, 4 * height)
    assert image["photo"] == str(photo) and "latent" not in image
    with Image.open(target) as read:
        np.testing.assert_array_equal(np.asarray(read), decoded(pid, photo, seed=2))


def test_noise_and_rotation_of_a_photo(
    bundle: Path, pid: Decoder, run_command: RunCommand, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = save(tmp_path / "photo.png", 16, 24, exif=exif)
    target = tmp_path / "image.png"
    arguments = (photo, "-o", target, "--sigma", 0.5, "--seed", 9, "--threads", 1)
    code, out, err = run_command(upscale_cli.main, bundle, *arguments)
    assert (code, err) == (0, "") and ": 64x96, sigma 0.5, seed 9, " in out
    with Image.open(target) as read:
        np.testing.assert_array_equal(np.asarray(read), decoded(pid, photo, 0.5, 9))


def test_a_folder_of_photos(bundle: Path, run_command: RunCommand, tmp_path: Path) -> None:
    folder, target = tmp_path / "photos", tmp_path / "images"
    folder.mkdir()
    save(folder / "b.jpg", 8, 16)
    save(folder / "A.PNG", 9, 8)
    (folder / "notes.txt").write_text("not a photo")
    arguments = (folder, "-o", target)
    code, out, err = run_command(upscale_cli.main, bundle, *arguments, "--threads", 1, "--steps", 1)
    assert code == 0 and out.count("\n") == 2
    assert err.startswith(f"warning: skipped 1 of 3 files in {folder}: .txt is none of *.png, ")
    sizes = {path.name: photo_size(path) for path in target.iterdir()}
    assert sizes == {"A.png": (32, 36), "b.png": (64, 32)}


def test_a_photo_that_is_too_large_is_fitted(
    bundle: Path, pid: Decoder, run_command: RunCommand, tmp_path: Path
) -> None:
    photo, target = save(tmp_path / "large.png", 72, 88), tmp_path / "image.png"
    arguments = (bundle, photo, "-o", target, "--fit", "--threads", 1)
    assert run_command(upscale_cli.main, *arguments)[::2] == (0, "")
    # 64 latent pixels fit: 7 x 8 blocks, and 72:88 in 56 x 64 pixels.
    reduced = resized(read_photo(photo), 52, 64)
    pixels = pid.decode(pid.encode(padded(reduced, 8)[None]), output="uint8")[0]
    with Image.open(target) as image:
        assert image.size == (256, 208)
        np.testing.assert_array_equal(np.asarray(image), pixels[:208, :256])
    small = save(tmp_path / "small.png", 8, 24)
    arguments = (bundle, small, "-o", target, "--fit", "--overwrite", "--threads", 1)
    assert run_command(upscale_cli.main, *arguments)[::2] == (0, "")
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), decoded(pid, small))


def test_photos_that_cannot_be_decoded(
    bundle: Path, golden_bundle: Path, refusal: Refusal, tmp_path: Path
) -> None:
    photo, target = save(tmp_path / "photo.png", 8, 8), tmp_path / "image.png"
    large, text = save(tmp_path / "large.png", 72, 88), tmp_path / "text.png"
    text.write_text("not a photo")
    for arguments, message in (
        ((bundle, large), "--fit, which reduces this photo of 88x72"),
        ((bundle, text), "is no image that Pillow reads"),
        ((bundle, tmp_path / "missing.png"), "is no file"),
        ((bundle,), "expected photos or a --manifest, but got neither"),
        ((bundle, photo, "--manifest", photo), "but got both"),
        ((bundle, photo, "--format", "png"), "expected --format with a folder"),
        ((bundle, photo, text), "expected a folder for 2 pictures"),
        ((bundle, photo, "--baseline"), "expected a folder for 2 pictures"),
        ((bundle, photo, "--sigma", "0,1.5"), "expected numbers from 0 to 1"),
        ((bundle, photo, "--prompt", "x"), "expected no --prompt, since nano any (v1.5) was"),
        ((bundle, photo, "--encoder", "x"), "expected a prompt for --encoder to encode"),
        ((bundle, photo, "--vae", "x"), "expected no --vae, since this bundle has a codec"),
        ((bundle, photo, "--crop"), "expected sides of at least 16 pixels with --crop"),
        ((golden_bundle, photo), "but got one that names no latent space"),
    ):
        assert message in refusal(upscale_cli.main, *arguments, "-o", target)
        assert not target.exists()
    (tmp_path / "empty").mkdir()
    arguments = (bundle, tmp_path / "empty", "-o", tmp_path / "images")
    assert "expected *.png, *.jpg, " in refusal(upscale_cli.main, *arguments)
    assert not (tmp_path / "images").exists()
