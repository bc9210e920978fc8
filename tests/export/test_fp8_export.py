"""`pid-export --precision fp8` and `pid-calibrate` as a user meets them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pid_export import calibrate_cli, fp8_export
from pid_export.calibration import Calibration, read_calibration
from pid_export.cli import main
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Decoder
from small_network import DIMENSIONS

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[str, ...]:
    """Of an export of a small network, but for -o and --precision."""
    config = tmp_path / "small.json"
    config.write_text(json.dumps(DIMENSIONS))
    base = ("--space", "flux", "--variant", "2k", "--config", str(config))
    return (*base, "--random-weights", "7", "--buckets", "tiny=64")


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of a latent and its caption."""
    folder = tmp_path / "latents"
    folder.mkdir()
    rng = np.random.default_rng(0)
    latent, caption = (rng.standard_normal(shape, np.float32) for shape in ((16, 3, 4), (12, 32)))
    save_file({"latent": latent, "caption": caption}, folder / "a.safetensors")
    return folder


def test_an_export_in_fp8(
    arguments: tuple[str, ...], latents: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """Calibrated on latents; both backends decode the same; every graph has its row.

    Where two backends' float32 differs in its last digit, a number may be rounded to the other
    side; such a network makes that larger. It stays small beside what rounding costs.
    """
    output = tmp_path / "fp8"
    options = ("--precision", "fp8-fp32", "--calibration", latents, "--sensitivity")
    code, out, err = run_command(main, *arguments, *options, "--json", "-o", output)
    assert code == 0, err
    result = json.loads(out)
    assert result["calibrated_on"] == "1 latent" and 0 <= result["most_clipped"] < 1e-3
    manifest = read_manifest(output)
    stages = ("attention", "tokens", "pixel_first", "pixels", "update")
    rounded = {name for name, graph in manifest.graphs.items() if graph.stage in stages}
    assert {row["graph"] for row in result["sensitivity"]} == rounded
    assert not list(tmp_path.glob(".*"))
    latent = np.random.default_rng(1).standard_normal((1, 16, 3, 4), np.float32)
    exact = tmp_path / "exact"
    assert run_command(main, *arguments, "-o", exact)[0] == 0
    images: list[NDArray[np.float32]] = []
    for bundle, backend in ((exact, "torch"), (output, "torch"), (output, "onnxruntime")):
        with Decoder.open(bundle, backend) as decoder:
            images.append(decoder.decode(latent, seed=3))
    rounding, backends = (float(np.square(each - images[1]).mean()) for each in images[::2])
    assert rounding > 0 and backends < 0.05 * rounding


@pytest.mark.slow
def test_a_calibration_of_its_own_command(
    arguments: tuple[str, ...], latents: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    exact, file, output = (tmp_path / name for name in ("exact", "c.json", "fp8"))
    assert run_command(main, *arguments, "-o", exact)[0] == 0
    given = ("--latents", latents, "--keep", "image.1,attention", "--json", "-o", file)
    code, out, err = run_command(calibrate_cli.main, exact, *given)
    assert code == 0, err
    result = json.loads(out)
    assert (result["inputs"], result["decodes"]) == ("1 latent", 1)
    assert read_calibration(file).keep == ("image.1", "attention")
    assert len(read_calibration(file).sizes) == result["places"]
    fp8 = ("--precision", "fp8", "--calibration", file, "-o", output)
    code, _, err = run_command(main, *arguments, *fp8)
    assert code == 0, err
    manifest = read_manifest(output)
    assert manifest.model["rounding"]["kept"] == ["image.1", "attention"]
    assert "rounding" not in manifest.graphs["image.1"].options
    assert manifest.buffers["q.0"].dtype == "bfloat16"
    assert manifest.buffers["pixel_q.0"].dtype == "float8_e4m3fn"


@pytest.mark.slow
def test_an_export_in_int8(
    arguments: tuple[str, ...], tmp_path: Path, run_command: RunCommand
) -> None:
    """Weights alone, and so a hundred times nearer to float32; nothing to calibrate."""
    latent = np.random.default_rng(1).standard_normal((1, 16, 3, 4), np.float32)
    images: dict[str, NDArray[np.float32]] = {}
    for precision in ("fp32", "int8-fp32"):
        output = tmp_path / precision
        given = ("--precision", precision, *(("--keep", "update") if precision != "fp32" else ()))
        assert run_command(main, *arguments, *given, "-o", output)[0] == 0
        for backend in ("torch", "onnxruntime"):
            with Decoder.open(output, backend) as decoder:
                images[f"{precision} {backend}"] = decoder.decode(latent, seed=3)
    rounded, exact = images["int8-fp32 torch"], images["fp32 torch"]
    assert np.abs(rounded - images["int8-fp32 onnxruntime"]).max() <= 1e-3
    assert 1e-4 < np.sqrt(np.square(rounded - exact).mean()) < 0.1
    manifest = read_manifest(output)
    assert (manifest.format_version, manifest.model["rounding"]) == ((2, 0), {"kept": ["update"]})
    assert manifest.graphs["image.1"].options["rounding"] == ["weights"]
    assert "rounding" not in manifest.graphs["update"].options


def test_what_is_asked_for_must_go_together(
    arguments: tuple[str, ...], latents: Path, golden_bundle: Path, tmp_path: Path, refusal: Refusal
) -> None:
    output = tmp_path / "fp8"
    said = refusal(main, *arguments, "--precision", "int8", "--sensitivity", "-o", output)
    assert "expected --sensitivity with --precision fp8, but got int8" in said
    said = refusal(main, *arguments, "--keep", "update", "-o", output)
    assert "expected --keep with --precision fp8, but got fp32" in said
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    said = refusal(main, *arguments, "--precision", "fp8", "--calibration", wrong, "-o", output)
    assert "expected a calibration that pid-calibrate wrote" in said
    fp8 = ("--precision", "fp8", "-o", output)
    said = refusal(main, *arguments, *fp8, "--calibration", tmp_path / "none")
    assert "none is not there; check --calibration" in said
    said = refusal(main, *arguments, *fp8, "--keep", "latent")
    assert "expected graphs to keep of" in said and "but got 'latent'" in said
    said = refusal(calibrate_cli.main, golden_bundle, "--percentile", "50", "-o", output)
    assert "expected a percentile from 90 to 100, but got 50" in said
    said = refusal(calibrate_cli.main, golden_bundle, "--captions", latents, "-o", output)
    assert "expected --latents with --captions" in said
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_left_of_an_export_that_cuts_off_too_much(
    arguments: tuple[str, ...],
    latents: Path,
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = fp8_export.calibrate

    def too_small(*given: object, **options: object) -> Calibration:
        found = measure(*given, **options)  # pyright: ignore[reportArgumentType]
        return replace(found, sizes={name: size / 64 for name, size in found.sizes.items()})

    monkeypatch.setattr(fp8_export, "calibrate", too_small)
    given = ("--precision", "fp8-fp32", "--calibration", latents, "-o", tmp_path / "fp8")
    said = refusal(main, *arguments, *given)
    assert "of the numbers beyond FP8's range" in said and "--keep" in said
    assert not (tmp_path / "fp8").exists() and not list(tmp_path.glob(".*"))
