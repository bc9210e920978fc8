"""Golden files: the reference, the exported program on both backends, and `pid-verify --golden`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pid_export.golden import (
    TOLERANCE,
    Golden,
    export_golden,
    program_error,
    read_golden,
    reference_error,
    tolerance_here,
)
from pid_export.verify_cli import main
from pid_runtime.backends.choice import HOST_BACKENDS
from pid_runtime.decoder import Decoder
from places import GOLDEN

FILES = sorted((GOLDEN).glob("*.safetensors"))
QUICK_OR_NOT = [
    pytest.param(file, marks=[pytest.mark.slow] if file.stem == "flux_2k_real_heads" else ())
    for file in FILES
]
"""Heads of the released size are traced for no other test."""
SMALLEST = next(file for file in FILES if file.stem == "flux_2k_steps1")

Arrays = dict[str, NDArray[np.float32]]
RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


@pytest.fixture(scope="module", params=QUICK_OR_NOT, ids=lambda file: file.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(request.param)


@pytest.fixture(scope="module")
def bundle(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / golden.path.stem
    export_golden(golden, folder)
    return folder


@pytest.fixture(scope="module")
def tolerance(golden: Golden) -> float:
    return tolerance_here(golden)


def edited(
    folder: Path,
    edit: Callable[[Arrays], object] = lambda arrays: None,
    **metadata: str | None,
) -> Path:
    """A copy of the smallest golden file, with other arrays or metadata (None takes it away)."""
    arrays = load_file(SMALLEST)
    with safe_open(SMALLEST, "np") as file:
        fields: dict[str, Any] = file.metadata() | metadata
    edit(arrays)
    copy = folder / "copy.safetensors"
    save_file(arrays, copy, {key: value for key, value in fields.items() if value is not None})
    return copy


def test_all_files_are_here() -> None:
    assert len(FILES) == 11


def test_the_tolerance_is_the_promised_one(tolerance: float) -> None:
    """Or what float32 takes on this processor."""
    assert TOLERANCE == 2e-4
    assert TOLERANCE <= tolerance < 5e-4


def test_the_reference_agrees(golden: Golden) -> None:
    assert reference_error(golden) <= TOLERANCE


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_the_program_agrees(golden: Golden, bundle: Path, tolerance: float, backend: str) -> None:
    with Decoder.open(bundle, backend) as decoder:
        assert program_error(golden, decoder) <= tolerance
        # again, in the memory the first decode left behind
        assert program_error(golden, decoder) <= tolerance


def test_every_step_counts(tmp_path: Path) -> None:
    """A difference in any one output is found, by reference and program."""
    file = next(file for file in FILES if file.stem == "flux_2k_steps2")
    for name in ("out/v0", "out/x1", "out/x2"):
        arrays = load_file(file)
        arrays[name][0, 1, 5, 7] += 0.5
        with safe_open(file, "np") as source:
            save_file(arrays, tmp_path / "off.safetensors", source.metadata())
        assert reference_error(read_golden(tmp_path / "off.safetensors")) == pytest.approx(
            0.5, 1e-3
        )


# pid-verify --golden


CAPTIONS = sorted((GOLDEN / "captions").glob("*.safetensors"))
ENCODER = GOLDEN / "captions" / "encoder"


def test_captions(run_command: RunCommand) -> None:
    code, out, _ = run_command(main, "--golden", *CAPTIONS, "--encoder", ENCODER, "--json")
    rows = json.loads(out)["files"]
    assert code == 0 and [row["file"] for row in rows] == list(map(str, CAPTIONS))
    assert all(row["passed"] is True and row["max_abs_error"] <= 1e-5 for row in rows)
    files = (SMALLEST, CAPTIONS[0])
    code, out, _ = run_command(main, "--golden", *files, "--encoder", ENCODER)
    assert code == 0 and out.splitlines()[-1] == "tolerance 1e-05 to 2e-04, float32, onnxruntime"


def test_captions_that_are_off_fail(run_command: RunCommand, tmp_path: Path) -> None:
    arrays = load_file(CAPTIONS[0])
    with safe_open(CAPTIONS[0], "np") as file:
        about = file.metadata()
    arrays["out/embedding"][2, 3, 4] += 3e-5
    save_file(arrays, tmp_path / "off.safetensors", about)
    arguments = ("--golden", tmp_path / "off.safetensors", "--encoder", ENCODER)
    code, out, _ = run_command(main, *arguments)
    assert code == 1 and out.startswith("FAIL")
    # On the processor that the files are of the others' errors are none at all.
    _, out, _ = run_command(main, *arguments, "--json")
    (row,) = json.loads(out)["files"]
    assert row["max_abs_error"] == pytest.approx(3e-5, abs=1e-5)


def test_captions_need_their_encoder(refusal: Refusal, tmp_path: Path) -> None:
    assert "expected --encoder for files of captions, but got none" in refusal(
        main, "--golden", CAPTIONS[0]
    )
    assert "for files of others; drop it" in refusal(
        main, "--golden", SMALLEST, "--encoder", ENCODER
    )
    assert "expected --encoder with --golden, but got a bundle" in refusal(
        main, tmp_path, "--encoder", ENCODER
    )
    save_file({"out/embedding": np.zeros((1, 3, 4), np.float32)}, tmp_path / "bare.safetensors")
    assert "expected a golden file of captions" in refusal(
        main, "--golden", tmp_path / "bare.safetensors", "--encoder", ENCODER
    )


LATENTS = GOLDEN / "latents" / "diffusers_latents.safetensors"


def test_latents(run_command: RunCommand) -> None:
    code, out, _ = run_command(main, "--golden", LATENTS, "--json")
    (row,) = json.loads(out)["files"]
    names = {name for name in load_file(LATENTS) if not name.endswith(("_output", "bn_mean"))}
    compared = {f"sdxl/trained_{kind}" for kind in ("latent", "sigma")} | {
        name for name in names if name.endswith(("/latent", "/vae_input", "/step_latent"))
    }
    assert code == 0 and row["errors"].keys() == compared and len(compared) == 17
    assert 0 < row["max_abs_error"] <= 1e-6
    code, out, _ = run_command(main, "--golden", LATENTS, SMALLEST)
    assert code == 0 and out.splitlines()[-1].startswith("tolerance 1e-06 to ")


def test_latents_that_are_off_fail(
    run_command: RunCommand, refusal: Refusal, tmp_path: Path
) -> None:
    with safe_open(LATENTS, "np") as file:
        about = file.metadata()
    path = tmp_path / "off.safetensors"
    for name in ("flux/pipeline_output", "sdxl/euler_latent", "sd3/vae_input", "flux2/bn_var"):
        arrays = load_file(LATENTS)
        arrays[name] = np.array(arrays[name])
        arrays[name].flat[5] += 1e-4
        save_file(arrays, path, about)
        code, out, _ = run_command(main, "--golden", path)
        assert code == 1 and out.startswith("FAIL"), name
    save_file(
        {**load_file(LATENTS), "flux/pipeline_output": np.zeros((2, 9, 9), "f4")}, path, about
    )
    code, out, _ = run_command(main, "--golden", path)
    assert code == 1 and out.startswith("FAIL inf")
    save_file({"flux/pipeline_output": np.zeros((2, 24, 64), "f4")}, path)
    assert "expected a golden file of latents" in refusal(main, "--golden", path)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_json_lists_every_file(run_command: RunCommand, backend: str) -> None:
    files = [file for file in FILES if file.stem.startswith("flux_2k_steps")]
    code, out, err = run_command(main, "--golden", *files, "--backend", backend, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    rows = json.loads(out)["files"]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        assert row["passed"] is True and 0 < row["max_abs_error"] <= TOLERANCE


def test_text_says_the_same(run_command: RunCommand) -> None:
    code, out, _ = run_command(main, "--golden", SMALLEST, "--backend", "torch")
    assert code == 0
    line, summary = out.splitlines()
    verdict, error, name = line.split()
    assert (verdict, name) == ("ok", str(SMALLEST)) and 0 < float(error) <= TOLERANCE
    assert summary == "tolerance 2e-04, float32, torch"


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_numbers_that_are_off_fail(run_command: RunCommand, tmp_path: Path, backend: str) -> None:
    def shift(arrays: Arrays) -> None:
        arrays["out/x1"][0, 2, 40, 3] += 1e-3

    off = edited(tmp_path, shift)
    code, out, _ = run_command(main, "--golden", SMALLEST, off, "--backend", backend, "--json")
    assert code == 1
    good, bad = json.loads(out)["files"]
    assert (good["passed"], bad["passed"]) == (True, False)
    assert 7e-4 < bad["max_abs_error"] < 13e-4


def test_a_velocity_that_is_off_fails_on_torch(run_command: RunCommand, tmp_path: Path) -> None:
    def shift(arrays: Arrays) -> None:
        arrays["out/v0"][0, 0, 0, 0] -= 1

    off = edited(tmp_path, shift)
    assert run_command(main, "--golden", off, "--backend", "torch")[0] == 1


def test_other_weights_fail(run_command: RunCommand, tmp_path: Path) -> None:
    code, out, _ = run_command(main, "--golden", edited(tmp_path, seed="12345"))
    assert code == 1 and out.startswith("FAIL ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(run_command: RunCommand, tmp_path: Path, value: float) -> None:
    def spoil(arrays: Arrays) -> None:
        arrays["out/x1"][0, 0, 63, 63] = value

    spoilt = edited(tmp_path, spoil)
    code, out, _ = run_command(main, "--golden", spoilt, "--json")
    (row,) = json.loads(out, parse_constant=lambda name: pytest.fail(name))["files"]
    assert code == 1 and row["passed"] is False and row["max_abs_error"] is None
    code, out, _ = run_command(main, "--golden", spoilt)
    assert code == 1 and out.split()[:2] == ["FAIL", "inf"]


def test_weights_of_nan_fail(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    from pid_ref import weights

    def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        values = real(name, shape, seed)
        if name == "final_layer.linear.bias":
            values[0] = math.nan
        return values

    real = weights.random_tensor
    monkeypatch.setattr(weights, "random_tensor", random_tensor)
    for backend in HOST_BACKENDS:
        code, out, _ = run_command(main, "--golden", SMALLEST, "--backend", backend)
        assert code == 1 and out.split()[:2] == ["FAIL", "inf"]


@pytest.mark.parametrize(
    ("edit", "metadata", "part"),
    [
        (lambda a: a.pop("in/caption"), {}, "in/caption"),
        (lambda a: a.pop("out/x1"), {}, "out/x1"),
        (lambda a: a.update({"out/x1": a["out/x1"][:, :, :32].copy()}), {}, "different shapes"),
        (lambda a: None, {"config": None}, "config"),
        (lambda a: None, {"config": "{}"}, "lq_latent_channels"),
        (lambda a: None, {"config": "[]"}, "expected a golden file"),
        (lambda a: None, {"config": "{"}, "expected a golden file"),
        (lambda a: None, {"seed": "x"}, "invalid literal"),
        (lambda a: None, {"steps": "3"}, "1, 2 or 4 steps"),
        (lambda a: None, {"steps": "2"}, "times"),
        (lambda a: None, {"t_list": "[0.5, 0.0]"}, "times"),
    ],
)
def test_files_that_are_no_golden_files(
    refusal: Refusal,
    tmp_path: Path,
    edit: Callable[[Arrays], object],
    metadata: dict[str, str | None],
    part: str,
) -> None:
    copy = edited(tmp_path, edit, **metadata)
    text = refusal(main, "--golden", SMALLEST, copy)  # nothing runs before all were read
    assert "expected a golden file" in text and part in text and str(copy) in text


def test_files_that_cannot_be_read(refusal: Refusal, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(SMALLEST.read_bytes()[:5000])
    for path in (cut, tmp_path / "none.safetensors", tmp_path):
        assert str(path) in refusal(main, "--golden", path)


def test_inputs_that_do_not_fit_the_network(refusal: Refusal, tmp_path: Path) -> None:
    def widen(arrays: Arrays) -> None:
        arrays["in/latent"] = np.zeros((1, 5, 2, 2), np.float32)

    def spoil(arrays: Arrays) -> None:
        arrays["in/latent"][0, 0, 0, 0] = math.nan

    assert "latent shape" in refusal(main, "--golden", edited(tmp_path, widen))
    assert "finite latent" in refusal(main, "--golden", edited(tmp_path, spoil))
