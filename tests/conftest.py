"""Small bundles, exported once per session."""

import hashlib
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.engines import (
    Engine,
    EngineBucket,
    EngineSet,
    engine_folder,
    engine_key,
    with_engine_sets,
)
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest

GOLDEN = Path(__file__).parent / "golden"

SMALL_BUCKETS = (("tiny", 64), ("small", 1024))
"""Of the bundles here: up to 128 x 128 and 512 x 512 pixels."""

Main = Callable[[Sequence[str]], int]
RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
EditBundle = Callable[[Callable[[dict[str, Any]], object]], Path]
AddEngines = Callable[..., EngineSet]


def pytest_configure() -> None:
    """Give torch one thread: on small tensors more of them only wait for each other.

    On a busy machine they wait long: a decode took a hundred times as long with two.
    """
    torch.set_num_threads(1)


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
    return bundle


@pytest.fixture(scope="session")
def export_network() -> Callable[..., Path]:
    """`export_golden`."""
    return export_golden


@pytest.fixture(scope="session")
def network_of_golden() -> Callable[[str], PidConfig]:
    """`golden_config`."""
    return golden_config


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of golden file flux_2k: not to be changed (see `edit_bundle`)."""
    return export_golden(tmp_path_factory.mktemp("golden_bundle"), "flux_2k")


@pytest.fixture(scope="session")
def chunked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `golden_bundle`, but its per-token stages take at most 5 tokens at a time."""
    return export_golden(tmp_path_factory.mktemp("chunked_bundle"), "flux_2k", chunk_tokens=5)


@pytest.fixture(scope="session")
def free_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `golden_bundle`, but for any timesteps."""
    folder = tmp_path_factory.mktemp("free_bundle")
    return export_golden(folder, "flux_2k", arbitrary_timesteps=True)


@pytest.fixture(scope="session")
def bf16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `golden_bundle`, but in bfloat16, as engines are built from."""
    return export_golden(tmp_path_factory.mktemp("bf16_bundle"), "flux_2k", precision="bf16")


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


@pytest.fixture
def add_engines() -> AddEngines:
    """A function that adds a set of engines, which nothing built or can run, to a bundle.

    There is one per graph, but one per bucket of a graph without weights.
    """

    def add(
        bundle: Path,
        name: str,
        *,
        flavor: str = "rtx",
        version: str = "1.7.1.116",
        targets: tuple[str, ...] = ("sm86", "sm89"),
        scratch_bytes: int = 4096,
        peak_device_bytes: int = 1 << 20,
    ) -> EngineSet:
        manifest = read_manifest(bundle, verify=False)
        folder = engine_folder(bundle, name)
        folder.mkdir(parents=True)
        flags = {"opt_level": 3, "workspace_bytes": 0}
        graphs: dict[str, tuple[Engine, ...]] = {}
        for graph, described in manifest.graphs.items():
            engines: list[Engine] = []
            largest = [("", 4096)]
            if not described.weights_bytes:
                largest = [(f".{b}", bucket.max_tokens) for b, bucket in manifest.buckets.items()]
            for number, (suffix, tokens) in enumerate(largest):
                file = f"{graph}{suffix}.engine"
                blob = json.dumps({"graph": graph, "file": file}).encode()
                (folder / file).write_bytes(blob)
                profiles = (_profile(manifest, graph, tokens),)
                key = engine_key(
                    manifest,
                    graph,
                    flavor=flavor,
                    version=version,
                    targets=targets,
                    flags=flags,
                    profiles=profiles,
                    bf16_island=False,
                )
                engines.append(
                    Engine(
                        file=file,
                        bytes=len(blob),
                        sha256=hashlib.sha256(blob).hexdigest(),
                        key=key,
                        graph_sha256=manifest.files[described.file].sha256,
                        weights_sha256=described.weights_sha256,
                        profiles=profiles,
                        weights_bytes=described.weights_bytes,
                        scratch_bytes=(scratch_bytes * (number + 1),),
                        attentions=0,
                        attentions_fused=0,
                        bf16_island=False,
                        seconds=0.5,
                    )
                )
            graphs[graph] = tuple(engines)
        buckets: dict[str, EngineBucket] = {}
        for number, (bucket, plan) in enumerate(manifest.buckets.items()):
            room = -(-scratch_bytes * (number + 1) // 256) * 256
            buckets[bucket] = EngineBucket(
                max_tokens=plan.max_tokens,
                chunk_tokens=plan.chunk_tokens,
                arena_bytes=plan.arena_bytes + room,
                offsets=plan.offsets,
                scratch={
                    section: (plan.arena_bytes,) * len(instructions)
                    for section, instructions in manifest.program.items()
                },
                weights_bytes=0,
                buffers_bytes=plan.arena_bytes,
                scratch_bytes=room,
                peak_device_bytes=peak_device_bytes * (number + 1),
                attentions=0,
                attentions_fused=0,
            )
        engine_set = EngineSet(flavor, version, targets, flags, graphs, buckets)
        changed = with_engine_sets(manifest, {name: engine_set})
        (bundle / MANIFEST_FILE).write_text(changed.to_json())
        return engine_set

    return add


def _profile(manifest: Manifest, graph: str, tokens: int) -> dict[str, tuple[int, ...]]:
    """An optimisation profile for up to as many tokens, and all of the text."""
    ports = manifest.graphs[graph].inputs.values()
    symbols = {size for port in ports for size in port.shape if isinstance(size, str)} - {"B"}
    most = tokens + manifest.network["text_max_length"]
    return dict.fromkeys(sorted(symbols), (1, tokens, most))


@pytest.fixture(autouse=True)
def _undo_console() -> Iterator[None]:
    """Commands set up logging and signals for their whole process: undo that."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    root.handlers[:], root.level = handlers, level
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """A function that runs a command's `main` with arguments: exit code, stdout and stderr."""

    def run(main: Main, *arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else -1
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refusal(run_command: RunCommand) -> Refusal:
    """A function that runs a command, which must refuse its input, and gives the one line."""

    def run(main: Main, *arguments: object) -> str:
        code, out, err = run_command(main, *arguments, "--quiet")
        assert (code, out) == (2, ""), err
        assert err.startswith("pid-") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run
