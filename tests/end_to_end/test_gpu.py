"""On a user's GPU: engines are built for it, and decode as the reference does.

`make test-gpu` runs these. They need cuda-python and TensorRT or TensorRT for RTX.
"""

import importlib.util
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from parts import device_of, graphs_of
from pid_engines.cli import main
from pid_engines.flavors import BUILDERS, FIRST_WITH_BF16, architecture, gpu_target, library_version
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import standard_normal

pytestmark = pytest.mark.gpu

Floats = NDArray[np.float32]
NETWORK = "flux_2k_real_heads"
SHAPES = {"tiny": (2, 4), "small": (12, 5)}
"""Height and width of a latent, by the bucket it needs."""

ALLOWANCE = 1.1
"""How much further from float32 than the torch stages of the same precision images may be."""


@dataclass(frozen=True)
class Exported:
    """A bundle."""

    bundle: Path
    float32: Path
    """The same network in float32."""
    precision: str

    def inputs(self, bucket: str, batch: int = 1, seed: int = 3) -> dict[str, Any]:
        manifest = read_manifest(self.bundle, verify=False)
        random = np.random.default_rng(seed)
        channels, text = (manifest.network[key] for key in ("latent_channels", "text_dim"))
        return {
            "latent": random.standard_normal((batch, channels, *SHAPES[bucket]), np.float32),
            "caption": random.standard_normal((batch, 7, text), np.float32),
            "sigma": 0.2,
            "seed": seed,
        }


class Built(Exported):
    """A bundle with engines for this machine's GPU."""

    def open(self, **options: Any) -> Decoder:
        return Decoder.open(self.bundle, "tensorrt", **options)


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    export_network: Callable[..., Path],
) -> Exported:
    bundle = export_network(
        tmp_path_factory.mktemp(request.param), NETWORK, precision=request.param
    )
    float32 = export_network(tmp_path_factory.mktemp("float32"), NETWORK)
    return Exported(bundle, float32, request.param)


@pytest.fixture(scope="module")
def built(exported: Exported) -> Built:
    """Skips where no builder that is installed builds for this GPU; one that does must build."""
    target = gpu_target()
    installed = [FLAVORS[name] for name in BUILDERS if library_version(FLAVORS[name]) is not None]
    able = [flavor for flavor in installed if flavor.runs_on(target)]
    if not able:
        titles = " and ".join(flavor.title for flavor in installed) or "nothing"
        cures = " or ".join(each.install for each in FLAVORS.values() if each.runs_on(target))
        pytest.skip(f"{titles} installed, which builds no engines for {target}; {cures}")
    if exported.precision == "bf16" and architecture(target) < FIRST_WITH_BF16:
        pytest.skip(f"{target} has no bfloat16")
    command = [str(exported.bundle), "--flavor", able[0].name, "--target", "current"]
    assert main(command) == 0
    return Built(exported.bundle, exported.float32, exported.precision)


@pytest.fixture
def decoder(built: Built) -> Iterator[Decoder]:
    with built.open() as decoder:
        yield decoder


def error(image: Floats, expected: Floats) -> float:
    """Root of the mean square."""
    return math.sqrt(float(np.mean((image - expected) ** 2)))


@pytest.mark.parametrize("bucket", SHAPES)
def test_images_are_the_reference_s(built: Built, decoder: Decoder, bucket: str) -> None:
    inputs = built.inputs(bucket, batch=2)
    with Decoder.open(built.float32, "torch") as reference:
        expected = reference.decode(**inputs)
    with Decoder.open(built.bundle, "torch") as stages:
        allowed = ALLOWANCE * error(stages.decode(**inputs), expected)
    for _ in range(3):  # call by call, recorded, replayed
        image = decoder.decode(**inputs)
        assert np.isfinite(image).all()
        assert error(image, expected) <= allowed


