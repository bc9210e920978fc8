"""The registry against the figures of the full-size state dicts and the published table."""

import json
import math
import subprocess
import sys

import pytest
from safetensors import safe_open

from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.registry import (
    CHECKPOINTS,
    NANO,
    REFUSED,
    SPACES,
    Checkpoint,
    find_checkpoint,
    find_space,
)
from places import GOLDEN

STATE_DICTS = json.loads((GOLDEN / "state_dicts.json").read_text())
AUX = "lq_proj.lq_aux_rgb_head."
RELEASED = {name: each for name, each in CHECKPOINTS.items() if each is not NANO}
"""NVIDIA's checkpoints, which the published table is of."""


def golden_name(checkpoint: Checkpoint) -> str:
    """The entry of state_dicts.json that a checkpoint's network must equal."""
    version = checkpoint.version.replace("v1.5", "v1pt5")
    if checkpoint.config.latent_channels == 16:
        spaces = "flux, sd3, qwenimage" if version == "v1" else "flux, qwenimage"
        return f"{version}_16ch ({spaces})"
    return f"{version}_{checkpoint.space.name}"


@pytest.mark.parametrize("checkpoint", RELEASED.values(), ids=lambda c: c.name)
def test_full_size_networks_have_the_published_tensors(checkpoint: Checkpoint) -> None:
    golden = STATE_DICTS[golden_name(checkpoint)]
    everything = {name: tuple(shape) for name, shape in golden["state_dict"].items()}
    aux = {name: shape for name, shape in everything.items() if name.startswith(AUX)}
    assert bool(aux) == (checkpoint.version == "v1.5")
    shapes = state_shapes(checkpoint.config)
    assert shapes == {name: shape for name, shape in everything.items() if name not in aux}
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == golden["parameters"] - sum(math.prod(shape) for shape in aux.values())


