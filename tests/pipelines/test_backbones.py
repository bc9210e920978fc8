"""The table of generators."""

import inspect
from pathlib import Path

import diffusers
import pytest

from pid_pipelines.backbones import BACKBONES, check_space, find_backbone
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.vaes import VAES
from pid_ref.registry import SPACES
from pid_runtime.bundle.folder import read_manifest


def test_every_generator_of_a_space_is_in_the_table() -> None:
    named = {name for space in SPACES.values() for name in space.names} - {"nano"}
    assert named == BACKBONES.keys()
    assert all((each.space in VAES) == bool(each.pipeline) for each in BACKBONES.values())


@pytest.mark.parametrize("name", [name for name, each in BACKBONES.items() if each.pipeline])
def test_pipelines_take_the_arguments_of_the_table(name: str) -> None:
    backbone = find_backbone(name)
    assert 0 < backbone.steps <= 50 and (backbone.early or 1) < backbone.steps
    if not hasattr(diffusers, backbone.pipeline):
        assert name == "boogu-image"  # later than the diffusers of the tests
        return
    call = inspect.signature(getattr(diffusers, backbone.pipeline).__call__).parameters
    wanted = {backbone.prompt_argument, backbone.guidance_argument, *backbone.extra}
    assert wanted | {"num_inference_steps", "callback_on_step_end"} <= call.keys()


def test_what_is_no_generator_here() -> None:
    for name, message in (
        ("dinov2", "but got dinov2, whose latents .* make; give them to pid-decode"),
        ("flux9", r"a generator \(flux, .*boogu-image\), but got 'flux9'"),
    ):
        with pytest.raises(PipelineInputError, match=message):
            find_backbone(name)


def test_a_bundle_of_another_space(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    check_space(manifest, SPACES["flux"], "FluxPipeline")  # it names none, and has 16 channels
    with pytest.raises(PipelineInputError, match=r"of sdxl, .* but got one of 16 channels; export"):
        check_space(manifest, SPACES["sdxl"], "StableDiffusionXLPipeline")
    manifest.model["space"] = "flux"
    with pytest.raises(PipelineInputError, match="of sd3, whose latents X makes, but got one of f"):
        check_space(manifest, SPACES["sd3"], "X")
