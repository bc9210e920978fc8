"""Calibration files, and what follows from them: scales, and rounded weights."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pid_export.bundle import ExportOptions
from pid_export.calibration import (
    Calibration,
    check_calibration,
    fold_rounded,
    read_calibration,
    rounded_of,
    scale_of,
)
from pid_export.errors import ExportInputError
from pid_export.program import ProgramSpec, build_program
from pid_ref.config import PidConfig
from pid_runtime.backends.rounding import FP8, LARGEST, RoundedLinear
from pid_runtime.bundle.folder import read_manifest


@given(st.floats(1e-20, 1e20))
def test_scales_are_the_least_power_of_two_that_holds_a_size(size: float) -> None:
    scale = scale_of(size)
    assert math.frexp(scale)[0] == 0.5
    assert size <= LARGEST * scale < 2 * size * (1 + 1e-12)


def test_the_scale_of_nothing_is_one() -> None:
    assert scale_of(0) == 1


def test_a_file_holds_it_all(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(calibration.to_json())
    assert read_calibration(path) == calibration


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda fields: fields.pop("sizes"), "no 'sizes'"),
        (lambda fields: fields.update(format="pid-bundle"), "its format is pid-bundle"),
        (lambda fields: fields.update(format_version=[2, 0]), r"its format is .* \[2, 0\]"),
        (lambda fields: fields["sizes"].update(a=-1), "negative"),
        (lambda fields: fields["sizes"].update(a="big"), "could not convert"),
    ],
)
def test_other_files_are_refused(
    calibration: Calibration, tmp_path: Path, edit: Callable[[Any], object], said: str
) -> None:
    path = tmp_path / "calibration.json"
    fields = json.loads(calibration.to_json())
    edit(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ExportInputError, match=f"that pid-calibrate wrote, but got .*: .*{said}"):
        read_calibration(path)
    path.write_text("[")
    with pytest.raises(ExportInputError, match="that pid-calibrate wrote"):
        read_calibration(path)


@pytest.fixture
def program(network_of_golden: Callable[[str], PidConfig]) -> ProgramSpec:
    return build_program(network_of_golden("flux_2k"), "bf16", 5)


def test_a_calibration_is_of_one_network(calibration: Calibration, program: ProgramSpec) -> None:
    check_calibration(calibration, calibration.model, calibration.weights)
    with pytest.raises(ExportInputError, match="weights random_seed 7, but got one of custom"):
        check_calibration(calibration, calibration.model, {"random_seed": 7})
    with pytest.raises(ExportInputError, match=r"of every graph, but got none of attention\.ends"):
        rounded_of(replace(calibration, sizes={}), program, ())


def test_what_is_kept_is_not_rounded(calibration: Calibration, program: ProgramSpec) -> None:
    everything = rounded_of(calibration, program, ())
    assert everything.kept == frozenset() and everything.told is not None
    assert set(everything.attentions) == {"attention", "pixel_attention"}
    some = rounded_of(calibration, program, ["attention", "update"])
    assert set(some.attentions) == {"pixel_attention"} and some.told is None
    with pytest.raises(ExportInputError, match=r"to keep of text\.0, .*, but got 'latent'"):
        rounded_of(calibration, program, ["latent"])


def test_buffers_and_stages_of_what_is_kept(
    calibration: Calibration,
    program: ProgramSpec,
    network_of_golden: Callable[[str], PidConfig],
) -> None:
    parts = rounded_of(calibration, program, ["attention", "image.1"])
    rounded = build_program(network_of_golden("flux_2k"), "fp8", 5, parts)
    dtypes = {name: buffer.dtype for name, buffer in rounded.buffers.items()}
    assert dtypes["q.0"] == dtypes["x.0"] == "bfloat16"
    assert dtypes["pixel_q.0"] == dtypes["s"] == "float8_e4m3fn"
    assert rounded.graphs["image.1"].options["first"] is False
    assert "rounding" not in rounded.graphs["image.1"].options
    assert rounded.graphs["image.2"].options["rounding"] == ["products"]
    assert "fp8_scales" not in rounded.graphs["attention"].options


def test_weights_are_rounded_by_output(calibration: Calibration) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 65) * torch.logspace(-3, 3, 65)
    linear = RoundedLinear(64, 65, torch.float32, FP8, bias=False)
    stage = nn.ModuleDict({"w": linear})
    found = fold_rounded("a", stage, {"w.weight": weight}, {}, calibration)
    linear.load_state_dict({name[2:]: value for name, value in found.items()}, assign=True)
    error = (linear(torch.eye(64)) - weight).abs()
    assert (error <= 2.0**-4 * weight.abs() + 2.0**-10 * linear.weight_scale).all()


def test_fp8_needs_a_calibration_and_nothing_else_takes_one(calibration: Calibration) -> None:
    with pytest.raises(ExportInputError, match="expected a calibration for fp8 alone"):
        ExportOptions("fp8")
    with pytest.raises(ExportInputError, match="expected a calibration for fp8"):
        ExportOptions(calibration=calibration)
    with pytest.raises(ExportInputError, match="expected a calibration for fp8"):
        ExportOptions(keep=("update",))


def test_a_bundle_says_what_it_was_calibrated_on(fp8_twin: Path) -> None:
    manifest = read_manifest(fp8_twin)
    assert manifest.format_version == (2, 0)
    assert manifest.model["rounding"]["inputs"] == "synthetic latents"
    calibration = read_calibration(fp8_twin / manifest.model["rounding"]["calibration"])
    assert manifest.buffers["v.1"].scale == calibration.scale("attention.ends.v")
