"""What a decode computes, against torch's own count of the stages."""

from pathlib import Path

import pytest

from pid_bench.pid_stages import program_works
from pid_export.bundle import config_of
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.sizes import sizes_of_request
from pid_runtime.work import section_flop


@pytest.mark.parametrize(("height", "width"), [(4, 6), (1, 1), (16, 3)])
def test_every_section_is_counted_as_torch_does(
    golden_bundle: Path, height: int, width: int
) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    config, scale = config_of(manifest.network), manifest.tokens_per_latent * 16
    works = program_works(config, height * scale, width * scale, 9, steps=1)
    sizes = sizes_of_request(
        manifest.network,
        manifest.tokens_per_latent,
        batch=1,
        latent_height=height,
        latent_width=width,
        text_tokens=9,
        rows=5,
    )
    for section in ("prologue", "step", "image"):
        wanted = sum(work.flop for work in works[section].values())
        assert section_flop(manifest, section, sizes) == wanted, section


def test_the_timestep_network_is_counted_too(free_bundle: Path) -> None:
    manifest = read_manifest(free_bundle, verify=False)
    d, depth = manifest.network["hidden_size"], manifest.network["patch_depth"]
    sizes = sizes_of_request(
        manifest.network,
        manifest.tokens_per_latent,
        batch=1,
        latent_height=1,
        latent_width=1,
        text_tokens=1,
        rows=1,
    )
    wanted = 2 * (256 * d + d * d + 12 * depth * d * d)
    assert section_flop(manifest, "timestep", sizes) == wanted
