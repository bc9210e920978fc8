"""Small bundles, exported once for all workers of a run."""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import safe_open

from altered import alter
from garbage import pass_over_what_is_there
from pid_export.bundle import ExportOptions, export_bundle
from pid_export.calibrate import calibrate
from pid_export.calibration import Calibration
from pid_export.calibration_inputs import MADE_UP, synthetic_inputs
from pid_export.graphs import GraphExporter
from pid_ref import weights as random_weights
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.weights import RandomWeights
from pid_runtime.backends import onnxruntime
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.folder import read_manifest
from places import GOLDEN

EditBundle = Callable[[Callable[[dict[str, Any]], object]], Path]

SMALL_BUCKETS = (("tiny", 64), ("small", 1024))
"""Of the bundles here: up to 128 x 128 and 512 x 512 pixels."""


def pytest_configure() -> None:
    """Give torch one thread: on small tensors more of them only wait for each other.

    On a busy machine they wait long: a decode took a hundred times as long with two. And pytest
    listens to every logger that does not propagate, for which torch would write its traces down.
    """
    torch.set_num_threads(1)
    logging.getLogger("torch.__trace").propagate = True


def golden_config(name: str) -> PidConfig:
    """The network of a golden file, such as "flux_2k"."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        return PidConfig.from_upstream(json.loads(file.metadata()["config"]))


def export_golden(folder: Path, name: str, **options: Any) -> Path:
    """A bundle of a golden file's network and weights, in float32 unless the options say else."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        seed = int(file.metadata()["seed"])
    config = golden_config(name)
    weights = RandomWeights(state_shapes(config), seed)
    chosen = replace(ExportOptions(buckets=SMALL_BUCKETS), **options)
    bundle = folder / name
    export_bundle(bundle, config, weights, chosen, weights={"random_seed": seed})
    pass_over_what_is_there()
    return bundle


@pytest.fixture(scope="session")
def export_network() -> Callable[..., Path]:
    """`export_golden`."""
    return export_golden


@pytest.fixture(scope="session")
def network_of_golden() -> Callable[[str], PidConfig]:
    """`golden_config`."""
    return golden_config


class SharedTraces(dict[str, bytes]):
    """Traced stages in a folder, for all workers of a run: nothing of an earlier run is in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __contains__(self, key: object) -> bool:
        file = self._file(str(key))
        if not super().__contains__(key) and file.exists():
            super().__setitem__(str(key), file.read_bytes())
        return super().__contains__(key)

    def __setitem__(self, key: str, trace: bytes) -> None:
        super().__setitem__(key, trace)
        write_whole(self._file(key), trace)

    def _file(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="session", autouse=True)
def _traces_are_shared(shared_folder: Path) -> None:
    GraphExporter._traces = SharedTraces(shared_folder / "traces")


@pytest.fixture(scope="session", autouse=True)
def _onnx_runtime_has_one_thread() -> Iterator[None]:
    """A bundle is many sessions, and new threads of each spin: nine tenths of opening a small one.

    Tests that are about threads ask for them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "core_count", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _random_weights_are_kept() -> Iterator[None]:
    """The same few networks are made again and again: their tensors are drawn once."""
    draw = functools.lru_cache(maxsize=8192)(random_weights.random_tensor)

    def drawn(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        return draw(name, shape, seed).copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_weights, "random_tensor", drawn)
        yield


@pytest.fixture(scope="session")
def export_once(shared_folder: Path) -> Callable[..., Path]:
    """A function that exports flux_2k under a name unless another worker has; not to be changed."""

    def export(name: str, **options: Any) -> Path:
        folder = shared_folder / name
        with FileLock(shared_folder / f"{name}.lock"):
            if not (folder / "flux_2k").exists():
                export_golden(folder, "flux_2k", **options)
        return folder / "flux_2k"

    return export


@pytest.fixture(scope="session")
def golden_bundle(export_once: Callable[..., Path]) -> Path:
    """The network of golden file flux_2k: not to be changed (see `edit_bundle`)."""
    return export_once("golden_bundle")


@pytest.fixture(scope="session")
def chunked_bundle(export_once: Callable[..., Path]) -> Path:
    """The same as `golden_bundle`, but its per-token stages take at most 5 tokens at a time."""
    return export_once("chunked_bundle", chunk_tokens=5)


@pytest.fixture(scope="session")
def free_bundle(export_once: Callable[..., Path]) -> Path:
    """The same as `golden_bundle`, but for any timesteps."""
    return export_once("free_bundle", arbitrary_timesteps=True)


@pytest.fixture(scope="session")
def bf16_bundle(export_once: Callable[..., Path]) -> Path:
    """The same as `golden_bundle`, but in bfloat16, as engines are built from."""
    return export_once("bf16_bundle", precision="bf16")


@pytest.fixture(scope="session")
def calibration(golden_bundle: Path) -> Calibration:
    """How large the numbers of `golden_bundle` are."""
    return calibrate(
        golden_bundle, synthetic_inputs(read_manifest(golden_bundle)), described=MADE_UP
    )


@pytest.fixture(scope="session")
def fp8_bundle(export_once: Callable[..., Path], calibration: Calibration) -> Path:
    """The same as `golden_bundle`, but in fp8."""
    return export_once("fp8_bundle", precision="fp8", calibration=calibration)


@pytest.fixture(scope="session")
def fp8_twin(export_once: Callable[..., Path], calibration: Calibration) -> Path:
    """The same as `fp8_bundle`, with float32 where that has bfloat16."""
    return export_once("fp8_twin", precision="fp8-fp32", calibration=calibration)


@pytest.fixture(scope="session")
def spoilt_bundle(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`golden_bundle` whose third step of four gives NaN, by a number of the modulation table."""
    third = read_manifest(golden_bundle, verify=False).sampler.schedules["4"][2]

    def spoil(table: NDArray[np.float32]) -> None:
        table[third, 0, 1, 0] = np.nan

    return alter(golden_bundle, tmp_path_factory.mktemp("spoilt"), {"table.modulation": spoil})


@pytest.fixture
def edit_bundle(golden_bundle: Path, tmp_path: Path) -> EditBundle:
    """A function that copies `golden_bundle`, with its manifest as an edit leaves it."""

    def copy(edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
        bundle = tmp_path / "edited_bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(golden_bundle, bundle)
        manifest = bundle / "manifest.json"
        fields = json.loads(manifest.read_text())
        edit(fields)
        manifest.write_text(json.dumps(fields))
        return bundle

    return copy