@pytest.mark.parametrize(
    ("file", "space", "variant"),
    [
        ("flux_2k", "flux", "2k"),
        ("flux2_2k", "flux2", "2k"),
        ("sdxl_2kto4k", "sdxl", "2kto4k"),
        ("dinov2_2k", "dinov2", "2k"),
        ("flux_v1pt5", "flux", "2kto4k"),
        ("flux2_v1pt5", "flux2", "2kto4k"),
    ],
)
def test_networks_have_the_published_behaviour(file: str, space: str, variant: str) -> None:
    """Fields that no shape shows, against the small published networks of the same kind."""
    path = GOLDEN / f"{file}.safetensors"
    with safe_open(str(path), framework="np") as golden:
        published = PidConfig.from_upstream(json.loads(golden.metadata()["config"]))
    config = find_checkpoint(space, variant).config
    for field in (
        "latent_channels", "latent_down", "scale", "latent_unpatchify", "latent_padding",
        "latent_interval", "latent_gate", "pixel_gate", "patch_size",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(published, field), field
    # The small v1.5 networks have a small reference too, so the released one is stated here.
    assert config.rope_reference == (1024 if config.version == "v1" else 2048)


def test_every_published_state_dict_is_used() -> None:
    assert {golden_name(checkpoint) for checkpoint in RELEASED.values()} == set(STATE_DICTS)


@pytest.mark.parametrize(
    ("space", "variant", "name"),
    [
        ("flux", "2k", "PiD_res2k_sr4x_official_flux_distill_4step"),
        ("zimage", "2k", "PiD_res2k_sr4x_official_flux_distill_4step"),
        ("zimage-turbo", "2kto4k", "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"),
        ("flux", "2kto4k-v1", "PiD_res2kto4k_sr4x_official_flux_distill_4step"),
        ("flux2", "2kto4k-v1", "PiD_res2kto4k_sr4x_official_flux2_distill_4step_2606"),
        ("flux2-klein-4b", "2k", "PiD_res2k_sr4x_official_flux2_distill_4step"),
        ("flux2-klein-9b", "2kto4k", "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step"),
        ("sd3", "2k", "PiD_res2k_sr4x_official_sd3_distill_4step"),
        ("sd3", "2kto4k", "PiD_res2kto4k_sr4x_official_sd3_distill_4step"),
        ("sd3", "2kto4k-v1", "PiD_res2kto4k_sr4x_official_sd3_distill_4step"),
        ("sdxl", "2kto4k", "PiD_res2kto4k_sr4x_official_sdxl_distill_4step"),
        ("sdxl", "2kto4k-v1", "PiD_res2kto4k_sr4x_official_sdxl_distill_4step"),
        ("qwenimage", "2kto4k", "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_distill_4step"),
        ("qwenimage-2512", "2kto4k-v1", "PiD_res2kto4k_sr4x_official_qwenimage_distill_4step"),
        (
            "qwenimage",
            "2kto4k-undistilled",
            "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_undistilled",
        ),
        ("dinov2", "2k", "PiD_res2k_sr4x_official_dinov2_distill_4step"),
        ("siglip", "2k", "PiD_res2k_sr8x_official_siglip_distill_4step"),
        ("siglip", None, "PiD_res2k_sr8x_official_siglip_distill_4step"),
        (
            "zimage",
            "2kto4k_v1pt5",
            "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step",
        ),
        (
            "flux",
            "PiD_res2kto4k_sr4x_official_flux_distill_4step",
            "PiD_res2kto4k_sr4x_official_flux_distill_4step",
        ),
        ("nano", "any", "nano_sr4x_4step"),
        ("nano", None, "nano_sr4x_4step"),
    ],
)  # fmt: skip
def test_find_checkpoint(space: str, variant: str | None, name: str) -> None:
    assert find_checkpoint(space, variant).name == name


@pytest.mark.parametrize(
    ("space", "variant", "words"),
    [
        ("flux3", "2k", ["flux3", "zimage-turbo", "siglip", "did you mean 'flux'?"]),
        ("Flux", "2k", ["did you mean 'flux'?"]),
        ("hunyuan", "2k", ["hunyuan", "choose one of these"]),
        ("flux", "4k", ["variant of flux", "2k, 2kto4k, 2kto4k-v1, 2kto4k-undistilled", "'4k'"]),
        ("flux", "2kto4kv1", ["did you mean '2kto4k'?"]),
        ("dinov2", "2kto4k", ["dinov2", "'2kto4k'", "use 2k"]),
        ("siglip", "2kto4k-v1", ["siglip", "use 2k"]),
        ("qwenimage-2512", "2k", ["qwenimage", "use 2kto4k or 2kto4k-undistilled"]),
        ("sd3", "2kto4k-undistilled", ["sd3", "use 2k or 2kto4k"]),
        ("sd3", None, ["variant of sd3 (2k, 2kto4k)", "but got none", "choose one"]),
        ("sd3", "2kto4k_v1pt5", ["sd3 was released in", "use 2k or 2kto4k"]),
        ("nano", "2k", ["nano was released in", "use any"]),
    ],
)
def test_find_checkpoint_says_what_exists(
    space: str, variant: str | None, words: list[str]
) -> None:
    with pytest.raises(PidInputError) as caught:
        find_checkpoint(space, variant)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_names_are_unambiguous() -> None:
    names = [name for space in SPACES.values() for name in space.names]
    assert len(names) == len(set(names)) == 14
    assert not set(CHECKPOINTS) & set(REFUSED)
    pairs = [(checkpoint.space.name, checkpoint.variant) for checkpoint in CHECKPOINTS.values()]
    assert len(pairs) == len(set(pairs)) == 17
    for space in SPACES.values():
        assert all(find_space(name) is space for name in space.names)


def test_names_agree_with_what_they_say() -> None:
    """A folder's name states its space, scale and version; the table must not contradict it."""
    for name, checkpoint in RELEASED.items():
        assert f"_official_{checkpoint.space.name}_" in name
        assert f"_sr{checkpoint.space.scale}x_" in name
        assert ("v1pt5" in name) == (checkpoint.version == "v1.5")
        assert ("_res2k_" in name) == (checkpoint.variant == "2k")
        assert ("undistilled" in name) == (not checkpoint.distilled)
        assert checkpoint.config.version == checkpoint.version


def test_superseded_files_are_looked_for_where_the_hub_moved_them() -> None:
    moved = {name for name, each in CHECKPOINTS.items() if each.deprecated}
    assert moved == {
        "PiD_res2kto4k_sr4x_official_flux_distill_4step",
        "PiD_res2kto4k_sr4x_official_flux2_distill_4step_2606",
        "PiD_res2kto4k_sr4x_official_qwenimage_distill_4step",
    }
    old = find_checkpoint("flux", "2kto4k-v1")
    assert old.hub_path == f"checkpoints_deprecated/{old.name}/model_ema_bf16.pth"
    new = find_checkpoint("flux", "2kto4k")
    assert new.hub_path == f"checkpoints/{new.name}/model_ema_bf16.pth"


def test_scalar_conventions_are_written_as_they_compute() -> None:
    for space in SPACES.values():
        if space.factor is not None and space.shift is not None and len(space.factor) == 1:
            value = eval(space.convention, {"z": 0.7})
            assert value == pytest.approx(space.factor[0] * (0.7 - space.shift[0]))


def test_registry_needs_no_torch() -> None:
    code = "import sys, pid_ref.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
