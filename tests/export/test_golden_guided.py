"""Undistilled decodes: the reference, the exported program and the commands, by golden files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pid_export.bundle import ExportOptions, export_bundle
from pid_export.errors import ExportInputError
from pid_export.golden_guided import (
    TOLERANCE,
    decode_error,
    export_guided,
    guided_reference_error,
    is_guided,
    read_guided,
)
from pid_export.verify import load_network
from pid_export.verify_cli import main as verify
from pid_ref.errors import PidInputError
from pid_ref.guided_sampler import sample_guided, shifted_times
from pid_ref.sampler import sample
from pid_runtime.backends.choice import HOST_BACKENDS
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.schedule import shifted_times as shifted_times_of_runtime
from places import GOLDEN

FILES = sorted((GOLDEN / "guided").glob("*.safetensors"))
SHORT = GOLDEN / "guided" / "flux_cfg4_1.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    done: dict[Path, Path] = {}

    def export(file: Path) -> Path:
        if file not in done:
            done[file] = tmp_path_factory.mktemp("guided") / "bundle"
            export_guided(read_guided(file), done[file])
        return done[file]

    return export


def test_there_are_files() -> None:
    assert len(FILES) == 4 and all(is_guided(file) for file in FILES)
    assert not is_guided(GOLDEN / "flux_2k.safetensors")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_reference_agrees(file: Path) -> None:
    assert guided_reference_error(read_guided(file)) <= TOLERANCE


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_programs_agree(exported: Callable[[Path], Path], file: Path, backend: str) -> None:
    with Decoder.open(exported(file), backend) as decoder:
        assert decode_error(read_guided(file), decoder) <= TOLERANCE


def test_the_decoder_and_the_reference_have_the_same_times() -> None:
    for steps, height, width in ((25, 2048, 2048), (3, 4096, 2176), (100, 64, 64)):
        assert shifted_times(steps, height, width) == pytest.approx(
            shifted_times_of_runtime(steps, height, width, 6.0, 2048), rel=1e-12
        )


def test_an_undistilled_bundle_wants_a_negative(exported: Callable[[Path], Path]) -> None:
    golden = read_guided(SHORT)
    latent, caption = golden.inputs["latent"], golden.inputs["caption"]
    with Decoder.open(exported(SHORT)) as decoder:
        sampler = decoder.manifest.sampler
        assert (sampler.steps, sampler.rule, sampler.guidance) == (25, "dpm++2m", 5.0)
        with pytest.raises(PidRuntimeError, match="a negative caption for guidance 5"):
            decoder.decode(latent, caption)
        calls: list[int] = []
        decoder.decode(latent, caption, guidance=1, steps=2, progress=lambda _, n: calls.append(n))
        assert calls == [2, 2]


def test_a_guided_step_of_one_branch_is_an_ode_step() -> None:
    """Both samplers, where they mean the same: one step to the clean image."""
    golden = read_guided(SHORT)
    net = load_network(golden.config, golden.weights)
    given: Any = {name: torch.from_numpy(array) for name, array in golden.inputs.items()}
    times = (0.9, 0.0)
    image = sample_guided(net, **given, guidance=1, times=times)
    given.pop("negative")
    plain = sample(net, **given, times=times, rule="ode")
    assert torch.allclose(image, plain, atol=1e-5)


def test_times_and_steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(PidInputError, match="at least 1 step, but got 0"):
        shifted_times(0, 64, 64)
    golden = read_guided(SHORT)
    net = load_network(golden.config, golden.weights)
    given: Any = {name: torch.from_numpy(array) for name, array in golden.inputs.items()}
    for times, message in (((1.0, 0.0), "below 1"), ((0.5, 0.6, 0.0), "descending")):
        with pytest.raises(PidInputError, match=message):
            sample_guided(net, **given, guidance=2, times=times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "expected 1, 2 or 4 steps, but got 3; only undistilled"),
        ({"steps": 0, "undistilled": True}, "from 1 to 100 steps, but got 0"),
        ({"steps": 101, "undistilled": True}, "from 1 to 100 steps, but got 101"),
    ],
)
def test_default_steps_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ExportInputError, match=message):
        ExportOptions(**options)


def test_pid_verify_takes_the_files(run_command: Any) -> None:
    code, out, err = run_command(verify, "--golden", SHORT, "--backend", "torch", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["files"]
    assert set(row["errors"]) == {"program", "reference"} and row["tolerance"] == TOLERANCE


def test_pid_verify_sees_another_file(tmp_path: Path, run_command: Any, refusal: Any) -> None:
    golden = read_guided(SHORT)
    tensors = load_file(SHORT)
    about = json.loads((SHORT.read_bytes()[8:]).split(b'"__metadata__":')[1].split(b"},")[0] + b"}")
    other = tmp_path / "other.safetensors"
    tensors["out/unclamped"] = golden.unclamped + np.float32(2e-3)
    save_file(tensors, other, about)
    code, out, _ = run_command(verify, "--golden", other, "--json")
    assert code == 1 and not json.loads(out)["files"][0]["passed"]
    save_file(tensors, other, {**about, "steps": "2"})
    assert "expected a golden file of guided decodes" in refusal(verify, "--golden", other)


def test_pid_verify_compares_a_whole_guided_decode(tmp_path: Path, run_command: Any) -> None:
    golden = read_guided(SHORT)
    bundle = tmp_path / "bundle"
    options = ExportOptions(buckets=(("tiny", 64),), undistilled=True, steps=30)
    export_bundle(
        bundle, golden.config, golden.weights, options, weights={"random_seed": golden.seed}
    )
    assert read_manifest(bundle).sampler.steps == 30
    code, out, err = run_command(verify, bundle, "--json")
    assert code == 0, err
    assert "whole decode" in [each["name"] for each in json.loads(out)["comparisons"]]
