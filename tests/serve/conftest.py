"""Bundles that enlarge pictures, and one that takes no guidance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bundles import SMALL_BUCKETS, golden_config
from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.registry import NANO
from pid_ref.weights import RandomWeights


def enlarging(shared_folder: Path, name: str, **options: Any) -> Path:
    """A bundle of the space nano, of a network whose stages are traced for other tests too."""
    nano = NANO.config
    small = replace(
        golden_config("flux_2k"),
        latent_channels=nano.latent_channels,
        latent_unpatchify=nano.latent_unpatchify,
        text_dim=nano.text_dim,
        text_max_length=nano.text_max_length,
        patch_depth=1,
    )
    bundle = shared_folder / "served" / name
    with FileLock(shared_folder / f"served-{name}.lock"):
        if not bundle.exists():
            export_bundle(
                bundle,
                small,
                RandomWeights(state_shapes(small), 3),
                ExportOptions(buckets=SMALL_BUCKETS, **options),
                checkpoint=replace(NANO, config=small),
                weights={"random_seed": 3},
            )
    return bundle


@pytest.fixture(scope="session")
def nano(shared_folder: Path) -> Path:
    """A bundle of nano's space."""
    return enlarging(shared_folder, "nano")


def asking_for_guidance(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle of any times, as of an undistilled checkpoint."""
    copy = folder / "undistilled"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"] |= {"captioned": True, "distilled": False}
    manifest["sampler"] |= {"rule": "dpm++2m", "guidance": 5, "steps": 2}
    manifest["sampler"]["flow_shift"] = {"shift": 6.0, "size": 2048}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture(scope="session")
def undistilled(free_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that asks for guidance."""
    return asking_for_guidance(free_bundle, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def undistilled_nano(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that enlarges pictures, too."""
    free = enlarging(shared_folder, "free", arbitrary_timesteps=True)
    return asking_for_guidance(free, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def distilled(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that takes no guidance."""
    bundle = tmp_path_factory.mktemp("bundle") / "distilled"
    shutil.copytree(golden_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"] |= {"name": "flux 2k", "distilled": True}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle
