"""Steps, rule, guidance and tiles as commands take them."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command.decode_cli import main
from pid_runtime.command.sampling_options import Sampling, add_sampling_options, read_sampling
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError

LATENT = np.random.default_rng(1).standard_normal((1, 16, 5, 6), np.float32)
CAPTION, NEGATIVE = np.random.default_rng(2).standard_normal((2, 1, 12, 32), np.float32)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_file({"latent": LATENT, "caption": CAPTION}, tmp_path / "latent.safetensors")
    save_file({"caption": NEGATIVE}, tmp_path / "negative.safetensors")
    return tmp_path


def read(bundle: Path, *words: object, **changes: Any) -> Sampling:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    manifest = read_manifest(bundle, verify=False)
    sampler = replace(manifest.sampler, **changes)
    return read_sampling(
        parser.parse_args([str(word) for word in words]), replace(manifest, sampler=sampler)
    )


def test_without_options_the_bundle_says(golden_bundle: Path) -> None:
    assert read(golden_bundle) == Sampling()


def test_options_are_arguments_of_decode(free_bundle: Path, files: Path) -> None:
    words = [
        "--times",
        "0.9,0.5,0",
        "--rule",
        "dpm++2m",
        "--guidance",
        "5",
        "--tile",
        "128x96",
        "--overlap",
        "32",
    ]
    sampling = read(free_bundle, *words, "--negative", files / "negative.safetensors")
    options = sampling.options
    np.testing.assert_array_equal(options.pop("negative"), NEGATIVE)
    assert options == {
        "steps": None,
        "times": (0.9, 0.5, 0.0),
        "rule": "dpm++2m",
        "guidance": 5.0,
        "tile": (128, 96),
        "overlap": 32,
    }
    assert read(free_bundle, "--times", "1,0", "--tile", "auto").tile == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlap", 32], "expected --tile with --overlap"),
        (["--steps", 3], "expected 1, 2, 4 steps, but got 3"),
        (["--guidance", 5], "expected a negative caption for guidance 5"),
        (["--negative", "."], "a file for --negative, but . is a folder"),
        (["--negative", "none.safetensors"], "none.safetensors"),
    ],
)
def test_what_does_not_go_together_is_refused(
    golden_bundle: Path, words: list[object], message: str
) -> None:
    with pytest.raises(PidRuntimeError, match=message):
        read(golden_bundle, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile", "big"], "expected auto or a size such as 2048x2048, but got 'big'"),
        (["--overlap", "-32"], "expected a whole number from 0 to 16777216, but got '-32'"),
        (["--guidance", "much"], "expected a number, but got 'much'"),
        (["--rule", "euler"], "invalid choice: 'euler'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    golden_bundle: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(golden_bundle, *words)
    assert message in capsys.readouterr().err


def test_tiled_images_say_so(golden_bundle: Path, files: Path, run_command: Any) -> None:
    latent, image = files / "latent.safetensors", files / "image.png"
    given = (golden_bundle, "--latent", latent, "-o", image, "--tile", "128x96", "--overlap", 32)
    code, out, err = run_command(main, *given, "--json")
    assert code == 0, err
    assert json.loads(out)["tile"] == [128, 96] and json.loads(out)["overlap"] == 32
    with Image.open(image) as picture:
        assert picture.size == (192, 160)
        assert json.loads(str(picture.info["pid-trt"]))["tile"] == [128, 96]


def test_a_plan_makes_no_image(golden_bundle: Path, files: Path, run_command: Any) -> None:
    given = (golden_bundle, "--latent", files / "latent.safetensors", "--plan")
    code, out, _ = run_command(main, *given)
    assert code == 0 and "192x160: bucket small, whole; 4 steps, 4 calls of the network" in out
    code, out, _ = run_command(main, *given, "--tile", "128x96", "--overlap", 32, "--json")
    plan = json.loads(out)["plans"][0]
    assert (plan["tiles"], plan["calls"], plan["tile"]) == (4, 16, [128, 96])
    assert sorted(path.name for path in files.iterdir()) == [
        "latent.safetensors",
        "negative.safetensors",
    ]


def test_decoding_needs_an_output(golden_bundle: Path, files: Path, refusal: Any) -> None:
    err = refusal(main, golden_bundle, "--latent", files / "latent.safetensors")
    assert "expected -o for the image" in err


def test_the_negative_may_lie_beside_the_caption(free_bundle: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.safetensors"
    save_file({"caption": CAPTION[0], "negative": NEGATIVE[0]}, both)
    sampling = read(free_bundle, "--times", "1,0", "--guidance", 5, "--negative", both)
    np.testing.assert_array_equal(sampling.options["negative"], NEGATIVE)


def test_every_latent_of_a_file_has_its_own_negative(
    free_bundle: Path, tmp_path: Path, run_command: Any, refusal: Any
) -> None:
    latents, negatives = np.concatenate([LATENT, -LATENT]), np.concatenate([NEGATIVE, -NEGATIVE])
    latent, negative = tmp_path / "latent.safetensors", tmp_path / "negative.safetensors"
    save_file({"latent": latents, "caption": CAPTION}, latent)
    save_file({"negative": negatives}, negative)
    words = ["--times", "0.9,0", "--guidance", 3, "--negative", negative, "--seed", 4]
    image = tmp_path / "image.png"
    code, _, err = run_command(main, free_bundle, "--latent", latent, "-o", image, *words)
    assert code == 0, err
    with Decoder.open(free_bundle, threads=1, verify=False) as decoder:
        want = decoder.decode(
            latents,
            CAPTION,
            negative=negatives,
            guidance=3,
            times=(0.9, 0),
            seed=4,
            output="uint8",
        )
    for index in range(2):
        with Image.open(tmp_path / f"image-{index}.png") as picture:
            pixels = np.asarray(picture).astype(int)
        assert np.abs(pixels - want[index]).max() <= 1
    save_file({"latent": latents[:1], "caption": CAPTION}, latent)
    more = [free_bundle, "--latent", latent, "-o", tmp_path / "other.png", *words]
    assert "negative shape [B, T, 32], but got [2, 12, 32]; B is 1 or" in refusal(main, *more)
    with pytest.raises(PidRuntimeError, match=r"pictures are decoded one by one, but got 2; save"):
        read(free_bundle, *words)


def test_a_file_of_several_tensors_has_to_say_which_is_the_negative(
    free_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "several.safetensors"
    save_file({"a": CAPTION, "b": NEGATIVE}, file)
    with pytest.raises(PidRuntimeError, match=r"got a, b; name that of the negative caption 'neg"):
        read(free_bundle, "--times", "1,0", "--guidance", 5, "--negative", file)


def test_guided_images_say_so(
    free_bundle: Path, files: Path, run_command: Any, refusal: Any
) -> None:
    given = [free_bundle, "--latent", files / "latent.safetensors", "-o", files / "image.png"]
    given += ["--times", "0.9,0.4,0", "--rule", "ode"]
    assert "a negative caption for guidance 3" in refusal(main, *given, "--guidance", 3)
    negative = ["--negative", files / "negative.safetensors"]
    code, out, err = run_command(main, *given, "--guidance", 3, *negative, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["guidance"], result["rule"]) == (3.0, "ode")
    assert result["negative"] == str(files / "negative.safetensors")
