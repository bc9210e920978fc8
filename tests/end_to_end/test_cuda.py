"""On a GPU that torch has, without engines: a device's memory and noise, and the torch backend.

`make test-gpu` runs these.
"""

import gc
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pid_export import verify_cli
from pid_runtime.backends import device as cuda_device
from pid_runtime.backends.device import CudaDevice
from pid_runtime.backends.memory import HostMemory
from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.noise import standard_normal
from places import GOLDEN

pytestmark = pytest.mark.gpu

Floats = NDArray[np.float32]
CUDA = torch.device("cuda:0")
NETWORK = "flux_2k_real_heads"
ALLOWANCE = 1.25
"""How much further from float32 than on the CPU images may be, in the same precision."""


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(batch: int = 1, height: int = 4, width: int = 6, seed: int = 5) -> dict[str, Any]:
    return {
        "latent": normal(batch, 16, height, width, seed=1),
        "caption": normal(batch, 7, 32, seed=2),
        "sigma": 0.2,
        "seed": seed,
    }


def rms(a: Any, b: Any) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """Convolutions round to TF32 unless they are told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# The device


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    device.open()
    yield device
    device.close()


def test_the_device_is_torch_s(device: CudaDevice) -> None:
    properties = torch.cuda.get_device_properties(CUDA)
    assert device.name == properties.name
    assert device.target == f"sm{properties.major}{properties.minor}"
    assert 0 < device.free_bytes() <= properties.total_memory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_back(device: CudaDevice, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "STAGING_BYTES", 1000)  # several pieces
    values = normal(7, 333)
    tensor = device.tensor(device.allocate(1 << 20), 512, dtype, (7, 333))
    device.write(tensor, values)
    want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(device.read(tensor).astype(np.float32), want)
    other = device.clone(tensor)
    device.fill_zero(tensor)
    assert not device.read(tensor).any()
    device.copy(other, tensor)
    np.testing.assert_array_equal(device.read(tensor).astype(np.float32), want)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_arrays_pass_between_torch_and_the_device(device: CudaDevice, kind: torch.dtype) -> None:
    given = torch.randn(5, 41, device=CUDA).to(kind)
    tensor = device.tensor(device.allocate(4096), 0, "float32", (5, 41))
    device.write(tensor, given)
    seen = torch.from_dlpack(device.clone(tensor))
    assert seen.device == CUDA and torch.equal(seen, given.float())


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (2**64 - 1, 3)])
def test_noise_is_the_host_s(device: CudaDevice, seed: int, draw: int) -> None:
    count = 1_000_003
    tensor = device.tensor(device.allocate(4 * count), 0, "float32", (count,))
    device.fill_zero(tensor)
    device.fill_normal(tensor, seed, draw)
    assert device.blending, "the driver refuses kernels.ptx"
    expected = standard_normal(seed, draw, count)
    np.testing.assert_allclose(device.read(tensor), expected, rtol=0, atol=2e-6)


def test_tiles_are_blended_as_on_the_host(device: CudaDevice) -> None:
    """To the bit: `tests/runtime/backends/test_kernels.py` looks closer, at the kernels' source."""
    shapes = {"state": 11, "ring": 5, "before": 11, "noise": 4}
    found: list[list[Floats]] = []
    for memory in (HostMemory(), device):

        def new(seed: int, *shape: int, memory: Any = memory) -> Any:
            tensor = memory.tensor(memory.allocate(4 * math.prod(shape)), 0, "float32", shape)
            memory.write(tensor, normal(*shape, seed=seed))
            return tensor

        state, ring, before, noise = (
            new(seed, 2, rows, 9, 16, 16, 3) for seed, rows in enumerate(shapes.values())
        )
        tile, down, across = new(4, 2, 5, 6, 16, 16, 3), new(5, 5, 16), new(6, 6, 16)
        blending = memory.blending
        assert blending is not None, "the driver refuses kernels.ptx"
        blending.add(ring, tile, down, across, 4, 3)
        blending.take(state, tile, 6, 3)
        blending.mix(state, ring, before, noise, (0.3, 0.7, -0.2, 0.9), 3, 4)
        found.append([memory.read(each) for each in (state, ring, before, tile)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_captured_calls_run_when_replayed(device: CudaDevice) -> None:
    block = device.allocate(8192)
    source, target = (device.tensor(block, at, "float32", (64,)) for at in (0, 4096))
    device.write(source, normal(64))
    device.fill_zero(target)
    replay = device.capture([lambda: device.copy(source, target)])
    assert not device.read(target).any()
    for seed in (0, 1):
        device.write(source, normal(64, seed=seed))
        replay()
        np.testing.assert_array_equal(device.read(target), normal(64, seed=seed))


def test_memory_goes_back(device: CudaDevice) -> None:
    device.synchronize()
    before = device.free_bytes()
    block = device.allocate(256 << 20)
    assert before - device.free_bytes() >= 256 << 20
    del block
    assert device.free_bytes() == before
    with pytest.raises(MemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.allocate(1 << 50)


# The torch backend


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_golden_images(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = verify_cli.main(["--golden", str(golden), "--backend", "torch", "--device", "cuda"])
    assert code == 0, capsys.readouterr().out


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def bundle(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    export_network: Callable[..., Path],
) -> Path:
    return export_network(tmp_path_factory.mktemp(request.param), NETWORK, precision=request.param)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, export_network: Callable[..., Path]) -> Path:
    return export_network(tmp_path_factory.mktemp("float32"), NETWORK)


def test_every_stage_is_the_reference_s(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = verify_cli.main([str(bundle), "--backend", "torch", "--device", "cuda"])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 6), (2, 2, 9)])
def test_images_are_as_near_to_float32_as_the_cpu_s(
    bundle: Path, float32: Path, batch: int, height: int, width: int
) -> None:
    given = inputs(batch, height, width)
    with Decoder.open(float32, "torch") as exact, Decoder.open(bundle, "torch") as cpu:
        expected = exact.decode(**given)
        allowed = ALLOWANCE * rms(cpu.decode(**given), expected) + 1e-4
    with Decoder.open(bundle, "torch", "cuda") as decoder:
        image = decoder.decode(**given)
        assert np.isfinite(image).all()
        assert rms(image, expected) <= allowed
        np.testing.assert_array_equal(decoder.decode(**given), image)


def test_both_branches_of_guidance_run_as_one_batch(
    tmp_path: Path, export_network: Callable[..., Path]
) -> None:
    free = export_network(tmp_path / "free", NETWORK, arbitrary_timesteps=True)
    given = inputs(1, 4, 6)
    given |= {"times": (0.97, 0.5, 0.0), "guidance": 3.0, "negative": -given["caption"]}
    with Decoder.open(free, "torch") as cpu:
        expected = cpu.decode(**given)
    with Decoder.open(free, "torch", "cuda") as decoder:
        assert decoder.graphs.batches_gain
        assert rms(decoder.decode(**given), expected) <= 1e-3


def test_arrays_stay_on_the_device(bundle: Path) -> None:
    given = inputs()
    on_device = dict(given)
    for name in ("latent", "caption"):
        on_device[name] = torch.from_numpy(given[name]).to(CUDA)
    with Decoder.open(bundle, "torch", "cuda:0") as decoder:
        image = torch.from_dlpack(decoder.decode(**on_device, dlpack=True))
        assert image.device == CUDA
        np.testing.assert_array_equal(image.cpu().numpy(), decoder.decode(**given))


def test_decoders_of_a_bundle_run_side_by_side(bundle: Path) -> None:
    with Bundle.open(bundle, "torch", "cuda") as opened:
        with opened.decoder() as decoder:
            expected = [decoder.decode(**inputs(seed=seed)) for seed in range(4)]

        def decode(seed: int) -> list[Floats]:
            with opened.decoder() as decoder:
                return [decoder.decode(**inputs(seed=seed)) for _ in range(5)]

        with ThreadPoolExecutor(4) as threads:
            for images, want in zip(threads.map(decode, range(4)), expected, strict=True):
                for image in images:
                    np.testing.assert_array_equal(image, want)


def test_a_closed_bundle_leaves_no_memory(bundle: Path) -> None:
    with Decoder.open(bundle, "torch", "cuda") as decoder:
        decoder.decode(**inputs())
    del decoder
    gc.collect()
    before = torch.cuda.memory_allocated(CUDA)
    with Decoder.open(bundle, "torch", "cuda") as decoder:
        decoder.decode(**inputs())
        assert torch.cuda.memory_allocated(CUDA) > before
    del decoder
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) == before


def test_noise_of_the_torch_backend_is_made_on_the_gpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("noise was made on the host")

    monkeypatch.setattr("pid_runtime.backends.torch.standard_normal", refuse)
    monkeypatch.setattr("pid_runtime.backends.device.standard_normal", refuse)
    with Decoder.open(bundle, "torch", "cuda") as decoder:
        assert np.isfinite(decoder.decode(**inputs())).all()
