"""`pid-decode` as a user meets it: files in, files out, one line for every mistake."""

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from pid_runtime import __version__
from pid_runtime.backends.memory import HostMemory
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import images
from pid_runtime.command.decode_cli import main
from pid_runtime.command.latent_files import LatentForm, open_latent_file
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from places import GOLDEN

CHANNELS, TEXT, DIM = 16, 12, 32

EditBundle = Callable[..., Path]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


LATENT, CAPTION = normal(CHANNELS, 2, 3, seed=1), normal(TEXT, DIM, seed=2)


class Work:
    """A folder to work in, with a latent and a caption, and the command to run there."""

    def __init__(self, folder: Path, bundle: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.bundle, self.capture = folder, bundle, capture
        self.latent = self.file("latent", latent=LATENT)
        self.caption = self.file("caption", caption=CAPTION)
        self.image = folder / "image.png"

    def file(self, name: str, **tensors: torch.Tensor) -> Path:
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
        return path

    def run(self, *arguments: object, bundle: Path | None = None) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a run without hashing the bundle."""
        return self.run_verified("--no-verify", *arguments, bundle=bundle)

    def run_verified(self, *arguments: object, bundle: Path | None = None) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in (bundle or self.bundle, "--threads", 1, *arguments)])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else -1
        out, err = self.capture.readouterr()
        return code, out, err

    def decode(
        self, *arguments: object, latent: Path | None = None, bundle: Path | None = None
    ) -> NDArray[np.uint8]:
        """Pixels of an image decoded without complaint."""
        self.image.unlink(missing_ok=True)
        chosen = ("--latent", latent or self.latent, "-o", self.image, *arguments)
        code, _, err = self.run("--quiet", *chosen, bundle=bundle)
        assert (code, err) == (0, "")
        return pixels(self.image)

    def refusal(self, *arguments: object, bundle: Path | None = None) -> str:
        """The one line a run ends with; it must leave nothing behind."""
        before = tree(self.folder)
        code, out, err = self.run_verified(*arguments, bundle=bundle)
        assert (code, out) == (2, ""), err
        assert err.startswith("pid-decode: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert tree(self.folder) == before
        return err

    def mistake(
        self, *arguments: object, latent: Path | None = None, bundle: Path | None = None
    ) -> str:
        """The refusal of a decode of one latent with a caption."""
        caption = (
            () if {"--caption", "--captions"} & set(arguments) else ("--caption", self.caption)
        )
        chosen = ("--latent", latent or self.latent, "-o", self.image, *caption, *arguments)
        return self.refusal(*chosen, bundle=bundle)


@pytest.fixture
def work(tmp_path: Path, golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Work:
    folder = tmp_path / "work"
    folder.mkdir()
    return Work(folder, golden_bundle, capsys)


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    root.handlers[:], root.level = handlers, level


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def decoded(bundle: Path, latent: torch.Tensor, **arguments: Any) -> NDArray[np.uint8]:
    """What the decoder makes of a latent `[C, h, w]` with `CAPTION`, if no other is given."""
    with Decoder.open(bundle, threads=1, verify=False) as pid:
        caption = arguments.pop("caption", CAPTION[None])
        return pid.decode(latent[None], caption, output="uint8", **arguments)[0]


# One latent


def test_decodes_one_latent(work: Work) -> None:
    code, out, err = work.run_verified(
        "--latent", work.latent, "--caption", work.caption, "-o", work.image, "--seed", 7,
        "--sigma", 0.25,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith(f"{work.image}: 96x64, seed 7, ") and out.count("\n") == 1
    want = decoded(work.bundle, LATENT, seed=7, sigma=0.25)
    np.testing.assert_array_equal(pixels(work.image), want)


def test_options_reach_the_decoder(work: Work) -> None:
    for options, arguments in (
        (("--steps", 1), {"steps": 1}),
        (("--steps", 2, "--rule", "ode"), {"steps": 2, "rule": "ode"}),
        (("--seed", 2**64 - 1), {"seed": 2**64 - 1}),
        (("--device", "cpu"), {}),
        (("--provider", "CPUExecutionProvider"), {}),
    ):
        got = work.decode("--caption", work.caption, *options)
        np.testing.assert_array_equal(got, decoded(work.bundle, LATENT, **arguments))


def test_torch_gives_the_same_image(work: Work) -> None:
    ours = work.decode("--caption", work.caption)
    theirs = work.decode("--caption", work.caption, "--backend", "torch", "--device", "cpu")
    assert abs(ours.astype(int) - theirs).max() <= 1


def test_json(work: Work) -> None:
    arguments = ("--latent", work.latent, "-o", work.image, "--caption", work.caption, "--json")
    code, out, err = work.run(*arguments)
    assert (code, err) == (0, "")
    result = json.loads(out)
    (image,) = result["images"]
    assert image.pop("seconds") > 0
    assert image == {
        "latent": str(work.latent),
        "index": 0,
        "image": str(work.image),
        "width": 96,
        "height": 64,
        "seed": 0,
        "sigma": 0.0,
    }
    assert result["backend"] == "onnxruntime" and result["device"] == "cpu"
    assert result["bundle"] == str(work.bundle) and result["sheet"] is None
    manifest = (work.bundle / "manifest.json").read_bytes()
    assert result["bundle_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert (result["steps"], result["times"], result["rule"]) == (4, None, "sde")


def test_images_say_how_they_were_made(work: Work, edit_bundle: EditBundle) -> None:
    bundle = edit_bundle(
        lambda manifest: manifest["model"].update(weights_license="for a test only")
    )
    options = ("--caption", work.caption, "--seed", 7, "--sigma", 0.25, "--steps", 2)
    sha256 = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    record = {
        "model": "custom",
        "precision": "fp32",
        "bundle_sha256": sha256,
        "backend": "onnxruntime",
        "device": "cpu",
        "steps": 2,
        "times": None,
        "rule": "sde",
        "seed": 7,
        "sigma": 0.25,
        "width": 96,
        "height": 64,
        "weights_license": "for a test only",
    }
    for name in ("a.png", "a.jpg", "a.webp"):
        path = work.folder / name
        assert work.run("--latent", work.latent, "-o", path, *options, bundle=bundle)[0] == 0
        with Image.open(path) as image:
            exif = image.getexif()
            text: Any = image.info if name == "a.png" else {"pid-trt": exif.get(0x010E)}
            software: Any = image.info.get("Software") or exif.get(0x0131)
        assert json.loads(text["pid-trt"]) == record, name
        assert software == f"pid-trt {__version__}"
    bare = ("-o", work.folder / "bare.png", "--no-metadata")
    assert work.run("--latent", work.latent, *bare, *options, bundle=bundle)[0] == 0
    with Image.open(work.folder / "bare.png") as image:
        assert image.info == {} and not image.getexif()
    np.testing.assert_array_equal(pixels(work.folder / "bare.png"), pixels(work.folder / "a.png"))


def test_a_folder_is_gone_on_with(work: Work, many: Path) -> None:
    target = work.folder / "images"
    arguments = ("--latents", many, "-o", target, "--json")
    assert work.run(*arguments)[0] == 0
    kept = (target / "a-0.png").read_bytes()
    (target / "b.png").unlink()
    (target / "a-0.png").write_bytes(b"not looked at")
    code, out, _ = work.run(*arguments, "--skip-existing")
    result = json.loads(out)
    assert code == 0 and result["skipped"] == 3
    assert [each["image"] for each in result["images"]] == [str(target / "b.png")]
    assert (target / "a-0.png").read_bytes() == b"not looked at" != kept
    before = tree(target)
    code, out, err = work.run(*arguments[:-1], "--skip-existing")
    assert (code, out, err) == (0, "4 of 4 images were there already\n", "")
    assert tree(target) == before
    assert "not allowed with" in work.refusal(*arguments, "--skip-existing", "--overwrite")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_every_float_and_a_batch_of_one(work: Work, kind: torch.dtype) -> None:
    latent = work.file("other", any_name=LATENT.to(kind)[None])
    caption = work.file("text", any_name=CAPTION.to(kind)[None])
    got = work.decode("--caption", caption, latent=latent)
    rounded = CAPTION.to(kind).float()[None]
    want = decoded(work.bundle, LATENT.to(kind).float(), caption=rounded)
    np.testing.assert_array_equal(got, want)


def test_caption_and_sigma_may_lie_beside_the_latent(work: Work) -> None:
    together = work.file("together", latent=LATENT, caption=CAPTION, sigma=torch.tensor(0.5).half())
    want = decoded(work.bundle, LATENT, sigma=0.5)
    np.testing.assert_array_equal(work.decode(latent=together), want)
    sigma = torch.tensor([0.5], dtype=torch.bfloat16)
    unnamed = work.file("unnamed", z=LATENT, caption=CAPTION, sigma=sigma)
    np.testing.assert_array_equal(work.decode(latent=unnamed), want)
    # What the command line says goes before what the file says.
    other = work.file("other", caption=-CAPTION)
    got = work.decode("--caption", other, "--sigma", 0, latent=together)
    np.testing.assert_array_equal(got, decoded(work.bundle, LATENT, caption=-CAPTION[None]))


def test_tensors_are_chosen_by_name(work: Work) -> None:
    latent = work.file("many", latent=-LATENT, b=LATENT, c=CAPTION)
    got = work.decode("--latent-key", "b", "--caption", latent, "--caption-key", "c", latent=latent)
    np.testing.assert_array_equal(got, decoded(work.bundle, LATENT))


def test_a_batch_makes_numbered_images(work: Work) -> None:
    latents = torch.stack([LATENT, -LATENT])
    for name, captions, sigmas in (
        ("own", torch.stack([CAPTION, -CAPTION]), torch.tensor([0.0, 0.5])),
        ("shared", CAPTION[None], torch.tensor(0.25)),
    ):
        batch = work.file(name, latent=latents, caption=captions, sigma=sigmas)
        target = work.folder / f"{name}.jpg"
        code, out, err = work.run("--latent", batch, "-o", target, "--seed", 2**64 - 1)
        assert (code, err) == (0, "")
        assert not target.exists()
        for b, seed in enumerate((2**64 - 1, 0)):
            image = work.folder / f"{name}-{b}.jpg"
            assert out.splitlines()[b].startswith(f"{image}: 96x64, seed {seed}, ")
            caption = captions[b % len(captions)][None]
            sigma = float(sigmas.expand(2)[b])
            want = decoded(work.bundle, latents[b], caption=caption, sigma=sigma, seed=seed)
            assert abs(pixels(image).astype(int) - want).mean() < 12  # JPEG of what is noise


def test_formats_by_suffix(work: Work) -> None:
    known = {"png": "PNG", "JPG": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "tif": "TIFF"}
    for suffix, kind in known.items():
        image = work.folder / f"image.{suffix}"
        code, _, _ = work.run("--latent", work.latent, "-o", image, "--steps", 1)
        assert code == 0
        with Image.open(image) as read:
            assert read.format == kind and read.size == (96, 64)


def test_huge_images_of_a_folder_are_tiffs(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.file("latents/large", latent=LATENT)
    work.file("latents/small", latent=LATENT[:, :, :2])
    monkeypatch.setattr(images, "LARGEST_PNG", 64 * 64)
    given = ("--latents", work.folder / "latents", "--steps", 1, "-o")
    assert work.run(*given, work.folder / "images")[0] == 0
    assert sorted(os.listdir(work.folder / "images")) == ["large.tiff", "small.png"]
    assert work.run(*given, work.folder / "others", "--format", "png")[0] == 0
    large = pixels(work.folder / "others" / "large.png")
    np.testing.assert_array_equal(pixels(work.folder / "images" / "large.tiff"), large)


def test_an_image_that_exists_is_kept_unless_told(work: Work) -> None:
    work.image.write_bytes(b"precious")
    assert "exists; choose another name or add --overwrite" in work.mistake()
    assert work.image.read_bytes() == b"precious"
    arguments = ("--latent", work.latent, "-o", work.image, "--caption", work.caption)
    assert work.run(*arguments, "--overwrite")[0] == 0
    np.testing.assert_array_equal(pixels(work.image), decoded(work.bundle, LATENT))


def test_any_times(work: Work, free_bundle: Path) -> None:
    arguments = ("--latent", work.latent, "--caption", work.caption, "-o", work.image)
    code, _, err = work.run(*arguments, "--times", "1,0.6,.25,0", bundle=free_bundle)
    assert (code, err) == (0, "")
    want = decoded(free_bundle, LATENT, times=[1, 0.6, 0.25, 0])
    np.testing.assert_array_equal(pixels(work.image), want)


def test_any_times_need_a_bundle_and_an_order(work: Work, free_bundle: Path) -> None:
    arguments = ("--latent", work.latent, "-o", work.image)
    for times, message in (
        ("0,1", "expected times descending from at most 1 to 0, but got [0.0, 1.0]; "),
        ("1,0.5", "expected times descending"),
        ("1,nan,0", "expected times descending"),
        ("1,half,0", "argument --times: expected a number, but got 'half'; "),
    ):
        assert message in work.refusal(*arguments, "--times", times, bundle=free_bundle)
    assert "expected times, since" in work.refusal(*arguments, bundle=free_bundle)
    assert "--arbitrary-timesteps" in work.refusal(*arguments, "--times", "1,0")


# Many latents


@pytest.fixture
def many(work: Work) -> Path:
    """A folder of latents of different shapes and batch sizes, and a file that is none."""
    folder = work.folder / "latents"
    work.file("latents/b", latent=LATENT, caption=CAPTION)
    work.file("latents/a", latent=torch.stack([LATENT, -LATENT]), caption=CAPTION)
    work.file("latents/c", latent=normal(CHANNELS, 1, 1), caption=CAPTION[:5])
    (folder / "notes.txt").write_text("not a latent")
    return folder


def test_decodes_a_folder_in_order(work: Work, many: Path) -> None:
    target, sheet = work.folder / "images", work.folder / "sheet.png"
    arguments = ("--latents", many, "-o", target, "--seed", 3, "--sheet", sheet, "--json")
    code, out, err = work.run(*arguments)
    assert code == 0 and err.count("\n") == 1
    assert f"skipped 1 of 4 files in {many}: .txt is none of *.safetensors, *.latent" in err
    result = json.loads(out)
    names = ["a-0.png", "a-1.png", "b.png", "c.png"]
    assert [Path(image["image"]).name for image in result["images"]] == names
    assert sorted(os.listdir(target)) == names
    assert [image["seed"] for image in result["images"]] == [3, 4, 3, 3]
    np.testing.assert_array_equal(pixels(target / "b.png"), decoded(work.bundle, LATENT, seed=3))
    np.testing.assert_array_equal(pixels(target / "a-0.png"), pixels(target / "b.png"))
    np.testing.assert_array_equal(pixels(target / "a-1.png"), decoded(work.bundle, -LATENT, seed=4))
    assert result["sheet"] == str(sheet)
    size = images.sheet_size([(64, 96)] * 3 + [(32, 32)])
    assert pixels(sheet).shape[:2] == size
    tiles = pixels(sheet)[-64 - 8 : -8]
    np.testing.assert_array_equal(tiles[:, 8:104], pixels(target / "a-0.png"))
    np.testing.assert_array_equal(tiles[:, 216:312], pixels(target / "b.png"))


def test_captions_of_a_folder(work: Work, many: Path) -> None:
    work.file("captions/a", caption=torch.stack([-CAPTION, CAPTION]))
    work.file("captions/b", caption=-CAPTION)
    arguments = ("--latents", many, "--captions", work.folder / "captions", "-o")
    missing = work.refusal(*arguments, work.folder / "images")
    assert "expected a caption for every latent, but got no c.safetensors in " in missing
    work.file("captions/c", caption=CAPTION)
    assert work.run(*arguments, work.folder / "images", "--format", "webp")[0] == 0
    names = ["a-0.webp", "a-1.webp", "b.webp", "c.webp"]
    assert sorted(os.listdir(work.folder / "images")) == names
    # One caption for all, into a folder that exists.
    (work.folder / "other").mkdir()
    arguments = ("--latents", many, "--caption", work.caption, "-o", work.folder / "other")
    assert work.run(*arguments)[0] == 0
    b = pixels(work.folder / "other" / "b.png")
    np.testing.assert_array_equal(b, decoded(work.bundle, LATENT))
    code, _, _ = work.run("--latents", many, "-o", work.folder / "other", "--overwrite")
    assert code == 0


def test_one_bad_file_stops_all(work: Work, many: Path) -> None:
    target = work.folder / "images"
    bad = work.file("latents/z", latent=LATENT[:4], caption=CAPTION)
    message = work.refusal("--latents", many, "-o", target)
    assert f"{bad}: expected latent shape [B, 16, h, w], but got [4, 2, 3]; " in message
    bad.write_bytes(bad.read_bytes()[:-1])
    assert f"expected {bad} to be a safetensors file" in work.refusal(
        "--latents", many, "-o", target
    )


def test_outputs_that_get_in_the_way(work: Work, many: Path) -> None:
    target = work.folder / "images"
    target.mkdir()
    (target / "b.png").write_bytes(b"precious")
    assert "b.png exists; " in work.refusal("--latents", many, "-o", target)
    assert "is a file; choose another name" in work.refusal("--latents", many, "-o", work.latent)
    missing = work.folder / "no" / "folder"
    assert f"expected to make the folder {missing}" in work.refusal(
        "--latents", many, "-o", missing
    )
    work.file("latents/a-1", latent=LATENT)
    message = work.refusal("--latents", many, "-o", work.folder / "new")
    assert "expected every image to have its own name, but got " in message
    assert "a.safetensors" in message and "a-1.safetensors" in message


def test_a_folder_without_latents(work: Work) -> None:
    (work.folder / "empty").mkdir()
    target = work.folder / "images"
    for folder, message in (
        (work.folder / "empty", "but got none in"),
        (work.folder / "missing", "expected a folder for --latents"),
        (work.latent, "expected a folder for --latents"),
    ):
        assert message in work.refusal("--latents", folder, "-o", target)


def test_sheets_that_cannot_be(work: Work, many: Path) -> None:
    arguments = ("--latents", many, "-o", work.folder / "images", "--sheet")
    assert "that of an image" in work.refusal(*arguments, work.folder / "images" / "b.png")
    assert "ending in" in work.refusal(*arguments, work.folder / "sheet.gif")
    assert "exists" in work.refusal(*arguments, work.latent.rename(work.folder / "l.png"))
    for number in range(180):
        work.file(f"latents/more{number}", latent=LATENT)
    message = work.refusal(*arguments, work.folder / "sheet.webp")
    assert "expected at most 16383 pixels along a side of a WEBP file" in message


# Warnings


def test_no_caption_is_one_warning(work: Work) -> None:
    code, _, err = work.run("--latent", work.latent, "-o", work.image)
    assert code == 0
    assert err.startswith("warning: 1 of 1 images have no caption and get the empty embedding")
    assert "--caption" in err and err.count("\n") == 1
    want = decoded(work.bundle, LATENT, caption=None)
    np.testing.assert_array_equal(pixels(work.image), want)


def test_advice_about_the_model(work: Work, edit_bundle: EditBundle) -> None:
    arguments = (
        "--latent",
        work.latent,
        "--caption",
        work.caption,
        "-o",
        work.image,
        "--overwrite",
    )

    def warnings(*more: object, **model: Any) -> list[str]:
        bundle = edit_bundle(lambda manifest: manifest["model"].update(model))
        code, _, err = work.run(*arguments, *more, bundle=bundle)
        assert code == 0
        assert all(line.startswith("warning: ") for line in err.splitlines())
        return err.splitlines()

    assert warnings() == []
    assert warnings(variant="2k", distilled=True, trained_sizes=[[96, 64]]) == []
    (worse,) = warnings(variant="2kto4k-v1", trained_sizes=[[64, 64], [96, 64]])
    assert "at 96x64 a 2kto4k decoder is worse than a 2k one" in worse
    (size,) = warnings(name="flux 2k (v1)", trained_sizes=[[64, 64], [96, 80], [64, 96]])
    assert "flux 2k (v1) was not trained at 96x64 " in size
    assert size.endswith("the nearest trained size is 96x80")
    (sigma,) = warnings("--sigma", 0.81)
    assert "sigma 0.81 is beyond 0.8" in sigma
    assert warnings("--sigma", 0.8) == []
    assert warnings("--sigma", 0.9, "--quiet") == warnings("--sigma", 0.9)


# Mistakes


def test_latents_that_do_not_fit(work: Work) -> None:
    nan, infinite = LATENT.clone(), LATENT.half()
    nan[3, 1, 1], infinite[0, 0, 0] = torch.nan, torch.inf
    shape = "expected latent shape [B, 16, h, w], but got "
    for name, tensor, message in (
        (
            "wide",
            normal(CHANNELS, 17, 16),
            "at most 0.262 megapixels, the largest bucket of this bundle, but got 512x544; the "
            "largest of this shape is 480x512, of a latent of height 16 and width 15; or export",
        ),
        ("channels", LATENT[:15], f"{shape}[15, 2, 3]; "),
        ("rank2", LATENT[0], f"{shape}[2, 3]; this bundle takes latents of its own network"),
        ("rank5", LATENT[None, None], f"{shape}[1, 1, 16, 2, 3]; choose one frame"),
        ("empty", LATENT[:, :0], "but got [16, 0, 3]"),
        ("whole", LATENT.to(torch.int32), "to be F32, F16, BF16, but got I32; "),
        ("double", LATENT.double(), "but got F64; convert it"),
        ("nan", nan, "expected 'latent' in "),
        ("infinite", infinite, "holds NaN or infinity"),
    ):
        latent = work.file(name, latent=tensor)
        message_given = work.mistake(latent=latent)
        assert message in message_given
        assert str(latent) in message_given


def test_packed_latents_and_frames(work: Work, edit_bundle: EditBundle) -> None:
    bundle = edit_bundle(lambda manifest: manifest["model"].update(token_width=3))
    shape = "expected latent shape [B, 16, h, w], but got "
    for name, tensor, message in (
        ("tokens", normal(1, 6, 3), "[1, 6, 3]; these look like tokens [B, n, 3]: unpack them to"),
        ("either", LATENT, "[16, 2, 3]; save one latent as [1, 16, h, w]; if these are tokens"),
        ("video", normal(1, 16, 3, 2, 3), "[1, 16, 3, 2, 3]; choose one frame"),
    ):
        latent = work.file(name, latent=tensor)
        assert f"{latent}: {shape}{message}" in work.mistake(latent=latent, bundle=bundle)
    want = work.decode("--caption", work.caption)
    for one in (LATENT[None], LATENT[None, :, None]):
        latent = work.file("one", latent=one)
        caption = ("--caption", work.caption)
        np.testing.assert_array_equal(work.decode(*caption, latent=latent, bundle=bundle), want)


def test_latents_of_comfyui(work: Work, edit_bundle: EditBundle) -> None:
    factor, shift = [0.5, *[0.25] * 15], [0.125]
    rule = {"factor": factor, "shift": shift}
    bundle = edit_bundle(lambda manifest: manifest["model"].update(comfyui_latent=rule))
    raw = LATENT[None] / torch.tensor(factor)[:, None, None] + 0.125
    latent = work.file("raw", latent_tensor=raw, latent_format_version_0=torch.tensor([]))
    latent = latent.rename(latent.with_suffix(".latent"))
    arguments = ("--caption", work.caption)
    image = work.decode(*arguments, latent=latent, bundle=bundle)
    np.testing.assert_array_equal(image, work.decode(*arguments))
    folder = work.folder / "raw"
    folder.mkdir()
    latent.rename(folder / latent.name)
    code, _, err = work.run("--latents", folder, *arguments, "-o", folder, bundle=bundle)
    latent = folder / latent.name
    note = f"{latent}: raw latents, normalised as this bundle takes them\n"
    assert (code, err) == (0, note)
    np.testing.assert_array_equal(pixels(folder / "raw.png"), image)
    assert "does not say how to normalise it" in work.mistake(latent=latent)
    rule["factor"] = factor[:3]
    bundle = edit_bundle(lambda manifest: manifest["model"].update(comfyui_latent=rule))
    assert "does not say how to normalise it" in work.mistake(latent=latent, bundle=bundle)


def test_a_latent_that_is_not_normalised_is_told(work: Work, edit_bundle: EditBundle) -> None:
    bundle = edit_bundle(
        lambda manifest: manifest["model"].update(
            space="flux", latent_spread=[0.3, 2.0], latent_convention="0.3611*(z - 0.1159)"
        )
    )
    for scale, std in ((7.0, "6.53"), (0.1, "0.09"), (1.0, None)):
        latent = work.file("scaled", latent=scale * LATENT)
        code, _, err = work.run(
            "--latent", latent, "--caption", work.caption, "-o", work.image, "--overwrite",
            bundle=bundle,
        )  # fmt: skip
        told = f"warning: {latent}: the latent's standard deviation is {std}"
        assert code == 0 and err.startswith(told if std else "") and bool(err) == bool(std)
        assert std is None or err.endswith("takes it: flux latents, 0.3611*(z - 0.1159)\n")


def test_captions_that_do_not_fit(work: Work) -> None:
    nan = CAPTION.clone()
    nan[3, 1] = torch.nan
    for name, tensor, message in (
        ("long", normal(TEXT + 1, DIM), "[1, 13, 32]; B is 1 or that of the latent, 1, and T"),
        ("broad", normal(TEXT, DIM + 1), "expected caption shape [B, T, 32], but got [1, 12, 33]"),
        ("batch", torch.stack([CAPTION, CAPTION]), "but got [2, 12, 32]"),
        ("line", CAPTION[0], "to be [T, D] or [B, T, D], but got [32]"),
        ("whole", CAPTION.long(), "but got I64"),
        ("nan", nan, "expected 'caption' in "),
    ):
        caption = work.file(name, caption=tensor)
        assert message in work.mistake("--caption", caption)
        both = work.file(f"{name}_beside", latent=LATENT, caption=tensor)
        assert message in work.refusal("--latent", both, "-o", work.image)


def test_files_that_are_no_latents(work: Work) -> None:
    cut, text, empty = (work.folder / name for name in ("cut", "text", "empty"))
    cut.write_bytes(work.latent.read_bytes()[:-7])
    text.write_text("a latent, honestly")
    empty.touch()
    for path in (cut, text, empty):
        assert f"expected {path} to be a safetensors file, but got: " in work.mistake(latent=path)
        assert f"expected {path} to be a safe" in work.mistake("--caption", path)
    folder, missing = work.folder, work.folder / "missing"
    assert f"but {missing} is none; " in work.mistake("--caption", missing)
    for option in ("latent", "caption"):
        told = f"a file for --{option}, but {folder} is a folder; use --{option}s"
        assert told in work.mistake(f"--{option}", folder)
    assert f"but {work.folder / 'missing'} is none; " in work.mistake(
        latent=work.folder / "missing"
    )
    several = work.file("several", a=LATENT, b=LATENT)
    none = work.file("none", caption=CAPTION)
    assert "or one named 'latent', in " in work.mistake(latent=several)
    assert "but got a, b; choose with --latent-key" in work.mistake(latent=several)
    assert "but got a, b; choose with --caption-key" in work.mistake("--caption", several)
    assert "but got caption; choose with" in work.mistake(latent=none)
    assert "expected a tensor 'c' in " in work.mistake("--latent-key", "c", latent=several)
    assert "change --caption-key" in work.mistake("--caption-key", "c")


def test_files_of_numpy_and_torch(work: Work) -> None:
    one = ("--caption", work.caption, "-o", work.image, "--overwrite")
    assert work.run("--latent", work.latent, *one)[0] == 0
    wanted = work.image.read_bytes()
    array, archive, old, named = (
        work.folder / name for name in ("a.npy", "a.pt", "old.pt", "named.pt")
    )
    np.save(array, LATENT.numpy())
    torch.save(LATENT, archive)
    torch.save(LATENT, old, _use_new_zipfile_serialization=False)
    torch.save({"samples": LATENT[None], "step": 3}, named)
    for path in (array, archive, old, named):
        code, _, err = work.run("--latent", path, *one)
        assert (code, err) == (0, "")
        with Image.open(work.image) as image, Image.open(io.BytesIO(wanted)) as other:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def test_files_of_numpy_and_torch_that_hold_more(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (work.folder / "touched",)

    objects, evil, archive = (work.folder / name for name in ("o.npy", "evil.pt", "a.npz"))
    np.save(objects, np.array([Evil()], object))
    torch.save({"latent": Evil()}, evil)
    np.savez(archive, LATENT.numpy())
    for path in (objects, evil, archive):
        assert f"expected an array or tensors in {path}, but cannot" in work.mistake(latent=path)
    assert not (work.folder / "touched").exists()
    numbers = work.folder / "numbers.npy"
    np.save(numbers, np.zeros((16, 2, 3), np.int32))
    assert "but got int32; convert it to float32" in work.mistake(latent=numbers)
    torch.save(LATENT, evil)
    monkeypatch.delitem(sys.modules, "pid_runtime.command.torch_files")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "expected PyTorch to read" in work.mistake(latent=evil)


LATENTS = GOLDEN / "latents" / "diffusers_latents.safetensors"


@pytest.mark.parametrize(
    ("backbone", "channels", "down", "width"),
    [("flux", 16, 8, 64), ("qwenimage", 16, 8, 64), ("flux2", 128, 16, 128)],
)
def test_packed_latents_are_unpacked_as_diffusers_does(
    backbone: str, channels: int, down: int, width: int, edit_bundle: EditBundle, tmp_path: Path
) -> None:
    golden = load_file(LATENTS)
    path = tmp_path / "packed.safetensors"
    save_file({"latent": golden[f"{backbone}/pipeline_output"].contiguous()}, path)
    manifest = read_manifest(edit_bundle(), verify=False)
    manifest.network.update(latent_channels=channels, latent_down=down)
    manifest.model["token_width"] = width
    file = open_latent_file(path, manifest, form=LatentForm("packed", (96, 64)))
    np.testing.assert_allclose(
        file.latent.read(), golden[f"{backbone}/latent"].numpy(), rtol=0, atol=1e-6
    )
    assert file.note == f"tokens, unpacked to {list(golden[f'{backbone}/latent'].shape)}"
    with pytest.raises(PidRuntimeError, match="expected tokens of a square, but "):
        open_latent_file(path, manifest, form=LatentForm("packed"))
    with pytest.raises(PidRuntimeError, match=r"of 64x64, but .* has 24, of "):
        open_latent_file(path, manifest, form=LatentForm("packed", (64, 64)))


def test_raw_latents_of_flux2_are_normalised_by_the_statistics_of_their_autoencoder(
    edit_bundle: EditBundle, tmp_path: Path
) -> None:
    golden = load_file(LATENTS)
    manifest = read_manifest(edit_bundle(), verify=False)
    manifest.network.update(latent_channels=128, latent_down=16)
    manifest.model["space"] = "flux2"
    statistics, path = tmp_path / "ae.safetensors", tmp_path / "raw.safetensors"
    mean, variance = golden["flux2/bn_mean"], golden["flux2/bn_var"]
    save_file({"bn.running_mean": mean, "bn.running_var": variance}, statistics)
    raw, wanted = (
        golden[f"flux2-klein-4b/{name}"].contiguous() for name in ("pipeline_output", "latent")
    )
    assert raw.shape[1] == 32
    form = LatentForm("raw", statistics=statistics)
    blocks = torch.nn.functional.pixel_unshuffle(raw, 2)
    for values in (raw, blocks):
        save_file({"latent": values}, path)
        file = open_latent_file(path, manifest, form=form)
        np.testing.assert_allclose(file.latent.read(), wanted.numpy(), rtol=0, atol=1e-6)
        assert file.note == "raw latents, normalised as this bundle takes them"
        assert file.latent.outline().shape == wanted.shape
    for values, given, message in (
        (raw, LatentForm(), r"got raw ones, \[2, 32, .*as --latent-form raw:flux2_ae.safetensors"),
        (raw, LatentForm("raw"), "name the file of FLUX.2's autoencoder"),
        (raw[..., 1:], form, r"of even height and width in .* multiples of 16$"),
        (
            raw,
            LatentForm("raw", statistics=path),
            "running_var of 128 channels in .*, but got none",
        ),
    ):
        save_file({"latent": values.contiguous()}, path)
        with pytest.raises(PidRuntimeError, match=message):
            open_latent_file(path, manifest, form=given)


def test_the_form_of_a_latent(work: Work, edit_bundle: EditBundle) -> None:
    rule = {"factor": [0.5], "shift": [0.25]}
    model = {"space": "flux", "comfyui_latent": rule, "token_width": 64, "captioned": False}
    bundle = edit_bundle(lambda manifest: manifest.update(model=model))
    raw = work.file("raw", latent=LATENT / 0.5 + 0.25)
    statistics = work.file(
        "ae", **{"bn.running_mean": torch.full((16,), 0.25), "bn.running_var": torch.full((16,), 4)}
    )
    square = LATENT[:, :2, :2]
    tokens = square.reshape(16, 1, 2, 1, 2).permute(1, 3, 0, 2, 4).reshape(1, 1, 64)
    made: dict[str, Any] = {}
    for name, path, form in (
        ("plain", work.file("plain", latent=LATENT), "auto"),
        ("normalised", work.file("plain", latent=LATENT), "normalised"),
        ("raw", raw, "raw"),
        ("by_statistics", work.file("other", latent=LATENT * 2 + 0.25), f"raw:{statistics}"),
        ("square", work.file("square", latent=square), "auto"),
        ("packed", work.file("packed", latent=tokens), "packed"),
        ("sized", work.file("packed", latent=tokens), "packed:16x16"),
    ):
        options = ("--latent", path, "-o", work.image, "--overwrite", "--latent-form", form)
        code, _, err = work.run(*options, bundle=bundle)
        assert code == 0
        assert ("raw latents, normalised" in err) == (name in ("raw", "by_statistics"))
        assert ("tokens, unpacked to [1, 16, 2, 2]" in err) == (name in ("packed", "sized"))
        with Image.open(work.image) as image:
            made[name] = np.asarray(image).astype(int)
    np.testing.assert_array_equal(made["normalised"], made["plain"])
    assert np.abs(made["raw"] - made["plain"]).max() <= 1
    assert np.abs(made["by_statistics"] - made["plain"]).max() <= 1
    np.testing.assert_array_equal(made["packed"], made["square"])
    np.testing.assert_array_equal(made["sized"], made["square"])
    plain = edit_bundle()
    for form, message in (
        ("raw", "but got a raw one, and this bundle does not say how to normalise it"),
        ("packed", "expected a bundle whose latents are ever packed"),
        ("tokens", "expected auto, normalised, raw, packed, raw:FILE or packed:1024x768, but got "),
        ("auto:16x16", "but got 'auto:16x16'"),
        ("raw:", "but got 'raw:'"),
        ("raw:absent", "expected a safetensors file, but absent is none"),
        ("packed:16", "expected a size such as 512x512, but got '16'"),
    ):
        assert message in work.mistake("--latent-form", form, bundle=plain)


def test_sigma_beside_the_latent_that_does_not_fit(work: Work) -> None:
    for value, message in (
        (torch.tensor(1.5), "expected sigma in [0, 1], but got [1.5]; "),
        (torch.tensor([0.0, 0.0]), "expected one sigma, but got shape [2]"),
        (torch.tensor([[0.0]]), "to be [] or [B], but got [1, 1]"),
        (torch.tensor(torch.nan), "holds NaN"),
        (torch.tensor(1), "but got I64"),
    ):
        latent = work.file("latent", latent=LATENT, sigma=value)
        assert message in work.mistake(latent=latent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma", "1.01"], "expected sigma in [0, 1], but got [1.01]; 0 is a clean"),
        (["--sigma=-0.1"], "expected sigma in [0, 1], but got [-0.1]"),
        (["--sigma", "nan"], "expected sigma in [0, 1], but got [nan]"),
        (["--sigma", "high"], "expected a number, but got 'high'"),
        (["--seed=-1"], "expected a whole number from 0 to 2^64 - 1, but got '-1'"),
        (["--seed", str(2**64)], "expected a whole number from 0 to 2^64 - 1"),
        (["--seed", "9" * 5000], "argument --seed: "),
        (["--seed", "1.5"], "expected a whole number"),
        (["--threads", "0"], "expected a whole number from 1"),
        (["--steps", "3"], "expected 1, 2, 4 steps, but got 3; "),
        (["--steps", "0"], "expected 1, 2, 4 steps, but got 0; "),
        (["--steps", "8"], "--arbitrary-timesteps"),
        (["--steps", "four"], "argument --steps: invalid int value"),
        (["--steps", "4", "--times", "1,0"], "not allowed with"),
        (["--rule", "euler"], "argument --rule: invalid choice"),
        (["--latents", "."], "not allowed with"),
        (["--format", "png"], "expected --format with --latents"),
        (["--backend", "tensorflow"], "torch, tensorrt, tensorrt-rtx, but got 'tensorflow'"),
        (["--provider", "abacus"], "CPUExecutionProvider"),
        (["--device", "cuda:first"], "expected a device such as cuda:0, but got 'cuda:first'"),
        (["--engines", "a"], "the tensorrt backend to run engines 'a'"),
        (["--backend", "torch", "--device", "abacus"], "expected a device torch can use"),
        (["-o", "no/such/folder.png"], "expected a folder to write folder.png in"),
        (["-o", "image.gif"], "expected an image name ending in .png"),
    ],
)  # fmt: skip
def test_wrong_options(work: Work, arguments: list[str], message: str) -> None:
    assert message in work.mistake(*arguments)


def test_captions_of_a_folder_for_one_latent(work: Work) -> None:
    assert "expected --captions with --latents" in work.mistake("--captions", work.folder)
    folder = work.folder / "image.png"
    folder.mkdir()
    assert "expected an image's name, but got the folder" in work.mistake()


def test_a_backend_that_is_not_installed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pid_runtime.backends.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'pid-trt[torch]'" in work.mistake("--backend", "torch")


def change(file: Path, edit: Callable[[bytes], bytes]) -> None:
    file.write_bytes(edit(file.read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda b: (b / "latent.onnx").unlink(), "has no file latent.onnx; "),
        (lambda b: (b / "weights.safetensors").unlink(), "has no file weights.safetensors; "),
        (lambda b: change(b / "latent.onnx", lambda c: c[:-1]), "bytes, but it has "),
        (lambda b: change(b / "caption.onnx", lambda c: c[:-1] + b"!"), "caption.onnx was altered"),
        (lambda b: change(b / "weights.safetensors", lambda c: c[:-1] + b"!"), "was altered"),
        (lambda b: change(b / "manifest.json", lambda c: c[: len(c) // 2]), "manifest.json"),
        (lambda b: (b / "manifest.json").unlink(), "expected a bundle (a folder with"),
    ],
    ids=["no graph", "no weights", "cut", "altered", "altered weights", "cut manifest", "none"],
)
def test_damaged_bundles(
    work: Work, edit_bundle: EditBundle, harm: Callable[[Path], object], message: str
) -> None:
    bundle = edit_bundle()
    harm(bundle)
    assert message in work.refusal("--latent", work.latent, "-o", work.image, bundle=bundle)


def test_bundles_from_the_future(work: Work, edit_bundle: EditBundle) -> None:
    bundle = edit_bundle(lambda manifest: manifest.update(format_version=[3, 0]))
    message = work.refusal("--latent", work.latent, "-o", work.image, bundle=bundle)
    assert "expected bundle format 1.x or 2.x, but got version " in message


def test_a_full_disk_leaves_no_image(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, file: Any, *_: object, **__: object) -> None:
        file.write(b"half an image")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert "no space left on the output's disk; free some" in work.mistake()
    work.file("latents/a", latent=LATENT, caption=CAPTION)
    arguments = ("--latents", work.folder / "latents", "-o", work.folder / "images")
    assert "no space left" in work.refusal(*arguments)


def test_an_interrupt_leaves_no_folder(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "run", interrupt)
    work.file("latents/a", latent=LATENT, caption=CAPTION)
    before = tree(work.folder)
    images_folder = work.folder / "images"
    code, out, err = work.run("--latents", work.folder / "latents", "-o", images_folder)
    assert (code, out, err) == (130, "", "pid-decode: interrupted\n")
    assert tree(work.folder) == before


def test_a_decode_that_gives_nan_is_told(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "is_finite", lambda *_: False)
    said = work.mistake()
    assert f"{work.latent}: expected a finite image, but step 1 of 4 gave NaN" in said
    assert "check the bundle with pid-verify" in said


def test_a_file_that_cannot_be_written(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    assert "Input/output error" in work.mistake()


# As a process


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pid_runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_as_a_process(work: Work) -> None:
    arguments = (work.bundle, "--latent", work.latent, "--caption", work.caption, "-o", work.image)
    result = process(*arguments, "--json", "--steps", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["images"][0]["image"] == str(work.image)
    again = process(*arguments)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"pid-decode: expected a new file, but {work.image} exists; choose another name or add "
        "--overwrite\n"
    )


def test_shells_can_complete_options(tmp_path: Path) -> None:
    out = tmp_path / "completions"
    line = "pid-decode flux --ru"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-m", "pid_runtime"]
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    subprocess.run(command, env=environment, check=True)
    assert out.read_text().strip() == "--rule"


def test_help_shows_examples() -> None:
    result = process("--help")
    assert result.returncode == 0
    assert "pid-decode flux-2k --latent latent.safetensors" in result.stdout
