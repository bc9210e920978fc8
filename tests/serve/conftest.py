"""A bundle that enlarges pictures."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nano(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`golden_bundle` with the codec of the space nano, whose latents have as many channels."""
    bundle = tmp_path_factory.mktemp("bundle") / "nano"
    shutil.copytree(golden_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["codec"] = {"kind": "block_dct", "std": [3.0, 0.5, 0.5, *[0.3] * 13]}
    manifest["model"]["captioned"] = False
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle
