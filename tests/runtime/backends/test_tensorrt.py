"""The TensorRT backend on a make-believe GPU, and the API names it uses in the real libraries.

The tests marked `gpu` build and run real engines.
"""

import ast
import gc
import importlib
import importlib.util
import inspect
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fakes.engines import add_engines
from fakes.gpu import (
    VERSION,
    FakeBuffer,
    FakeCache,
    FakeConfig,
    FakeContext,
    FakeEngine,
    FakeGraph,
    FakeGraphBuilder,
    FakeRtxConfig,
    FakeRtxContext,
    FakeRtxEngine,
    FakeStream,
    FakeStridedMemoryView,
    Gpu,
    OnDevice,
    fake_cuda,
    fake_tensorrt,
    install,
)
from parts import device_of, graphs_of
from pid_runtime.backends import device as cuda_device
from pid_runtime.backends import kernels as backend_kernels
from pid_runtime.backends import tensorrt as backend_tensorrt
from pid_runtime.backends.choice import choose_graphs
from pid_runtime.bundle.engines import (
    EngineBucket,
    engine_folder,
    read_engine_sets,
    with_engine_sets,
)
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, runs_of
from pid_runtime.command import decode_cli
from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import PidRuntimeError

EditBundle = Callable[..., Path]
RunCommand = Callable[..., tuple[int, str, str]]
Floats = NDArray[np.float32]

NAME = "rtx-set"
CHANNELS, TEXT, DIM = 16, 12, 32
CLOSE = 1e-4
"""Largest difference between batches and single images in torch: 2e-5 was seen."""


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


LATENT, CAPTION = normal(2, CHANNELS, 2, 3, seed=1), normal(2, TEXT, DIM, seed=2)
WIDE = normal(1, CHANNELS, 2, 4, seed=3)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def bundle(edit_bundle: EditBundle) -> Path:
    folder = edit_bundle()
    add_engines(folder, NAME)
    return folder


