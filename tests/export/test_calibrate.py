"""Measuring on decodes: sizes, numbers that are cut off, and what rounding costs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pid_export.calibrate import (
    MOST_CLIPPED,
    calibrate,
    check_clipped,
    clipped_shares,
    decode_all,
    sensitivity,
)
from pid_export.calibration import ROUNDED_STAGES, Calibration
from pid_export.calibration_inputs import synthetic_inputs
from pid_export.errors import ExportInputError
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command.decode_jobs import Inputs
from pid_runtime.decoder import Bundle


@pytest.fixture
def inputs(golden_bundle: Path) -> list[Inputs]:
    return synthetic_inputs(read_manifest(golden_bundle))[:1]


def test_sizes_are_those_of_the_numbers(
    golden_bundle: Path, calibration: Calibration, inputs: list[Inputs]
) -> None:
    """What goes into attention is what the image's and the text's stages leave for it."""
    sizes = calibration.sizes
    for end in ("q", "k", "v"):
        left = [size for name, size in sizes.items() if name.endswith(f"enter.leave.{end}")]
        of_patches = [
            s
            for n, s in sizes.items()
            if n.endswith(f".enter.leave.{end}") and (n.startswith(("image", "text")))
        ]
        assert sizes[f"attention.ends.{end}"] == max(of_patches) <= max(left)
    assert sizes["pixel.0.s"] == sizes["update.s"] > 0
    part = calibrate(golden_bundle, inputs, described="one", percentile=95.0)
    assert part.count == 1 and part.sizes.keys() == sizes.keys()
    assert all(0 <= part.sizes[name] <= sizes[name] for name in sizes)
    assert sum(part.sizes.values()) < 0.8 * sum(sizes.values())


def test_nan_is_refused(golden_bundle: Path, spoilt_bundle: Path, inputs: list[Inputs]) -> None:
    with pytest.raises(ExportInputError, match="expected finite numbers to calibrate on"):
        calibrate(spoilt_bundle, inputs, described="spoilt")


def test_rounded_bundles_are_refused(fp8_twin: Path, inputs: list[Inputs]) -> None:
    with pytest.raises(ExportInputError, match="in fp32, fp16 or bf16, but got fp8-fp32"):
        calibrate(fp8_twin, inputs, described="rounded")


def test_few_numbers_are_beyond_the_scales(fp8_twin: Path, inputs: list[Inputs]) -> None:
    shares = clipped_shares(fp8_twin, inputs)
    assert {"image.1.leave.tokens", "image.0.enter.leave.q", "attention"} <= shares.keys()
    check_clipped(shares)


def test_too_many_beyond_the_scales_are_refused(
    export_network: Callable[..., Path],
    calibration: Calibration,
    inputs: list[Inputs],
    tmp_path: Path,
) -> None:
    name = "image.2.leave.hidden"
    small = {**calibration.sizes, name: calibration.sizes[name] / 16}
    bundle = export_network(
        tmp_path,
        "flux_2k",
        precision="fp8-fp32",
        calibration=replace(calibration, sizes=small),
    )
    shares = clipped_shares(bundle, inputs)
    assert shares[name] > MOST_CLIPPED
    with pytest.raises(ExportInputError, match=rf"0.1% of the numbers .* at {name}; calibrate"):
        check_clipped(shares)


def test_rounding_one_graph_costs_less_than_all(
    golden_bundle: Path, fp8_twin: Path, calibration: Calibration, inputs: list[Inputs]
) -> None:
    costs = sensitivity(golden_bundle, calibration, inputs)
    graphs = read_manifest(golden_bundle).graphs
    rounded = {name for name, graph in graphs.items() if graph.stage in ROUNDED_STAGES}
    assert {cost.graph for cost in costs} == rounded
    assert [cost.rms for cost in costs] == sorted((cost.rms for cost in costs), reverse=True)
    with Bundle.open(golden_bundle, "torch") as exact, Bundle.open(fp8_twin, "torch") as all_of_it:
        (want,), (got,) = (list(decode_all(bundle, inputs)) for bundle in (exact, all_of_it))
    total = float(np.sqrt(np.square(got - want, dtype=np.float64).mean()))
    assert 0 < costs[0].rms < 1.2 * total
    assert costs[0].psnr == pytest.approx(20 * np.log10(2 / costs[0].rms))
