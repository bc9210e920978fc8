"""A bundle that enlarges pictures."""

import json
import shutil
from pathlib import Path

import pytest

CODEC = {"kind": "block_dct", "std": [3.0, 0.5, 0.5, *[0.3] * 13]}


@pytest.fixture(scope="session")
def undistilled(free_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that asks for guidance, and enlarges pictures as `nano` does."""
    bundle = tmp_path_factory.mktemp("bundle") / "undistilled"
    shutil.copytree(free_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["codec"] = CODEC
    manifest["sampler"] |= {"rule": "dpm++2m", "guidance": 5, "steps": 2}
    manifest["sampler"]["flow_shift"] = {"shift": 6.0, "size": 2048}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture(scope="session")
def distilled(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that takes no guidance."""
    bundle = tmp_path_factory.mktemp("bundle") / "distilled"
    shutil.copytree(golden_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"] |= {"name": "flux 2k", "distilled": True}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture(scope="session")
def nano(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`golden_bundle` with the codec of the space nano, whose latents have as many channels."""
    bundle = tmp_path_factory.mktemp("bundle") / "nano"
    shutil.copytree(golden_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["codec"] = CODEC
    manifest["model"]["captioned"] = False
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle
