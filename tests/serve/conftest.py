"""A bundle that enlarges pictures, exported once for all workers of a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.registry import NANO
from pid_ref.weights import RandomWeights


@pytest.fixture(scope="session")
def nano(shared_folder: Path) -> Path:
    """Of random weights and fewer blocks, which are exported sooner."""
    path = shared_folder / "served" / "nano"
    with FileLock(shared_folder / "served.lock"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            config = replace(NANO.config, patch_depth=1, pixel_depth=1)
            weights = RandomWeights(state_shapes(config), 3)
            options = ExportOptions(precision="fp32", buckets=(("tiny", 64),))
            checkpoint = replace(NANO, config=config)
            source = {"random_seed": 3}
            export_bundle(path, config, weights, options, checkpoint=checkpoint, weights=source)
    return path
