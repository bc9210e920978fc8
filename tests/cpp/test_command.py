"""The command `pid-decode-cpp`."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from comparing import assert_equal, normal
from cpp_build import executable
from cpp_data import edited
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE
from pid_runtime.command import decode_cli
from pid_runtime.command.latent_files import LatentForm, open_latent_file
from pid_runtime.decoder import Decoder
from places import ROOT

Floats = NDArray[np.float32]


class Work:
    """A folder with latents, and the command to run there."""

    def __init__(self, program: Path, bundle: Path, folder: Path) -> None:
        self.program, self.bundle, self.folder = program, bundle, folder
        folder.mkdir()
        numbers = np.random.default_rng(1)
        self.latent = numbers.standard_normal((16, 2, 3), np.float32)
        self.caption = numbers.standard_normal((12, 32), np.float32)
        self.file("latent", latent=self.latent)
        self.file("caption", caption=self.caption)

    def file(self, name: str, **tensors: NDArray[Any]) -> Path:
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        return path

    def command(self, *arguments: object, bundle: Path | None = None) -> list[str]:
        given = (bundle or self.bundle, "--threads", 1, *arguments)
        return [str(self.program), *map(str, given)]

    def run(self, *arguments: object, bundle: Path | None = None) -> tuple[int, str, str]:
        done = subprocess.run(
            self.command(*arguments, bundle=bundle),
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def tree(self) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }

    def refusal(self, *arguments: object, bundle: Path | None = None) -> str:
        before = self.tree()
        code, out, err = self.run(*arguments, bundle=bundle)
        assert (code, out) == (2, ""), err
        assert err.startswith("pid-decode-cpp: ") and err.count("\n") == 1 and err.endswith("\n")
        assert self.tree() == before
        return err

    def pixels(self, name: str) -> NDArray[np.uint8]:
        with Image.open(self.folder / name) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            return np.asarray(image)


@pytest.fixture
def work(built: Path, data: Path, tmp_path: Path) -> Work:
    return Work(executable(built, "pid-decode-cpp"), data / "v1", tmp_path / "work")


ONE = ("--latent", "latent.safetensors", "--caption", "caption.safetensors", "-o", "image.png")


def test_command_decodes_one_latent(work: Work) -> None:
    code, out, err = work.run(*ONE, "--seed", 7, "--sigma", "0.25", "--steps", 2, "--rule=ode")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"image\.png: 96x64, seed 7, \d+\.\d\d s\n", out)
    with Decoder.open(work.bundle, threads=1, verify=False) as python:
        want = python.decode(
            work.latent[None],
            work.caption[None],
            seed=7,
            sigma=0.25,
            steps=2,
            rule="ode",
            output="uint8",
        )
    assert_equal(work.pixels("image.png"), want[0], 1)
    assert "exists; choose another name or add --overwrite" in work.refusal(*ONE)
    assert work.run(*ONE, "--overwrite")[0] == 0


def test_command_decodes_in_tiles_as_python_does(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    work.file("large", latent=normal(1, 16, 20, 20, seed=4), caption=work.caption)
    for name, words in (
        ("latent", ("--tile", "64x64", "--overlap", 0, "--rule", "dpm++2m")),
        ("large", ("--tile", "auto", "--overlap", 64, "--steps", 1)),
    ):
        given = (*words, "--seed", 5, "--json")
        code, out, err = work.run("--latent", f"{name}.safetensors", "-o", "cpp.png", *given)
        assert code == 0, err
        latent, python = work.folder / f"{name}.safetensors", work.folder / f"{name}.png"
        arguments = (work.bundle, "--threads", 1, "--latent", latent, "-o", python, *given)
        assert decode_cli.main([str(word) for word in arguments]) == 0
        want, got = json.loads(capsys.readouterr().out), json.loads(out)
        del want["images"], want["sheet"], got["images"]
        assert got == want
        assert_equal(work.pixels("cpp.png"), work.pixels(f"{name}.png"), 1)
        (work.folder / "cpp.png").unlink()
    assert err.endswith("pixels or more: no bucket holds the whole picture\n")
    assert err.startswith("Decoding in ") and err.count("\n") == 1
    large = ("--latent", "large.safetensors", "-o", "quiet.png", *words)
    assert work.run(*large, "--quiet")[::2] == (0, "")


def test_command_plans_as_python_does(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    pair = np.stack([work.latent, -work.latent])
    work.file("latents/a", latent=pair, caption=work.caption)
    work.file("latents/b", latent=normal(1, 16, 20, 20, seed=4))
    before = work.tree()
    words = ["--latents", str(work.folder / "latents"), "--plan", "--tile", "auto"]
    words += ["--overlap", "64"]
    for more in ([], ["--json"], ["--json", "--device", "cuda"]):
        code, out, err = work.run(*words, *more)
        assert (code, err) == (0, "")
        assert decode_cli.main([str(work.bundle), "--threads", "1", *words, *more]) == 0
        want = capsys.readouterr().out
        if more:
            assert json.loads(out) == json.loads(want)
            in_tiles = json.loads(out)["plans"][-1]
            assert (in_tiles["host_bytes"] == 3 * 640 * 640) is ("cuda" in more)
            assert list(json.loads(out)["plans"][0]) == list(json.loads(want)["plans"][0])
        else:
            assert out == want and out.count("\n") == 3
    assert work.tree() == before


def test_command_decodes_with_guidance_as_python_does(
    work: Work, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    negative = normal(12, 32, seed=5)
    work.file("negative", caption=work.caption, negative=negative)
    work.file("other", embedding=negative)
    options = ("--steps", 3, "--seed", 5, "--json")
    bundle = data / "undistilled"
    results: list[Any] = []
    for file in ("negative", "other"):
        guided = ("--negative", f"{file}.safetensors", *options)
        code, out, err = work.run(*ONE[:-1], f"{file}.png", *guided, bundle=bundle)
        assert code == 0, err
        results.append(json.loads(out))
    np.testing.assert_array_equal(work.pixels("negative.png"), work.pixels("other.png"))
    paths = {name: work.folder / f"{name}.safetensors" for name in ("latent", "caption")}
    words = [f"--{name}={path}" for name, path in paths.items()]
    words += ["--negative", str(work.folder / "other.safetensors"), *map(str, options)]
    assert decode_cli.main([str(bundle), *words, "-o", str(work.folder / "python.png")]) == 0
    want = json.loads(capsys.readouterr().out)
    del want["images"], want["sheet"], results[1]["images"]
    assert (want["rule"], want["guidance"], want["steps"]) == ("dpm++2m", 5, 3)
    assert results[1] == {**want, "negative": "other.safetensors"}
    errors = np.abs(work.pixels("other.png").astype(int) - work.pixels("python.png"))
    assert errors.max() <= 1
    refused = work.refusal(*ONE, *options, bundle=bundle)
    assert "expected a negative caption for guidance 5, but got none; give one" in refused
    work.file("several", a=negative, b=negative)
    refused = work.refusal(*ONE, "--negative", "several.safetensors", bundle=bundle)
    assert "but got a, b; name that of the negative caption 'negative'" in refused


def test_command_gives_every_latent_its_negative_as_python_does(work: Work, data: Path) -> None:
    latents, negatives = normal(2, 16, 2, 3, seed=6), normal(2, 12, 32, seed=7)
    work.file("pair", latent=latents, caption=work.caption)
    work.file("negatives", caption=negatives)
    words = ["--negative", "negatives.safetensors", "--steps", "3", "--seed", "5"]
    bundle = data / "undistilled"
    pair = ["--latent", "pair.safetensors", "-o", "pair.png", *words]
    code, _, err = work.run(*pair, bundle=bundle)
    assert code == 0, err
    arguments = [str(work.folder / word) if "." in word else word for word in pair]
    arguments[3] = str(work.folder / "python.png")
    assert decode_cli.main([str(bundle), "--threads", "1", *arguments]) == 0
    for index in (0, 1):
        assert_equal(work.pixels(f"pair-{index}.png"), work.pixels(f"python-{index}.png"), 1)
    assert np.abs(work.pixels("pair-0.png").astype(int) - work.pixels("pair-1.png")).max() > 1
    refused = work.refusal(*ONE, *words, bundle=bundle)
    assert "expected negative shape [B, T, 32], but got [2, 12, 32]; B is 1 or that of" in refused


def test_command_decodes_a_folder_in_order(work: Work) -> None:
    sigma = np.array([0, 0.5], np.float16)
    both = np.stack([work.latent, -work.latent]).astype(np.float16)
    work.file("latents/a", z=both, caption=work.caption, sigma=sigma)
    work.file("latents/b", latent=work.latent[None], caption=work.caption)
    (work.folder / "latents" / "notes.txt").write_text("not a latent")
    code, out, err = work.run("--latents", "latents", "-o", "images", "--json", "--seed", 2**64 - 1)
    skipped = "skipped 1 of 3 files in latents: .txt is none of *.safetensors, *.latent, *.npy"
    assert (code, err) == (0, f"warning: {skipped}\n")
    result = json.loads(out)
    assert [each["image"] for each in result["images"]] == [
        "images/a-0.png",
        "images/a-1.png",
        "images/b.png",
    ]
    seconds = [each.pop("seconds") for each in result["images"]]
    assert min(seconds) > 0
    assert result["images"][1] == {
        "latent": "latents/a.safetensors",
        "index": 1,
        "image": "images/a-1.png",
        "width": 96,
        "height": 64,
        "seed": 0,
        "sigma": 0.5,
    }
    del result["images"]
    manifest = (work.bundle / MANIFEST_FILE).read_bytes()
    assert result == {
        "bundle": str(work.bundle),
        "bundle_sha256": hashlib.sha256(manifest).hexdigest(),
        "backend": "onnxruntime",
        "device": "cpu",
        "steps": 4,
        "times": None,
        "rule": "sde",
        "skipped": 0,
        "failed": [],
    }
    (work.folder / "images" / "b.png").unlink()
    again = ("--latents", "latents", "-o", "images", "--skip-existing")
    code, out, _ = work.run(*again)
    assert code == 0 and out.startswith("images/b.png: 96x64")
    assert out.endswith("\n2 of 3 images were there already\n")
    assert work.run(*again)[:2] == (0, "3 of 3 images were there already\n")
    assert "not allowed with" in work.refusal(*again, "--overwrite")
    with Decoder.open(work.bundle, threads=1, verify=False) as python:
        want = python.decode(
            both[1:].astype(np.float32), work.caption[None], sigma=0.5, output="uint8"
        )
    assert_equal(work.pixels("images/a-1.png"), want[0], 1)
    assert sorted(os.listdir(work.folder / "images")) == ["a-0.png", "a-1.png", "b.png"]


def test_command_says_in_images_how_they_were_made(work: Work, tmp_path: Path) -> None:
    bundle = edited(
        work.bundle, tmp_path / "of", lambda tree: tree["model"].update(weights_license="a test's")
    )
    (work.folder / f".image.png.{2**22 + 1}.part").touch()  # of a process that was killed
    options = ("--seed", 7, "--sigma", "0.25", "--steps", 2)
    assert work.run(*ONE, *options, bundle=bundle)[0] == 0
    assert not list(work.folder.glob(".image.png.*"))
    with Image.open(work.folder / "image.png") as image:
        image.load()
        info: Any = dict(image.info)
    assert info.pop("srgb") == 0
    arguments = ("--latent", work.folder / "latent.safetensors", "--caption")
    caption, python = work.folder / "caption.safetensors", tmp_path / "python.png"
    words = map(str, (bundle, *arguments, caption, "-o", python, *options))
    assert decode_cli.main(list(words)) == 0
    with Image.open(python) as image:
        image.load()
        assert dict(image.info) | {"pid-trt": None} == info | {"pid-trt": None}
        assert json.loads(image.info["pid-trt"]) == json.loads(info["pid-trt"])
    assert json.loads(info["pid-trt"])["weights_license"] == "a test's"
    assert work.run(*ONE, "--overwrite", "--no-metadata", bundle=bundle)[0] == 0
    with Image.open(work.folder / "image.png") as image:
        image.load()
        assert image.info == {"srgb": 0}


def test_command_warns(work: Work, tmp_path: Path) -> None:
    code, _, err = work.run("--latent", "latent.safetensors", "-o", "image.png", "--sigma", "0.9")
    assert code == 0 and err.count("\n") == 2
    assert "warning: sigma 0.9 is beyond 0.8, the highest in training" in err
    assert "warning: 1 of 1 images have no caption and get the empty embedding" in err
    bundle = edited(
        work.bundle, tmp_path / "bare", lambda tree: tree["model"].update(captioned=False)
    )
    arguments = ("--latent", "latent.safetensors", "-o", "image.png", "--overwrite")
    assert work.run(*arguments, bundle=bundle)[::2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required"),
        (("-o", "a.png"), "--latent"),
        ((*ONE, "--latents", "."), "not allowed with"),
        ((*ONE, "--steps", 4, "--times", "1,0"), "not allowed with"),
        ((*ONE, "--captions", "."), "not allowed with"),
        ((*ONE, "--sheet", "a.png"), "expected no --sheet, whose labels need a font"),
        ((*ONE, "--format", "png"), "expected --format with --latents, but got --latent"),
        ((*ONE, "--format", "webp"), "this command writes no other, but got 'webp'; use pid-dec"),
        ((*ONE, "--format", "tiff"), "this command writes no other, but got 'tiff'; use pid-dec"),
        ((*ONE, "--format", "gif"), "argument --format: expected png, but got 'gif'"),
        ((*ONE, "--engines", "a"), "expected the tensorrt backend to run engines 'a', but got 'on"),
        ((*ONE, "--quiet=no"), "argument --quiet: expected no value"),
        ((*ONE, "--caption-key", "--json"), "argument --caption-key: expected one argument"),
        ((*ONE, "more"), "unrecognized arguments: more"),
        ((*ONE, "--colour", "red"), "unrecognized arguments: --colour red"),
        ((*ONE, "--seed"), "expected one argument"),
        ((*ONE, "--seed", "-1"), "expected a whole number from 0 to 2^64 - 1, but got '-1'"),
        ((*ONE, "--seed", 2**64), "expected a whole number from 0 to 2^64 - 1"),
        ((*ONE, "--seed", "1.5"), "expected a whole number"),
        ((*ONE, "--threads", 0), "expected a whole number from 1"),
        ((*ONE, "--sigma", "1.01"), "expected sigma in [0, 1], but got [1.01]; 0 is a clean lat"),
        ((*ONE, "--sigma", "nan"), "expected sigma in [0, 1], but got [nan]"),
        ((*ONE, "--sigma", "high"), "expected a number, but got 'high'"),
        ((*ONE, "--times", "1,half,0"), "expected a number, but got"),
        ((*ONE, "--rule", "euler"), "expected sde, ode, dpm++2m, but got 'euler'"),
        ((*ONE, "--tile", "big"), "expected auto or a size such as 2048x2048, but got 'big'"),
        ((*ONE, "--tile", "0x0"), "expected auto or a size such as 2048x2048, but got '0x0'"),
        ((*ONE, "--tile", "100x64"), "width and height in multiples of 32 pixels, but got 100x64"),
        ((*ONE, "--tile", "96x96"), "no larger than the picture, 96x64, but got 96x96; give a sm"),
        ((*ONE, "--overlap", 32), "expected --tile with --overlap, but got none; add --tile auto"),
        ((*ONE, "--tile", "auto", "--overlap", "-1"), "whole number from 0 to 16777216, but got"),
        ((*ONE, "--guidance", "much"), "expected a number, but got 'much'"),
        (
            (*ONE, "--guidance", 5),
            "a negative caption for guidance 5, but got none; give one, made",
        ),
        ((*ONE, "--guidance", 0), "expected guidance from 1 to 100, but got 0.0; 5 is usual"),
        ((*ONE, "--negative", "."), "expected a file for --negative, but . is a folder; give a fi"),
        ((*ONE, "--negative", "absent"), "expected a safetensors file, but absent is none"),
        ((*ONE, "--negative", "caption.safetensors"), "expected guidance with the negative captio"),
        ((*ONE, "--steps", 3), "expected 1, 2, 4 steps, but got 3"),
        ((*ONE, "--steps", 0), "steps"),
        ((*ONE, "--times", "1,0"), "--arbitrary-timesteps"),
        ((*ONE, "--backend", "tensorflow"), "expected a backend of onnxruntime, tensorrt"),
        ((*ONE, "--device", "abacus"), "CPUExecutionProvider"),
        ((*ONE, "--device", "cuda:first"), "expected a device such as cuda:0"),
        ((*ONE, "--latent-key", "b"), "expected a tensor 'b' in latent.safetensors"),
        ((*ONE, "--caption-key", "b"), "change --caption-key"),
        ((*ONE[:-1], "image.gif"), "expected an image name ending in .png"),
        ((*ONE[:-1], "no/image.png"), "expected a folder to write image.png in"),
        (("--latent", "absent", "-o", "a.png"), "but absent is none"),
        (("--latent", ".", "-o", "a.png"), "a file for --latent, but . is a folder; use --latents"),
        (("--latent", "caption.safetensors", "-o", "a.png"), "choose with --latent-key"),
        (("--latents", "absent", "-o", "a"), "expected a folder for --latents"),
        (("--latents", ".", "-o", "caption.safetensors", "--latent-key", "latent"), ""),
        (("--latents", ".", "--captions", "absent", "-o", "a"), "expected a folder for --captions"),
    ],
    ids=str,
)
def test_command_refuses(work: Work, arguments: tuple[object, ...], message: str) -> None:
    assert message in work.refusal(*arguments)


def test_command_refuses_latents_that_do_not_fit(work: Work) -> None:
    nan = work.latent.copy()
    nan[3, 1, 1] = np.nan
    for name, latent, message in (
        (
            "wide",
            np.zeros((16, 17, 16), np.float32),
            "at most 0.262 megapixels, the largest bucket of this bundle, but got 512x544; the "
            "largest of this shape is 480x512, of a latent of height 16 and width 15; or export",
        ),
        ("channels", work.latent[:15].copy(), "expected latent shape [B, 16, h, w], but got "),
        ("rank", work.latent[0].copy(), "but got [2, 3]; this bundle takes latents of its own net"),
        (
            "single",
            np.ones((), np.float32),
            "expected latent shape [B, 16, h, w], but got []; this bundle",
        ),
        ("video", np.zeros((1, 16, 3, 2, 3), np.float32), "[1, 16, 3, 2, 3]; choose one frame"),
        ("empty", np.zeros((16, 0, 3), np.float32), "but got [16, 0, 3]"),
        ("double", work.latent.astype(np.float64), "to be F32, F16, BF16, but got F64; convert"),
        ("nan", nan, "holds NaN or infinity"),
    ):
        path = work.file(name, latent=latent)
        refused = work.refusal("--latent", path, "-o", "image.png")
        assert message in refused and str(path) in refused
    pair = np.stack([work.caption] * 2)
    for name, beside, message in (
        ("sigmas", {"sigma": np.array([0.1, 5.0], np.float32)}, "expected one sigma, but got"),
        ("sigma", {"sigma": np.array([5.0], np.float32)}, "expected sigma in [0, 1], but got"),
        ("captions", {"caption": pair}, "got [2, 12, 32]; B is 1 or that of the latent"),
    ):
        work.file(name, latent=work.latent, **beside)
        refused = work.refusal("--latent", f"{name}.safetensors", "-o", "image.png")
        assert message in refused
    (work.folder / "cut.safetensors").write_bytes(path.read_bytes()[:-7])
    refused = work.refusal("--latent", "cut.safetensors", "-o", "image.png")
    assert "expected cut.safetensors to be a safetensors file, but got: " in refused
    work.file("batch/a", latent=np.stack([work.latent] * 2))
    work.file("batch/a-1", latent=work.latent)
    refused = work.refusal("--latents", "batch", "-o", "images")
    assert "expected every image to have its own name, but got " in refused


def test_command_knows_latents_of_other_tools(work: Work, tmp_path: Path) -> None:
    assert work.run(*ONE)[0] == 0
    factor, shift = [0.5, *[0.25] * 15], [0.125]
    bundle = edited(
        work.bundle,
        tmp_path / "rules",
        lambda tree: tree["model"].update(
            space="flux",
            latent_convention="z",
            latent_spread=[0.3, 2.0],
            token_width=3,
            comfyui_latent={"factor": factor, "shift": shift},
            partly_denoised="euler",
        ),
    )
    raw = work.latent[None, :, None] / np.array(factor, np.float32)[:, None, None, None] + 0.125
    mark = np.zeros(0, np.float32)
    path = work.folder / work.file("raw", latent_tensor=raw, latent_format_version_0=mark)
    path.rename(path.with_suffix(".latent"))
    one = ("--latent", "raw.latent", *ONE[2:-1], "raw.png")
    note = "raw.latent: raw latents, normalised as this bundle takes them\n"
    assert work.run(*one, bundle=bundle)[::2] == (0, note)
    # A latent is rounded on its way there and back.
    np.testing.assert_allclose(work.pixels("raw.png"), work.pixels("image.png"), rtol=0, atol=1.01)
    assert "bundle does not say how to normalise it; " in work.refusal(*one)
    refused = work.refusal(*one, "--overwrite", "--sigma", 1.2, bundle=bundle)
    assert "a clean latent, and for x0 + sigma noise divide latent and sigma by sqrt(" in refused

    work.file("scaled", latent=7 * work.latent[None])
    scaled = ("--latent", "scaled.safetensors", *ONE[2:-1], "scaled.png")
    told = f"the latent's standard deviation is {7 * work.latent.std():.2f}, "
    code, _, err = work.run(*scaled, bundle=bundle)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith(f"warning: scaled.safetensors: {told}")
    assert err.endswith(
        "but about 1 is expected; normalise it as this bundle takes it: flux latents, z\n"
    )

    for name, latent, message in (
        ("tokens", raw.reshape(1, -1, 3), "these look like tokens [B, n, 3]: unpack them to [B,"),
        ("either", work.latent, "[16, 2, 3]; save one latent as [1, 16, h, w]; if these are tok"),
    ):
        path = work.file(name, latent=latent)
        assert message in work.refusal("--latent", path, "-o", "a.png", bundle=bundle)
    np.savez(work.folder / "latent.npz", work.latent)
    refused = work.refusal("--latent", "latent.npz", "-o", "a.png")
    assert "to be a safetensors file, but got a ZIP archive, as torch.save and numpy.s" in refused


def in_parts(latent: Floats) -> Floats:
    """Latents `[1, C, h, w]` as FLUX.2's autoencoder would give them, `[1, C / 4, 2 h, 2 w]`."""
    _, channels, height, width = latent.shape
    blocks = latent.reshape(1, channels // 4, 2, 2, height, width)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(1, channels // 4, 2 * height, 2 * width)


def packed(latent: NDArray[Any]) -> NDArray[Any]:
    """Latents `[1, C, h, w]` as tokens `[1, h w / 4, 4 C]`."""
    _, channels, height, width = latent.shape
    grid = latent.reshape(1, channels, height // 2, 2, width // 2, 2)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(1, -1, 4 * channels)


def test_command_reads_latents_of_every_form_as_python_does(work: Work, tmp_path: Path) -> None:
    rule = {"factor": [0.5], "shift": [0.25]}
    model = {"comfyui_latent": rule, "token_width": 64, "captioned": False}
    bundle = edited(work.bundle, tmp_path / "forms", lambda tree: tree["model"].update(model))
    manifest = read_manifest(bundle, verify=False)
    numbers = np.random.default_rng(4).standard_normal((1, 16, 4, 2))
    plain, square = (numbers[:, :, :rows].astype(np.float16) for rows in (4, 2))
    latent = plain.astype(np.float32)
    work.file("plain", latent=plain)
    work.file("square", latent=square)
    mean = np.linspace(-1, 1, 16, dtype=np.float32)
    variance = np.linspace(0.5, 2, 16, dtype=np.float32)
    work.file("ae", **{"bn.running_mean": mean, "bn.running_var": variance})
    spread = np.sqrt(variance + np.float32(1e-4))
    unlike = latent * spread[:, None, None] + mean[:, None, None]
    for dtype in ("<f2", "<f4", "<f8"):
        np.save(work.folder / f"{dtype[1:]}.npy", plain.astype(dtype))
    np.save(work.folder / "columns.npy", np.asfortranarray(latent))
    np.save(work.folder / "tokens.npy", packed(latent))

    normalised = "raw latents, normalised as this bundle takes them"
    made: dict[str, NDArray[Any]] = {}
    for name, file, form, note in (
        ("plain", "plain.safetensors", "auto", None),
        ("normalised", "plain.safetensors", "normalised", None),
        *((name, f"{name}.npy", "auto", None) for name in ("f2", "f4", "f8", "columns")),
        ("raw", work.file("raw", latent=latent / 0.5 + 0.25).name, "raw", normalised),
        ("parts", work.file("parts", latent=in_parts(unlike)).name, "raw:ae.safetensors", None),
        ("unlike", work.file("unlike", latent=unlike).name, "raw:ae.safetensors", normalised),
        ("tokens", "tokens.npy", "packed:16x32", "tokens, unpacked to [1, 16, 4, 2]"),
        ("square", "square.safetensors", "auto", None),
        ("squared", work.file("squared", latent=packed(square)).name, "packed", None),
    ):
        given = ("--latent", file, "--latent-form", form, "-o", f"{name}.png")
        code, _, err = work.run(*given, bundle=bundle)
        assert code == 0 and (note is None or err == f"{file}: {note}\n"), err
        assert work.run(*given, "--overwrite", "--quiet", bundle=bundle)[::2] == (0, "")
        made[name] = work.pixels(f"{name}.png").astype(int)
        kind, _, more = form.partition(":")
        python = open_latent_file(
            work.folder / file,
            manifest,
            form=LatentForm(
                kind,
                (16, 32) if kind == "packed" and more else None,
                work.folder / more if kind == "raw" and more else None,
            ),
        )
        wanted = square if name.startswith("square") else latent
        np.testing.assert_allclose(python.latent.read(), wanted, rtol=0, atol=1e-6)
    for name in ("normalised", "f2", "f4", "f8", "columns", "tokens"):
        np.testing.assert_array_equal(made[name], made["plain"])
    for name in ("raw", "parts", "unlike"):  # rounded on the way there and back
        assert np.abs(made[name] - made["plain"]).max() <= 1
    np.testing.assert_array_equal(made["squared"], made["square"])


def test_command_refuses_forms_that_a_latent_does_not_have(work: Work, tmp_path: Path) -> None:
    tokens = edited(
        work.bundle, tmp_path / "tokens", lambda tree: tree["model"].update(token_width=64)
    )
    flux2 = edited(
        work.bundle, tmp_path / "flux2", lambda tree: tree["model"].update(space="flux2")
    )
    work.file("tokens", latent=np.ones((1, 8, 64), np.float32))
    work.file("parts", latent=np.ones((1, 4, 4, 3), np.float32))
    work.file("ae", **{"bn.running_mean": np.ones(16, np.float32)})
    work.file("flux2_ae", **{f"bn.running_{n}": np.ones(16, np.float32) for n in ("mean", "var")})
    np.save(work.folder / "whole.npy", work.latent)
    whole = (work.folder / "whole.npy").read_bytes()
    for name, content in (
        ("cut", whole[:-1]),
        ("short", whole[:9]),
        ("long", whole[:8] + b"\xff\xff" + whole[10:]),
        ("shapeless", whole.replace(b"'shape'", b"'chape'")),
        ("huge", whole.replace(b"(16, 2, 3), ", b"(16, 2, %d), " % 10**14)),
        ("objects", whole.replace(b"<f4", b"|O8")),
    ):
        (work.folder / f"{name}.npy").write_bytes(content)
    np.save(work.folder / "numbers.npy", work.latent.astype(np.int32))
    for file, form, bundle, message in (
        ("latent.safetensors", "tokens", None, "raw, packed, raw:FILE or packed:1024x768, but got"),
        ("latent.safetensors", "auto:16x16", None, "but got 'auto:16x16'"),
        ("latent.safetensors", "raw:", None, "but got 'raw:'"),
        ("latent.safetensors", "packed:16", None, "but got 'packed:16'"),
        ("latent.safetensors", "raw", None, "a raw one, and this bundle does not say how to norm"),
        ("latent.safetensors", "packed", None, "expected a bundle whose latents are ever packed"),
        ("latent.safetensors", "packed", tokens, "expected tokens [B, n, 64] in latent.safetensor"),
        ("tokens.safetensors", "packed", tokens, "expected tokens of a square, but tokens.safete"),
        ("tokens.safetensors", "packed:64x64", tokens, "of 64x64, but tokens.safetensors has 8, o"),
        ("parts.safetensors", "auto", flux2, "got raw ones, [1, 4, 4, 3]; name the file of FLUX.2"),
        ("parts.safetensors", "raw:absent", flux2, "expected a safetensors file, but absent is no"),
        ("parts.safetensors", "raw:ae.safetensors", flux2, "of 16 channels in ae.safetensors, but"),
        ("parts.safetensors", "raw:flux2_ae.safetensors", flux2, "of even height and width in par"),
        ("cut.npy", "auto", None, "cannot read it: it is shorter than its header says"),
        ("short.npy", "auto", None, "cannot read it: its header is longer than the file"),
        ("long.npy", "auto", None, "cannot read it: its header is longer than the file"),
        ("shapeless.npy", "auto", None, "its header does not describe an array of numbers"),
        ("huge.npy", "auto", None, "cannot read it: it is shorter than its header says"),
        ("objects.npy", "auto", None, "to be F32, F16, BF16, but got |O8"),
        ("numbers.npy", "auto", None, "to be F32, F16, BF16, but got <i4; convert it to float32"),
    ):
        given = ("--latent", file, "--latent-form", form, "-o", "a.png")
        assert message in work.refusal(*given, bundle=bundle), (file, form)


def test_command_refuses_damaged_bundles(work: Work, tmp_path: Path) -> None:
    bundle = edited(
        work.bundle, tmp_path / "later", lambda tree: tree.update(format_version=[3, 0])
    )
    assert "expected bundle format 1.x or 2.x" in work.refusal(*ONE, bundle=bundle)
    assert "expected a bundle" in work.refusal(*ONE, bundle=tmp_path)
    shutil.copytree(work.bundle, tmp_path / "altered")
    graph = tmp_path / "altered" / "latent.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    assert "latent.onnx was altered" in work.refusal(*ONE, bundle=tmp_path / "altered")


def test_command_refuses_an_image_of_nan(work: Work, spoilt_bundle: Path) -> None:
    refused = work.refusal(*ONE, bundle=spoilt_bundle)
    assert "latent.safetensors: expected a finite image, but step 3 of 4 gave NaN or inf" in refused


def test_command_leaves_nothing_half_written_when_interrupted(work: Work) -> None:
    for number in range(40):
        work.file(f"latents/{number}", latent=np.zeros((16, 8, 8), np.float32))
    images = work.folder / "images"
    command = work.command("--latents", "latents", "-o", "images", "--no-verify")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=work.folder)
    deadline = time.monotonic() + 120
    while not any(images.glob("*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("pid-decode-cpp: interrupted\n")
    written = os.listdir(images)
    assert 0 < len(written) < 40 and all(name.endswith(".png") for name in written)
    assert all(work.pixels(f"images/{name}").shape == (256, 256, 3) for name in written)


def test_command_shows_progress_on_a_terminal(work: Work) -> None:
    for quiet in (False, True):
        main, secondary = os.openpty()
        options = ("--overwrite", "--no-verify", *(["--quiet"] if quiet else []))
        done = subprocess.run(
            work.command(*ONE, *options),
            stdout=subprocess.DEVNULL,
            stderr=secondary,
            cwd=work.folder,
            check=False,
        )
        os.close(secondary)
        shown = b""
        try:
            while part := os.read(main, 4096):
                shown += part
        except OSError:  # nobody writes any more
            pass
        os.close(main)
        assert done.returncode == 0
        assert (b"Decoding" in shown) == (not quiet), shown


def test_command_ends_quietly_when_nobody_reads(work: Work) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        work.command(*ONE), stdout=writer, stderr=subprocess.PIPE, cwd=work.folder, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


FLAGS_OF_ONE = {
    "--provider-library": "Python finds plug-in providers by their packages",
    "--actors": "a Ray cluster runs Python",
    "--ray": "a Ray cluster runs Python",
}
"""Flags that one of the two commands does not have, and why."""


def test_commands_have_the_same_flags(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(text: str) -> set[str]:
        options = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  -")]
        return set(re.findall(r"--[a-z-]+", " ".join(options)))

    with pytest.raises(SystemExit):
        decode_cli.main(["--help"])
    python, cpp = flags(capsys.readouterr().out), flags(work.run("--help")[1])
    assert len(python & cpp) > 20
    assert python ^ cpp == set(FLAGS_OF_ONE)


def test_command_has_help_and_a_version(work: Work) -> None:
    code, out, err = work.run("--help")
    assert (code, err) == (0, "")
    assert "pid-decode-cpp flux-2k --latent latent.safetensors" in out
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and work.run("--version") == (0, f"pid-decode-cpp {version[1]}\n", "")
