"""Engines of every form of the network in both precisions: minutes, so not in `make test`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pid_engines.cli import main
from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.weights import RandomWeights

pytest.importorskip(
    "tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'pid-trt[tensorrt-rtx]'"
)

FORMS = (
    "flux_2k",
    "flux_v1pt5",
    "flux_2k_real_heads",
    "flux2_2k",
    "flux2_v1pt5",
    "sdxl_2kto4k",
    "dinov2_2k",
    "siglip_2k_sr8",
)
"""Golden files whose networks differ in form; every released checkpoint has one of these."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_engines_build(
    form: str,
    precision: str,
    tmp_path: Path,
    run_command: Callable[..., tuple[int, str, str]],
    network_of_golden: Callable[[str], PidConfig],
) -> None:
    config = network_of_golden(form)
    bundle = tmp_path / "bundle"
    options = ExportOptions(precision=precision, buckets=(("large", 66_000),))
    weights = RandomWeights(state_shapes(config), 0)
    export_bundle(bundle, config, weights, options, weights={"random_seed": 0})
    code, out, err = run_command(main, bundle, "--target", "sm89", "--json", "--quiet")
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    count = config.patch_depth + config.pixel_depth
    assert result["attentions_fused"] == [count, count]
    islands = {stage["bf16_island"] for stage in result["stages"] if "attention" in stage["graph"]}
    assert islands == {precision == "fp16"}
