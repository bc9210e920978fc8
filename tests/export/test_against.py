"""`pid-verify --against`: how much the pictures of two bundles differ."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from altered import alter
from pid_export.verify_cli import main
from pid_runtime.decoder import Decoder

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
Fields = dict[str, Any]
EditBundle = Callable[..., Path]


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of two files of latents: one of two with a caption and a sigma, and one NumPy."""
    folder, rng = tmp_path / "latents", np.random.default_rng(3)
    folder.mkdir()

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    sigma = np.array([0, 0.4], np.float32)
    pair = {"latent": normal(2, 16, 2, 3), "caption": normal(3, 32), "sigma": sigma}
    save_file(pair, folder / "a.safetensors")
    np.save(folder / "b.npy", normal(16, 2, 2))
    (folder / "notes.txt").write_text("not a latent")
    return folder


def compared(run_command: RunCommand, *arguments: object) -> Fields:
    code, out, _ = run_command(main, *arguments, "--json")
    assert code == 0
    return json.loads(out, parse_constant=lambda name: pytest.fail(name))


def psnr(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return -10 * math.log10(np.mean(((one.astype(np.float64) - other) / 2) ** 2))


def test_every_picture_against_that_of_the_other_bundle(
    golden_bundle: Path, bf16_bundle: Path, latents: Path, run_command: RunCommand
) -> None:
    """As `Decoder.decode` makes them, seed by seed."""
    arguments = (bf16_bundle, "--against", golden_bundle, "--latents", latents, "--seed", 7)
    found = compared(
        run_command, *arguments, "--backend", "torch", "--against-backend", "onnxruntime"
    )
    pictures: list[Fields] = found.pop("pictures")
    mean, least = found.pop("mean_psnr_db"), found.pop("least_psnr_db")
    side = {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}
    assert found == {
        "bundle": str(bf16_bundle),
        "precision": "bf16",
        "backend": "torch",
        "device": "cpu",
        "against": {"bundle": str(golden_bundle), **side},
    }
    pair, single = load_file(latents / "a.safetensors"), np.load(latents / "b.npy")
    expected: list[NDArray[np.float32]] = []
    images: list[NDArray[np.float32]] = []
    for bundle, backend, into in (
        (golden_bundle, "onnxruntime", expected),
        (bf16_bundle, "torch", images),
    ):
        with Decoder.open(bundle, backend) as decoder:
            caption, sigma = pair["caption"][None], pair["sigma"]
            for i in range(2):
                latent = pair["latent"][i : i + 1]
                into.append(decoder.decode(latent, caption, sigma=sigma[i], seed=7 + i))
            into.append(decoder.decode(single[None], seed=7))
    wanted = [psnr(*two) for two in zip(images, expected, strict=True)]
    assert [each["psnr_db"] for each in pictures] == pytest.approx(wanted, abs=1e-3)
    assert 20 < least == min(each["psnr_db"] for each in pictures) < 80
    assert mean == pytest.approx(np.mean(wanted), abs=1e-3)
    described = [(Path(e["latent"]).name, e["index"], e["seed"], e["sigma"]) for e in pictures]
    assert described == [
        ("a.safetensors", 0, 7, 0),
        ("a.safetensors", 1, 8, 0.4),
        ("b.npy", 0, 7, 0),
    ]
    assert [(e["width"], e["height"]) for e in pictures] == [(96, 64)] * 2 + [(64, 64)]
    for each, two in zip(pictures, zip(images, expected, strict=True), strict=True):
        largest = np.abs(two[0] - two[1]).max()
        assert each["max_abs_error"] == pytest.approx(float(largest), rel=0.02)


def test_text_says_the_same(
    golden_bundle: Path, bf16_bundle: Path, latents: Path, run_command: RunCommand
) -> None:
    arguments = (bf16_bundle, "--against", golden_bundle, "--latents", latents)
    code, out, err = run_command(main, *arguments, "--backend", "torch")
    header, *rows, summary = out.splitlines()
    assert code == 0 and "skipped 1 of 3 files" in err and ".txt" in err
    assert header.split() == ["PSNR", "dB", "largest", "picture"]
    assert [row.split()[2:] for row in rows] == [
        [f"{latents / 'a.safetensors'}:", "image", "0,", "96x64,", "seed", "0,", "sigma", "0"],
        [f"{latents / 'a.safetensors'}:", "image", "1,", "96x64,", "seed", "1,", "sigma", "0.4"],
        [f"{latents / 'b.npy'}:", "image", "0,", "64x64,", "seed", "0,", "sigma", "0"],
    ]
    least = min(float(row.split()[0]) for row in rows)
    assert summary.startswith(
        f"3 pictures of {bf16_bundle} (bf16, torch) against {golden_bundle} (fp32, torch): mean "
    )
    assert summary.endswith(f" dB, least {least:.2f} dB")


def test_equal_bundles_and_their_options(
    golden_bundle: Path, chunked_bundle: Path, latents: Path, run_command: RunCommand
) -> None:
    one = ("--latent", latents / "b.npy", "--caption", latents / "a.safetensors")
    arguments = (golden_bundle, "--against", golden_bundle, *one)
    found = compared(run_command, *arguments)
    assert found["pictures"][0]["psnr_db"] is found["mean_psnr_db"] is None
    assert found["pictures"][0]["max_abs_error"] == 0
    assert " equal " in run_command(main, *arguments)[1].replace("\n", " ").replace("  ", " ")
    # Other chunks are the same network, and options reach both decodes.
    near = compared(run_command, chunked_bundle, *arguments[1:], "--steps", 1, "--sigma", 0.5)
    picture = near["pictures"][0]
    assert picture["sigma"] == 0.5 and (picture["psnr_db"] is None or picture["psnr_db"] > 100)


def test_another_file_of_weights_is_told(
    golden_bundle: Path, edit_bundle: EditBundle, latents: Path, run_command: RunCommand
) -> None:
    """A repackaging that somebody quantised, say, against the official file."""

    def edit(file: str) -> Callable[[Fields], None]:
        def change(fields: Fields) -> None:
            fields["model"]["weights"] = {"file": file, "sha256": "0" * 64}

        return change

    one = edit_bundle(edit("official.pth")).rename(latents.parent / "one")
    other = edit_bundle(edit("fp8.safetensors"))
    arguments = (one, "--against", other, "--latent", latents / "b.npy")
    code, _, err = run_command(main, *arguments)
    assert code == 0
    assert "from different files, official.pth and fp8.safetensors" in err


def test_what_the_other_bundle_made_is_not_left_behind(
    golden_bundle: Path,
    tmp_path: Path,
    latents: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(values: NDArray[np.float32]) -> None:
        values.reshape(-1)[-1] = math.nan

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    altered = alter(golden_bundle, tmp_path, {"update.velocity.bias": spoil})
    latent = latents / "a.safetensors"
    message = refusal(main, altered, "--against", golden_bundle, "--latent", latent)
    assert f"{altered}, {latent}: expected a finite image" in message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields["model"].update(space="flux2"), "got space flux2 in"),
        (lambda fields: fields["model"].update(variant="4k"), "got variant 4k in"),
        (lambda fields: fields["model"].update(checkpoint="PiD"), "got checkpoint PiD in"),
        (
            lambda fields: fields["model"].update(weights={"random_seed": 9}),
            "got random weights of seed 9 in",
        ),
        (lambda fields: fields["sampler"].update(steps=2), "got times (0.999, "),
        (lambda fields: fields["sampler"].update(rule="ode"), "got rule ode in"),
    ],
)
def test_bundles_that_do_not_belong_together(
    golden_bundle: Path,
    edit_bundle: EditBundle,
    latents: Path,
    refusal: Refusal,
    change: Callable[[Fields], None],
    words: str,
) -> None:
    other = edit_bundle(change)
    message = refusal(main, golden_bundle, "--against", other, "--latents", latents)
    assert "expected two bundles of one network, but " in message and words in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--against", "BUNDLE"], "latents to decode with --against, but got none"),
        (["--latents", "DIR"], "expected --against with --latents, but got none"),
        (["--latent-form", "raw"], "expected --against with --latent-form"),
        (["--guidance", "2"], "expected --against with --guidance"),
        (["--against-backend", "torch"], "expected --against with --against-backend"),
        (["--against", "BUNDLE", "--latents", "DIR", "--size", "64x64"], "without --size"),
        (["--against", "BUNDLE", "--latents", "DIR", "--checkpoint", "x"], "without --checkpoint"),
        (["--against", "BUNDLE", "--latents", "BUNDLE/manifest.json"], "a folder for --latents"),
        (["--against", "BUNDLE", "--latent", "DIR"], "a file for --latent, but"),
        (["--against", "DIR", "--latents", "DIR"], "expected a bundle"),
        (["--against", "BUNDLE", "--latents", "DIR", "--guidance", "2"], "guidance"),
        (
            ["--against", "BUNDLE", "--latents", "DIR", "--against-backend", "cuda"],
            "a backend of onnxruntime, ",
        ),
    ],
)
def test_arguments(
    golden_bundle: Path, latents: Path, refusal: Refusal, arguments: list[str], part: str
) -> None:
    given = [
        each.replace("BUNDLE", str(golden_bundle)).replace("DIR", str(latents))
        for each in arguments
    ]
    assert part in refusal(main, golden_bundle, *given)


def test_numbers_too_large_for_their_scales_are_counted(
    golden_bundle: Path, fp8_twin: Path, latents: Path, run_command: RunCommand
) -> None:
    options = ("--against", golden_bundle, "--backend", "torch", "--steps", 1)
    found = compared(run_command, fp8_twin, *options, "--latents", latents)
    assert 0 <= found["most_clipped"]["share"] < 1e-3 and found["most_clipped"]["place"]
    np.save(latents / "b.npy", 100 * np.load(latents / "b.npy"))
    code, out, err = run_command(main, fp8_twin, *options, "--latent", latents / "b.npy")
    assert code == 1 and "of the numbers at " in out
    assert "expected at most 0.1% of the numbers beyond FP8's range, but got " in err