@pytest.fixture
def rtx(gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle on a machine with a GPU and TensorRT for RTX."""
    library = fake_tensorrt(gpu, bundle, FakeRtxEngine)
    install(monkeypatch, {**fake_cuda(gpu), "tensorrt_rtx": library})
    return bundle


@pytest.fixture
def expected(golden_bundle: Path) -> Iterator[Decoder]:
    """The same decoder on torch."""
    with Decoder.open(golden_bundle, "torch") as decoder:
        yield decoder


def open_decoder(bundle: Path, **options: Any) -> Decoder:
    return Decoder.open(bundle, "tensorrt", **options)


def decode(decoder: Decoder, **options: Any) -> Any:
    arguments: dict[str, Any] = {"latent": LATENT, "caption": CAPTION, "sigma": [0.0, 0.3]}
    arguments |= {"seed": 7, **options}
    return decoder.decode(**arguments)


# decodes


@pytest.mark.parametrize("takes_kernels", [True, False])
def test_images_are_those_of_the_stages(
    gpu: Gpu, rtx: Path, expected: Decoder, takes_kernels: bool
) -> None:
    gpu.takes_kernels = takes_kernels
    with open_decoder(rtx) as decoder:
        for _ in range(3):  # run, recorded, replayed
            np.testing.assert_allclose(decode(decoder), decode(expected), atol=CLOSE)
        ours = decode(decoder, output="uint8", steps=2, rule="ode")
        theirs = decode(expected, output="uint8", steps=2, rule="ode").astype(int)
        assert abs(ours - theirs).max() <= 1
        noise = {"noise": normal(2, 3, 64, 96), "step_noise": [normal(2, 3, 64, 96)] * 3}
        for _ in range(3):
            np.testing.assert_allclose(
                decode(decoder, **noise), decode(expected, **noise), atol=CLOSE
            )
        assert (gpu.count("pid_standard_normal") > 0) is takes_kernels
    assert not gpu.memory


def test_calls_are_one_image_each_and_lie_in_the_arena(gpu: Gpu, rtx: Path) -> None:
    bucket = read_engine_sets(read_manifest(rtx, verify=False))[NAME].buckets["tiny"]
    with open_decoder(rtx) as decoder:
        decode(decoder)
        block = decoder._block
        assert block is not None and block.size_bytes == 2 * bucket.arena_bytes
        for run in gpu.runs:
            assert all(shape[0] == 1 for name, shape in run.shapes.items() if name == "x")
            for address in run.addresses.values():
                assert block.address <= address < block.address + block.size_bytes
            assert run.scratch == block.address + 2 * bucket.scratch_offset("step", 0)
        first, second = [run for run in gpu.runs if run.graph == "unpatchify"]
        state = block.address + 2 * bucket.offsets["state"]
        image = block.address + 2 * bucket.offsets["image"]
        assert first.addresses == {"tokens": state, "image": image}
        size = 4 * 3 * 64 * 96
        assert second.addresses == {"tokens": state + size, "image": image + size}


def test_a_program_of_the_engines_own_is_run(
    gpu: Gpu,
    edit_bundle: EditBundle,
    chunked_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images are the bundle's, in less memory, one by one, recorded and replayed, or in tiles."""
    bundle = edit_bundle()
    engines = add_engines(bundle, NAME, is_lean=True)
    library = fake_tensorrt(gpu, bundle, FakeRtxEngine)
    install(monkeypatch, {**fake_cuda(gpu), "tensorrt_rtx": library})
    with open_decoder(bundle) as decoder, Decoder.open(chunked_bundle, "torch") as expected:
        for _ in range(3):
            np.testing.assert_allclose(decode(decoder), decode(expected), atol=CLOSE)
        assert decoder._block is not None
        assert decoder._block.size_bytes == 2 * engines.buckets["tiny"].arena_bytes
        updates = [run for run in gpu.runs if run.graph == "update"]
        again = [run for run in gpu.runs if run.graph == "pixel.1"]
        assert len(again) == 2 * len(updates)
        more = decoder.plan(64, 96).tflop / expected.plan(64, 96).tflop
        assert 1.01 < more < 1.5
        tiles = {"tile": (64, 64), "overlap": 0, "steps": 1}
        np.testing.assert_allclose(decode(decoder, **tiles), decode(expected, **tiles), atol=CLOSE)
    assert not gpu.memory


def test_every_instruction_has_its_own_place_for_scratch(
    gpu: Gpu, edit_bundle: EditBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = edit_bundle()
    engines = add_engines(bundle, NAME)
    manifest = read_manifest(bundle, verify=False)
    places: dict[int, str] = {}

    def spread(bucket: EngineBucket) -> EngineBucket:
        """The same with scratch of every instruction behind that of the one before."""
        begin = bucket.arena_bytes
        scratch: dict[str, tuple[int, ...]] = {}
        for section, instructions in manifest.program.items():
            count = len(instructions)
            scratch[section] = tuple(begin + i * bucket.scratch_bytes for i in range(count))
            for offset, each in zip(scratch[section], instructions, strict=True):
                places[offset] = "".join(run.graph for run in runs_of(each))
            begin += count * bucket.scratch_bytes
        return replace(bucket, scratch=scratch, arena_bytes=begin)

    tiny = spread(engines.buckets["tiny"])
    engines = replace(engines, buckets={**engines.buckets, "tiny": tiny})
    changed = with_engine_sets(manifest, {NAME: engines})
    (bundle / MANIFEST_FILE).write_text(changed.to_json())
    library = fake_tensorrt(gpu, bundle, FakeRtxEngine)
    install(monkeypatch, {**fake_cuda(gpu), "tensorrt_rtx": library})
    with open_decoder(bundle) as decoder:
        decode(decoder, noise=normal(2, 3, 64, 96))
        assert decoder._block is not None
        begin = decoder._block.address
    seen = {(places[(run.scratch - begin) // 2], run.graph) for run in gpu.runs}
    assert all(place == graph for place, graph in seen)
    assert {graph for _, graph in seen} == set(manifest.graphs) - {"unpatchify_bytes"}


def test_unplanned_scratch_gets_a_block_that_is_shared(
    gpu: Gpu, rtx: Path, expected: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    """A library may need more on the GPU at hand than it said where the engine was built."""
    more = {"image.1.engine": 9000, "attention.tiny.engine": 20000}
    gpu.more_scratch = more
    with caplog.at_level(logging.INFO), open_decoder(rtx) as decoder:
        for _ in range(4):
            np.testing.assert_allclose(decode(decoder), decode(expected), atol=CLOSE)
        block = graphs_of(decoder).scratch
        assert block is not None and block.size_bytes == 20000
        gpu.runs.clear()
        decode(decoder)
        for run in gpu.runs:
            assert (run.scratch == block.address) is (run.file in more)
        before = gpu.count("allocate")
        decode(decoder)
        assert gpu.count("allocate") == before
    notes = [message for message in caplog.messages if "gets a block of its own" in message]
    assert len(notes) == len(more)


def test_engines_are_loaded_once(gpu: Gpu, rtx: Path) -> None:
    manifest = read_manifest(rtx, verify=False)
    large = normal(1, CHANNELS, 6, 6)  # 144 tokens: the other bucket, and its attention
    with open_decoder(rtx) as decoder:
        for latent in (WIDE, large, WIDE):
            decode(decoder, latent=latent, caption=CAPTION[:1], sigma=0.0)
    loads = [event.split()[1] for event in gpu.events if event.startswith("load")]
    assert len(set(loads)) == len(loads), "an engine was loaded twice"
    with_weights = {name for name, graph in manifest.graphs.items() if graph.weights_bytes}
    assert {f"{name}.engine" for name in with_weights} <= set(loads)
    assert {"attention.tiny.engine", "attention.small.engine"} <= set(loads)


def test_steps_are_recorded_once_per_shape_and_replayed(gpu: Gpu, rtx: Path) -> None:
    with open_decoder(rtx) as decoder:
        images = [decode(decoder)]
        assert (gpu.count("capture"), gpu.count("launch")) == (0, 0)
        images.append(decode(decoder))
        recorded = gpu.count("capture")
        # prologue and step are cut in two by their noise, except where a draw comes last or first
        assert recorded == gpu.count("launch") >= 4 + 2
        gpu.runs.clear()
        images.append(decode(decoder))
        assert (gpu.count("capture"), gpu.count("launch")) == (recorded, 2 * recorded)
        assert gpu.runs and all(run.replayed for run in gpu.runs)
        assert (images[0] == images[1]).all() and (images[0] == images[2]).all()
        decode(decoder, latent=WIDE, caption=CAPTION[:1], sigma=0.0)
        assert gpu.count("capture") == recorded
        decode(decoder, latent=WIDE, caption=CAPTION[:1], sigma=0.0)
        assert gpu.count("capture") == 2 * recorded
    with open_decoder(rtx, cuda_graphs=False) as decoder:
        for _ in range(3):
            assert (decode(decoder) == images[0]).all()
    assert gpu.count("capture") == 2 * recorded


def test_tiles_and_branches_replay_one_recording(gpu: Gpu, rtx: Path, expected: Decoder) -> None:
    options: dict[str, Any] = {"latent": normal(2, CHANNELS, 2, 5, seed=4), "steps": 2}
    options |= {"tile": (96, 64), "overlap": 32}
    options |= {"negative": normal(1, TEXT, DIM, seed=5), "guidance": 2}
    with open_decoder(rtx) as decoder:
        image = decode(decoder, **options)
        np.testing.assert_allclose(image, decode(expected, **options), atol=10 * CLOSE)
        for _ in range(2):
            np.testing.assert_array_equal(decode(decoder, **options), image)
        recorded = gpu.count("capture")
        gpu.runs.clear()
        np.testing.assert_array_equal(decode(decoder, **options), image)
        # Two steps, each before and after its noise, and what of the prologue depends on the
        # latent, and on the caption.
        assert gpu.count("capture") == recorded == 2 * 2 + 2
        assert gpu.runs and all(run.replayed for run in gpu.runs)


def in_tiles() -> dict[str, Any]:
    """Inputs of a decode whose noise is given, so that no last digit of it differs."""
    shape = 2, 3, 64, 160
    return {
        "latent": normal(2, CHANNELS, 2, 5, seed=4),
        "tile": (96, 64),
        "overlap": 32,
        "noise": normal(*shape, seed=6),
        "step_noise": [normal(*shape, seed=7)] * 3,
    }


def test_the_state_of_tiles_lies_on_the_device(gpu: Gpu, rtx: Path) -> None:
    options = in_tiles()
    with open_decoder(rtx) as decoder:
        image = decode(decoder, **options)
        tiles = 2  # of each image
        assert gpu.count("pid_take_tile") == gpu.count("pid_add_tile") == 4 * tiles * 2
        assert gpu.count("pid_mix") >= 4 * 2
        states: list[Any] = []
        look = lambda done, calls: states.append(decoder.state())  # noqa: E731
        decode(decoder, **options, progress=look)
        assert np.abs(states[0]).max() > 1 and not np.array_equal(states[-2], states[-1])
        plan = decoder.plan(64, 160, batch=2, tile=(96, 64), overlap=32)
        assert plan.host_bytes == image.size
    assert not gpu.memory
    gpu.takes_kernels = False
    with open_decoder(rtx) as decoder:
        gpu.events.clear()
        np.testing.assert_array_equal(decode(decoder, **options), image)
        assert not gpu.count("pid_mix")
        on_host = decoder.plan(64, 160, batch=2, tile=(96, 64), overlap=32)
        moved = on_host.host_bytes - plan.host_bytes
        assert moved == plan.device_bytes - on_host.device_bytes == 2 * 4 * image.size


@pytest.mark.parametrize("whole", [True, False])
def test_progress_is_of_what_the_gpu_has_done(gpu: Gpu, rtx: Path, whole: bool) -> None:
    options = {} if whole else in_tiles()
    waited: list[int] = []
    with open_decoder(rtx) as decoder:
        decode(decoder, **options, progress=lambda *_: waited.append(gpu.count("sync")))
    assert len(waited) == (4 if whole else 8)
    assert len(set(waited)) == len(waited), "a call was reported before it was waited for"


def test_a_state_that_the_device_lacks_memory_for_lies_on_the_host(
    gpu: Gpu, rtx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = in_tiles()
    with open_decoder(rtx) as decoder:
        expected = decode(decoder, **options)
        gpu.free = 4 * expected.size - 1
        gpu.events.clear()
        with caplog.at_level(logging.INFO):
            np.testing.assert_array_equal(decode(decoder, **options), expected)
        assert "Keeping the state on the host: the device has too little (CUDA" in caplog.text
        assert not gpu.count("pid_mix")


def test_inputs_are_read_when_graphs_are_replayed(rtx: Path, expected: Decoder) -> None:
    with open_decoder(rtx) as decoder:
        for seed in range(4):
            other = {"latent": normal(2, CHANNELS, 2, 3, seed=seed), "seed": seed}
            np.testing.assert_allclose(
                decode(decoder, **other), decode(expected, **other), atol=CLOSE
            )


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [("captures", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: no"), ("capturable", "these engines")],
)
def test_what_cannot_be_recorded_runs_call_by_call(
    gpu: Gpu, rtx: Path, caplog: pytest.LogCaptureFixture, obstacle: str, reason: str
) -> None:
    setattr(gpu, obstacle, False)
    with caplog.at_level(logging.INFO), open_decoder(rtx) as decoder:
        images = [decode(decoder) for _ in range(3)]
    assert (images[0] == images[2]).all() and (images[0] == images[1]).all()
    assert gpu.count("launch") == 0
    notes = [r.getMessage() for r in caplog.records if "without CUDA graphs" in r.getMessage()]
    assert len(notes) == 1 and notes[0].startswith(f"Running without CUDA graphs: {reason}")


def test_a_graph_is_recorded_again_when_its_scratch_has_moved(gpu: Gpu, rtx: Path) -> None:
    gpu.more_scratch = {"attention.tiny.engine": 20000}
    with open_decoder(rtx) as decoder:
        images = [decode(decoder) for _ in range(2)]
        graphs, recorded = graphs_of(decoder), gpu.count("capture")
        graphs._contexts["attention.tiny.engine", 0].scratch_bytes = 1 << 16
        graphs._fit_scratch()
        images.append(decode(decoder))  # the fakes refuse to work in the old scratch
        assert gpu.count("capture") == 2 * recorded
        assert (images[0] == images[2]).all()


def test_a_steady_state_allocates_nothing(gpu: Gpu, rtx: Path) -> None:
    with open_decoder(rtx) as decoder:
        decode(decoder)
        before = gpu.count("allocate"), gpu.count("pin"), gpu.count("load")
        for _ in range(3):
            decode(decoder)
        decode(decoder, latent=WIDE, caption=CAPTION[:1], sigma=0.0)  # smaller: the same memory
        assert (gpu.count("allocate"), gpu.count("pin"), gpu.count("load")) == before
        assert before[:2] == (1, 1)  # arena; staging


def test_the_old_arena_is_given_back_before_the_new_one_is_asked_for(gpu: Gpu, rtx: Path) -> None:
    gc.disable()
    try:
        with open_decoder(rtx) as decoder:
            decode(decoder, latent=LATENT[:1], caption=CAPTION[:1], sigma=0.0)
            decode(decoder, latent=LATENT[:1], caption=CAPTION[:1], sigma=0.0)
            gpu.events.clear()
            decode(decoder)
            assert [e.split()[0] for e in gpu.events if e.split()[0] in ("allocate", "free")] == [
                "free",
                "allocate",
            ]
    finally:
        gc.enable()


def test_ranges_are_marked(gpu: Gpu, rtx: Path) -> None:
    with open_decoder(rtx) as decoder:
        decode(decoder)
    ranges = {event.removeprefix("range ") for event in gpu.events if event.startswith("range")}
    assert {"prologue", "step", "image", "attention", "image.0"} <= ranges


def test_the_set_chosen_is_logged(rtx: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), open_decoder(rtx):
        pass
    assert (
        f"Engines {NAME} by TensorRT for RTX {VERSION} on NVIDIA GeForce RTX 4090 (sm89)"
        in caplog.messages
    )


def test_pid_decode_runs_it(gpu: Gpu, rtx: Path, tmp_path: Path, run_command: RunCommand) -> None:
    from safetensors.numpy import save_file

    save_file({"latent": LATENT, "caption": CAPTION}, tmp_path / "latent.safetensors")
    arguments = [rtx, "--latent", tmp_path / "latent.safetensors", "--backend", "tensorrt"]
    images = tmp_path / "image.png"
    code, out, err = run_command(decode_cli.main, *arguments, "-o", images, "--json")
    assert code == 0, err
    assert f"Engines {NAME} by TensorRT for RTX" in err
    result = json.loads(out)
    assert (result["backend"], result["device"]) == ("tensorrt", "cuda:0")
    assert gpu.count("capture") > 0
    gpu.events.clear()
    code, _, err = run_command(
        decode_cli.main, *arguments, "-o", tmp_path / "again.png", "--no-cuda-graphs"
    )
    assert (code, gpu.count("capture")) == (0, 0), err
    for index in range(2):
        again = (tmp_path / f"again-{index}.png").read_bytes()
        assert again == (tmp_path / f"image-{index}.png").read_bytes()


# inputs and outputs


def test_arrays_on_the_device_are_copied_there(gpu: Gpu, rtx: Path, expected: Decoder) -> None:
    with open_decoder(rtx) as decoder:
        image = decode(decoder)
        assert (decode(decoder, latent=OnDevice(LATENT)) == image).all()
        device = device_of(decoder)
        tensor = device.tensor(device.allocate(4 * LATENT.size), 0, "float32", LATENT.shape)
        staging = device._staging.memory
        staging[:] = 0
        gpu.events.clear()
        device.write(tensor, OnDevice(LATENT))
        assert gpu.count("copy") == 1 and not staging.any()
        assert (device.read(tensor) == LATENT).all() and staging.any()
        half = OnDevice(LATENT.astype(np.float16))
        image = decode(decoder, latent=half)
        want = decode(expected, latent=LATENT.astype(np.float16))
        np.testing.assert_allclose(image, want, atol=CLOSE)


def test_arrays_on_the_device_must_be_contiguous(rtx: Path) -> None:
    strided = OnDevice(np.ascontiguousarray(LATENT.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2))
    with open_decoder(rtx) as decoder, pytest.raises(PidRuntimeError, match="make it contiguous"):
        decode(decoder, latent=strided)


def test_images_stay_on_the_device(rtx: Path) -> None:
    with open_decoder(rtx) as decoder:
        image = decode(decoder, dlpack=True)
        assert image.__dlpack_device__() == (2, 0)
        assert (image.dtype, image.shape) == ("float32", (2, 3, 64, 96))
        assert (device_of(decoder).read(image) == decode(decoder)).all()


def test_values_are_converted_to_the_tensors_dtype(rtx: Path) -> None:
    values = np.concatenate([normal(1000) * 1e3, np.array([0, -0.0, np.inf, np.nan, 1e-40, 3e38])])
    values = values.astype(np.float32)
    with open_decoder(rtx) as decoder:
        device = device_of(decoder)
        block = device.allocate(8192)
        for dtype in ("bfloat16", "float16", "float32"):
            tensor = device.tensor(block, 256, dtype, (2, 503))
            device.write(tensor, values.reshape(2, 503))
            want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
            read = device.read(tensor)
            np.testing.assert_array_equal(read.astype(np.float32).reshape(-1), want)
            assert read.dtype == ("float16" if dtype == "float16" else "float32")
        device.fill_zero(tensor)
        assert not device.read(tensor).any()


def test_large_arrays_pass_in_pieces(rtx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "STAGING_BYTES", 1000)
    with open_decoder(rtx) as decoder:
        device = device_of(decoder)
        tensor = device.tensor(device.allocate(10004), 0, "float32", (2501,))
        values = normal(2501)
        device.write(tensor, values)
        assert (device.read(tensor) == values).all()


# threads


def test_decoders_in_threads_share_nothing(gpu: Gpu, rtx: Path, expected: Decoder) -> None:
    images: dict[int, Floats] = {}
    streams: set[int] = set()
    arenas: set[int] = set()

    def work(seed: int) -> None:
        with open_decoder(rtx) as decoder:
            for _ in range(3):
                images[seed] = decode(decoder, seed=seed)
            streams.add(device_of(decoder).stream_handle)
            assert decoder._block is not None
            arenas.add(decoder._block.address)
            barrier.wait()

    barrier = threading.Barrier(2, timeout=60)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == len(arenas) == len(gpu.threads) == 2
    for seed, image in images.items():
        np.testing.assert_allclose(image, decode(expected, seed=seed), atol=CLOSE)


def test_decoders_of_a_bundle_share_engines(gpu: Gpu, rtx: Path, expected: Decoder) -> None:
    images: dict[int, Floats] = {}
    streams: set[int] = set()

    def work(seed: int) -> None:
        with bundle.decoder() as decoder:
            streams.add(device_of(decoder).stream_handle)
            for _ in range(3):
                images[seed] = decode(decoder, seed=seed)
            barrier.wait()

    barrier = threading.Barrier(2, timeout=60)
    with Bundle.open(rtx, "tensorrt") as bundle:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    loads = [event for event in gpu.events if event.startswith("load")]
    assert loads and len(set(loads)) == len(loads), "an engine was loaded twice"
    assert len(streams) == len(gpu.threads) == len(images) == 2
    for seed, image in images.items():
        np.testing.assert_allclose(image, decode(expected, seed=seed), atol=CLOSE)


def test_choosing_engines_opens_no_device(gpu: Gpu, rtx: Path) -> None:
    choose_graphs(rtx, read_manifest(rtx, verify=False), "tensorrt").close()
    assert not gpu.events and not gpu.current


def test_a_decoder_may_change_threads(gpu: Gpu, rtx: Path) -> None:
    images: list[Floats] = []
    with open_decoder(rtx) as decoder:
        images.append(decode(decoder))
        gpu.current.clear()  # of no other thread
        thread = threading.Thread(target=lambda: images.append(decode(decoder)))
        thread.start()
        thread.join()
        images.append(decode(decoder))
    assert len(images) == 3 and (images[0] == images[1]).all()


# flavours


def test_compiled_kernels_are_kept(gpu: Gpu, rtx: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = engine_folder(rtx, NAME) / "runtime-NVIDIA-GeForce-RTX-4090.cache"
    with open_decoder(rtx) as decoder:
        decode(decoder)
        assert not file.exists()
        shared = graphs_of(decoder)._shared._cache
        assert all(context.config.cache is shared for context in gpu.contexts)
        strategies = {c.config.dynamic_shapes_kernel_specialization_strategy for c in gpu.contexts}
        assert strategies == {"EAGER"}
    kept = file.read_bytes()
    assert b"image.0.engine" in kept
    gpu.contexts.clear()
    written = file.stat().st_mtime_ns
    with open_decoder(rtx, cuda_graphs=False) as decoder:
        decode(decoder)
        assert {c.config.dynamic_shapes_kernel_specialization_strategy for c in gpu.contexts} == {
            "LAZY"
        }
    assert file.stat().st_mtime_ns == written, "nothing was new"
    file.write_bytes(b"from another driver")
    with caplog.at_level(logging.INFO), open_decoder(rtx) as decoder:
        decode(decoder)
    assert "will be replaced" in caplog.text
    assert file.read_bytes() == kept
    assert sorted(path.name for path in file.parent.glob(".*")) == []


def test_a_bundle_that_cannot_be_written_still_decodes(
    rtx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with caplog.at_level(logging.INFO), open_decoder(rtx) as decoder:
        decode(decoder)
        monkeypatch.setattr(Path, "write_bytes", refuse)
    assert "Compiled kernels are not kept" in caplog.text


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_lean"])
def test_enterprise_engines_compile_nothing(
    gpu: Gpu,
    edit_bundle: EditBundle,
    expected: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    """The fakes of TensorRT have none of the names that only TensorRT for RTX has."""
    bundle = edit_bundle()
    add_engines(bundle, "trt", flavor="tensorrt", version=VERSION)
    library = fake_tensorrt(gpu, bundle, FakeEngine)
    absent = {"tensorrt": None, "tensorrt_lean": None}
    install(monkeypatch, {**fake_cuda(gpu), **absent, module: library})
    with open_decoder(bundle) as decoder:
        for _ in range(3):
            np.testing.assert_allclose(decode(decoder), decode(expected), atol=CLOSE)
    assert gpu.count("capture") > 0
    assert not list(engine_folder(bundle, "trt").glob("*.cache"))


# refusals


def refused(bundle: Path, **options: Any) -> str:
    with pytest.raises(PidRuntimeError) as caught:
        open_decoder(bundle, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bundle_without_engines(edit_bundle: EditBundle) -> None:
    bundle = edit_bundle()
    assert refused(bundle) == (
        f"expected engines in {bundle}, but it has none; export it again with --precision bf16, "
        f"and build them: pid-build {bundle} --target current"
    )
    bundle = edit_bundle(lambda manifest: manifest.update(precision="bf16"))
    assert f"it has none; build them: pid-build {bundle} --target current" in refused(bundle)


def test_the_backend_of_one_library_alone(rtx: Path, edit_bundle: EditBundle) -> None:
    with Decoder.open(rtx, "tensorrt-rtx") as decoder:
        assert (
            graphs_of(decoder)._shared.set.flavor == "tensorrt-rtx" and decoder.device == "cuda:0"
        )
    other = edit_bundle(lambda manifest: manifest.update(precision="bf16"))
    add_engines(other, "trt", flavor="tensorrt", version="11.1.0.106")
    with pytest.raises(PidRuntimeError) as caught:
        Decoder.open(other, "tensorrt-rtx")
    assert str(caught.value) == (
        f"expected engines of TensorRT for RTX in {other}, but it has trt; build them: "
        f"pid-build {other} --flavor tensorrt-rtx --target current"
    )


def test_no_tensorrt(rtx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"tensorrt_rtx": None})
    assert "TensorRT for RTX for this bundle's engines, but it is not installed" in refused(rtx)
    assert "pip install 'pid-trt[tensorrt-rtx]'" in refused(rtx)


def test_no_cuda_python(rtx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"cuda.core": None})
    assert "expected cuda-python for the tensorrt backend" in refused(rtx)


def test_no_gpu(gpu: Gpu, rtx: Path) -> None:
    gpu.has_driver = False
    assert "expected an NVIDIA GPU and its driver" in refused(rtx)


def test_an_old_driver(gpu: Gpu, rtx: Path) -> None:
    gpu.driver = 12040
    assert "for CUDA 13 or newer, but the one installed is for CUDA 12.4; update" in refused(rtx)


def test_other_devices(gpu: Gpu, rtx: Path) -> None:
    assert "expected one of this machine's 1 GPUs, but got cuda:1" in refused(rtx, device="cuda:1")
    for device in ("cpu", "cuda:", "cuda:-1", "0"):
        assert f"cuda or cuda:N for the tensorrt backend, but got {device!r}" in refused(
            rtx, device=device
        )


def test_engines_of_another_gpu(gpu: Gpu, rtx: Path) -> None:
    gpu.capability = (12, 0)
    message = refused(rtx)
    assert "tensorrt-rtx 1.7.1.116 on sm120, but rtx-set was built for sm86, sm89" in message
    assert message.endswith("--flavor tensorrt-rtx --target sm120")
    assert not gpu.events, "the GPU was used"


def test_engines_of_another_version(rtx: Path) -> None:
    sys.modules["tensorrt_rtx"].__version__ = "1.8.0.7"  # type: ignore[attr-defined]
    assert "was built by tensorrt-rtx 1.7.1.116, not 1.8.0.7" in refused(rtx)


def test_altered_engines(gpu: Gpu, rtx: Path) -> None:
    file = engine_folder(rtx, NAME) / "update.tiny.engine"
    if not file.exists():
        file = engine_folder(rtx, NAME) / "update.engine"
    file.write_bytes(file.read_bytes().replace(b"u", b"o", 1))
    assert f"{file} was altered" in refused(rtx)
    assert not gpu.events, "the GPU was used"


def test_engines_that_do_not_load(rtx: Path) -> None:
    file = engine_folder(rtx, NAME) / "image.1.engine"
    blob = file.read_bytes()
    file.write_bytes(b"broken".ljust(len(blob)))
    with open_decoder(rtx, verify=False) as decoder, pytest.raises(PidRuntimeError) as caught:
        decode(decoder)
    message = str(caught.value)
    assert f"{file} to load on NVIDIA GeForce RTX 4090, but" in message
    assert "TensorRT for RTX says: [engine] is broken; build it again: pid-build" in message


def test_engines_by_name(rtx: Path) -> None:
    with open_decoder(rtx, engines=NAME):
        pass
    assert f"expected engines of {rtx} ({NAME}), but got 'other'" in refused(rtx, engines="other")
    with pytest.raises(PidRuntimeError, match="the tensorrt backend to run engines"):
        Decoder.open(rtx, "torch", engines=NAME)


def test_too_little_memory_for_a_shape(gpu: Gpu, rtx: Path) -> None:
    """Peaks are set by `add_engines`: 1 MiB for tiny, 2 MiB for small."""
    manifest = read_manifest(rtx, verify=False)
    weights = sum(graph.weights_bytes for graph in manifest.graphs.values())
    needed = weights + read_engine_sets(manifest)[NAME].buckets["small"].arena_bytes
    gpu.free = needed - 1
    large = {"latent": normal(1, CHANNELS, 6, 6), "caption": CAPTION[:1], "sigma": 0.0}
    with open_decoder(rtx) as decoder:
        with pytest.raises(PidRuntimeError) as caught:
            decode(decoder, **large)
        message = str(caught.value)
        assert f"expected {needed / 1e9:.2f} GB of free device memory for this shape" in message
        assert f"but got {(needed - 1) / 1e9:.2f} GB; decode at most 0.262 megapixels" in message
        assert gpu.count("allocate") == gpu.count("load") == 0
        gpu.free = 1_500_000
        with pytest.raises(PidRuntimeError, match=r"at most 0.0164 megapixels: bucket tiny"):
            decode(decoder, **large)
        with pytest.raises(PidRuntimeError, match=r"decode one image at a time, at most 0\.0164"):
            decode(decoder)
        gpu.free = 1_000_000
        with pytest.raises(PidRuntimeError, match="; free memory on the GPU"):
            decode(decoder)
        gpu.free = needed
        assert decode(decoder, **large).shape == (1, 3, 192, 192)
        gpu.free = 0
        assert decode(decoder, **large).shape == (1, 3, 192, 192)  # it needs no more


def test_memory_that_runs_out_all_the_same(gpu: Gpu, rtx: Path) -> None:
    gpu.more_scratch = {"attention.tiny.engine": 1 << 31}
    with open_decoder(rtx) as decoder:
        with pytest.raises(PidRuntimeError, match=r"for the engines' scratch, but got CUDA_ERROR"):
            decode(decoder)
        gpu.more_scratch.clear()


def test_a_bucket_that_was_not_built(rtx: Path) -> None:
    large = {"latent": normal(1, CHANNELS, 6, 6), "caption": CAPTION[:1], "sigma": 0.0}
    with open_decoder(rtx) as decoder:
        del graphs_of(decoder)._set.buckets["small"]
        with pytest.raises(PidRuntimeError, match=r"at most 0.0164 megapixels, .* got 0.0369"):
            decode(decoder, **large)
        del graphs_of(decoder)._set.buckets["tiny"]
        with pytest.raises(PidRuntimeError, match="at most 0 megapixels"):
            decode(decoder)


def test_a_size_no_engine_takes(rtx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_decoder(rtx) as decoder:
        (attention, *_) = graphs_of(decoder)._set.graphs["attention"]
        graphs_of(decoder)._set.graphs["attention"] = (attention,)
        with pytest.raises(PidRuntimeError, match="engine of graph 'attention' for Q=156, S=156"):
            decode(decoder, latent=normal(1, CHANNELS, 6, 6), caption=CAPTION[:1], sigma=0.0)


# names in the real libraries

CUDA_SOURCES = (Path(cuda_device.__file__), Path(backend_kernels.__file__))

CUDA_NAMES = {
    "_core": "cuda.core",
    "_driver": "cuda.bindings.driver",
    "driver": "cuda.bindings.driver",
    "bindings": "cuda.bindings",
    "_stream": "cuda.core:Stream",
    "_staging": "cuda.core:Buffer",
    "staging": "cuda.core:Buffer",
    "part": "cuda.core:Buffer",
    "_memory()": "cuda.core:Buffer",
    "_view()": "cuda.core:Buffer",
    "builder": "cuda.core:graph.GraphBuilder",
    "graph": "cuda.core:graph.Graph",
    "view": "cuda.core:utils.StridedMemoryView",
    "code": "cuda.core:ObjectCode",
    "LegacyPinnedMemoryResource()": "cuda.core:LegacyPinnedMemoryResource",
}
"""What is behind a name, or a call's result, in `cuda_device`."""

TRT_NAMES = {
    "_trt": "",
    "trt": "",
    "_runtime": ":Runtime",
    "loaded": ":ICudaEngine",
    "execution": ":IExecutionContext",
    "config": ":IRuntimeConfig",
    "_cache": ":IRuntimeCache",
    "kinds": ":DynamicShapesKernelSpecializationStrategy",
    "strategy": ":ExecutionContextAllocationStrategy",
}
"""The same in `backend_tensorrt`, without the module."""

RTX_ONLY = {
    "create_runtime_cache",
    "set_runtime_cache",
    "dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy",
    "is_stream_capturable",
}


def find(where: str) -> Any:
    """An object by "module:path.in.it"."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def unknown_names(source: str, objects: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names that a source uses of these objects: all, and those that they do not have.

    objects: by the last name of an expression, or with () of the function called. Keywords of calls
    are looked for as well, where the function tells its own.
    """
    used: set[str] = set()
    unknown: set[str] = set()

    def resolve(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            return objects.get(f"{name}()")
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name in objects:
            return objects[name]
        if isinstance(node, ast.Attribute) and (owner := resolve(node.value)) is not None:
            used.add(node.attr)
            if hasattr(owner, node.attr):
                return getattr(owner, node.attr)
            unknown.add(node.attr)
        return None

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            resolve(node)
        if isinstance(node, ast.Call):
            function = resolve(node.func)
            try:
                accepted = inspect.signature(function).parameters
            except (TypeError, ValueError):
                continue
            if not any(each.kind == each.VAR_KEYWORD for each in accepted.values()):
                unknown |= {word.arg for word in node.keywords if word.arg} - set(accepted)
    return used, unknown


def require(module: str) -> Any:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    return importlib.import_module(module)


def test_cuda_names_exist() -> None:
    require("cuda.core")
    require("cuda.bindings.driver")
    objects = {name: find(where) for name, where in CUDA_NAMES.items()}
    objects["_device"] = find("cuda.core:Device")
    used: set[str] = set()
    for source in CUDA_SOURCES:
        here, unknown = unknown_names(source.read_text(), objects)
        assert not unknown
        used |= here
    assert used >= {
        "cuMemAlloc", "cuMemFree", "cuMemGetInfo", "cuInit", "cuDriverGetVersion", "CUDA_SUCCESS",
        "cuDeviceGetCount", "set_current", "create_stream", "handle", "sync", "copy_to", "fill",
        "from_handle", "create_graph_builder", "begin_building", "end_building", "complete",
        "launch", "from_dlpack", "get_kernel", "from_ptx", "LaunchConfig",
    }  # fmt: skip


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt", "tensorrt_lean"])
def test_tensorrt_names_exist(module: str) -> None:
    library = require(module)
    is_rtx = module == "tensorrt_rtx"
    objects: dict[str, Any] = {}
    for name, where in TRT_NAMES.items():
        try:
            objects[name] = find(module + where)
        except AttributeError:
            assert not is_rtx and name in ("_cache", "kinds"), f"{module} has no {where}"
    used, unknown = unknown_names(Path(backend_tensorrt.__file__).read_text(), objects)
    assert unknown == (set() if is_rtx else RTX_ONLY)
    assert used >= {
        "deserialize_cuda_engine", "create_execution_context", "create_runtime_config",
        "set_execution_context_allocation_strategy", "USER_MANAGED", "set_device_memory",
        "get_device_memory_size_for_profile_v2", "set_optimization_profile_async",
        "set_input_shape", "set_tensor_address", "execute_async_v3", "engine_host_code_allowed",
        "ILogger", "INTERNAL_ERROR", *RTX_ONLY,
    }  # fmt: skip
    assert isinstance(library.__version__, str)


def test_the_search_for_names_finds_wrong_ones() -> None:
    class Buffer:
        def copy_to(self, dst: object, *, stream: object) -> None: ...

    module = ModuleType("core")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    objects = {"_core": module, "part": Buffer, "view()": Buffer}
    good = "self._core.Buffer.copy_to(part.copy_to(x, stream=1), self.view(3).copy_to)"
    assert unknown_names(good, objects) == ({"Buffer", "copy_to"}, set())
    for bad in ("core._core.Buffer.copy", "part.copy", "a.view(1).copy", "part.copy_to(1, copy=2)"):
        assert unknown_names(bad, objects)[1] == {"copy"}


FAKES = {
    FakeStream: "cuda.core:Stream",
    FakeGraphBuilder: "cuda.core:graph.GraphBuilder",
    FakeGraph: "cuda.core:graph.Graph",
    FakeBuffer: "cuda.core:Buffer",
    FakeStridedMemoryView: "cuda.core:utils.StridedMemoryView",
    FakeRtxContext: "tensorrt_rtx:IExecutionContext",
    FakeContext: "tensorrt_lean:IExecutionContext",
    FakeRtxConfig: "tensorrt_rtx:IRuntimeConfig",
    FakeConfig: "tensorrt_lean:IRuntimeConfig",
    FakeCache: "tensorrt_rtx:IRuntimeCache",
    FakeEngine: "tensorrt_lean:ICudaEngine",
}
OWN = {"enqueue", "holds", "context_class", "config_class"}
"""Names the fakes have for themselves."""


@pytest.mark.parametrize("fake", FAKES)
def test_fakes_have_only_names_of_the_real_classes(fake: type[Any]) -> None:
    require(FAKES[fake].partition(":")[0])
    real = find(FAKES[fake])
    names = {name for base in fake.__mro__[:-1] for name in vars(base) if name[0] != "_"} - OWN
    assert names and not {name for name in names if not hasattr(real, name)}


def test_fakes_have_the_driver_s_names(gpu: Gpu) -> None:
    driver = require("cuda.bindings.driver")
    core = require("cuda.core")
    fakes = fake_cuda(gpu)
    assert not [name for name in vars(fakes["cuda.core"]) if not hasattr(core, name)]
    fake = fakes["cuda.bindings.driver"]
    assert not [name for name in vars(fake) if not hasattr(driver, name)]
    results = [name for name in vars(fake.CUresult) if name[0] != "_"]
    assert results and not [name for name in results if not hasattr(driver.CUresult, name)]


def test_a_machine_without_a_gpu_is_told_so(bundle: Path) -> None:
    """With the real libraries, where they are installed and there is no GPU."""
    require("cuda.core")
    driver = require("cuda.bindings.driver")
    require("tensorrt_rtx")
    try:
        (error,) = driver.cuInit(0)
    except RuntimeError:
        error = driver.CUresult.CUDA_ERROR_NO_DEVICE
    if error == driver.CUresult.CUDA_SUCCESS:
        pytest.skip("there is a GPU")
    assert "expected an NVIDIA GPU and its driver for the tensorrt backend" in refused(bundle)