@pytest.mark.parametrize("bucket", SHAPES)
def test_cuda_graphs_change_nothing(built: Built, bucket: str) -> None:
    first, second = built.inputs(bucket), built.inputs(bucket, seed=4)
    with built.open(cuda_graphs=False) as decoder:
        expected = [decoder.decode(**first), decoder.decode(**second)]
    with built.open() as decoder:
        for _ in range(3):
            images = [decoder.decode(**first), decoder.decode(**second)]
            assert all((a == b).all() for a, b in zip(images, expected, strict=True))
        assert graphs_of(decoder).cuda_graphs, "recording failed; the log says why"


def test_memory_is_as_planned(built: Built) -> None:
    manifest = read_manifest(built.bundle, verify=False)
    (engines,) = read_engine_sets(manifest).values()
    with built.open() as decoder:
        graphs = graphs_of(decoder)
        device = device_of(decoder)
        before = device.free_bytes()
        for bucket in SHAPES:
            plan = engines.buckets[bucket]
            for _ in range(2):
                decoder.decode(**built.inputs(bucket))
            assert graphs.scratch is None, "an engine needs more scratch than was planned"
            used = before - device.free_bytes()
            # Kernels' code, graphs and the driver's granularity are not in the plan.
            assert used <= plan.peak_device_bytes + (512 << 20)
        steady = device.free_bytes()
        for _ in range(3):
            decoder.decode(**built.inputs("small"))
        assert device.free_bytes() == steady


def test_noise_is_made_on_the_gpu(decoder: Decoder, built: Built) -> None:
    decoder.decode(**built.inputs("tiny"))
    device = device_of(decoder)
    tensor = device.tensor(device.allocate(4 * 100_001), 0, "float32", (100_001,))
    for seed, draw in ((0, 0), (2**64 - 1, 3)):
        device.fill_zero(tensor)
        device.fill_normal(tensor, seed, draw)
        expected = standard_normal(seed, draw, 100_001)
        np.testing.assert_allclose(device.read(tensor), expected, rtol=0, atol=1e-6)
    assert device.blending, "the driver refuses kernels.ptx"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA here")
def test_arrays_stay_on_the_device(built: Built, decoder: Decoder) -> None:
    inputs = built.inputs("small")
    expected = decoder.decode(**inputs)
    for kind in (torch.float32, torch.bfloat16):
        given: dict[str, Any] = dict(inputs)
        given["latent"] = torch.from_numpy(inputs["latent"]).to("cuda", kind)
        image = torch.from_dlpack(decoder.decode(**given, dlpack=True))
        assert image.is_cuda
        if kind == torch.float32:
            assert (image.cpu().numpy() == expected).all()
        assert torch.isfinite(image).all()


def test_decoders_run_in_threads(built: Built) -> None:
    inputs = [built.inputs("small", seed=seed) for seed in range(2)]
    with built.open() as decoder:
        expected = [decoder.decode(**each) for each in inputs]
    images: dict[int, Floats] = {}

    def work(number: int) -> None:
        with built.open() as own:
            for _ in range(5):
                images[number] = own.decode(**inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, image in images.items():
        assert (image == expected[number]).all()


def test_too_much_is_refused_before_it_starts(built: Built, decoder: Decoder) -> None:
    graphs = graphs_of(decoder)
    free = device_of(decoder).free_bytes()
    with pytest.raises(PidRuntimeError, match="GB of free device memory for this shape"):
        graphs.prepare([], free + 1, 1)
    decoder.decode(**built.inputs("tiny"))


@pytest.mark.parametrize("provider", ["cuda", "nvtensorrtrtx"])
def test_onnx_runtime_decodes_on_the_gpu(exported: Exported, provider: str) -> None:
    if provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    if provider != "cuda" and not importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx"):
        pytest.skip("onnxruntime-ep-nv-tensorrt-rtx is not installed")
    inputs = exported.inputs("small")
    with Decoder.open(exported.float32, "torch") as reference:
        expected = reference.decode(**inputs)
    with Decoder.open(exported.bundle, "torch") as stages:
        allowed = ALLOWANCE * error(stages.decode(**inputs), expected)
    with Decoder.open(exported.bundle, "onnxruntime", provider) as decoder:
        assert error(decoder.decode(**inputs), expected) <= allowed
