"""ONNX Runtime's own copies, providers that are plug-ins, and contrib files: without a GPU."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pid_runtime.backends import onnxruntime as backend_onnxruntime
from pid_runtime.backends.onnxruntime import (
    CONTRIB_PROVIDERS,
    PROVIDERS,
    LoadedSessions,
    OrtMemory,
    find_provider,
)
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.folder import parse_manifest, read_constants, read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import PidRuntimeError

EditBundle = Callable[..., Path]
Floats = NDArray[np.float32]
CLOSE = 1e-4
CHANNELS, TEXT, DIM = 16, 12, 32


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class OnDevice(LoadedSessions):
    """Sessions that treat the host's memory as a GPU's: ONNX Runtime makes every copy."""

    def memory(self) -> OrtMemory:
        return OrtMemory("cpu", 0)


def loaded(
    bundle: Path, manifest: Manifest, provider: str = "cpu", kind: type[LoadedSessions] = OnDevice
) -> LoadedSessions:
    sessions = kind(bundle, manifest, provider)
    sessions.load()
    return sessions


def test_decodes_in_memory_only_onnx_runtime_copies(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle)
    inputs: dict[str, Any] = {"latent": normal(2, CHANNELS, 2, 3), "seed": 5}
    with Decoder.open(golden_bundle) as decoder:
        expected = decoder.decode(**inputs)
    constants = read_constants(golden_bundle, manifest)
    sessions = loaded(golden_bundle, manifest)
    bundle = Bundle(golden_bundle, manifest, sessions, constants)
    with bundle, bundle.decoder() as decoder:
        for _ in range(2):
            np.testing.assert_allclose(decoder.decode(**inputs), expected, rtol=0, atol=CLOSE)
        image = decoder.decode(**inputs, dlpack=True)
        np.testing.assert_allclose(np.from_dlpack(image), expected, rtol=0, atol=CLOSE)
        in_tiles: dict[str, Any] = {**inputs, "tile": (64, 64), "overlap": 0}
        assert decoder.memory.blending is None  # so the state lies on the host
        image = decoder.decode(**in_tiles)
    with Decoder.open(golden_bundle) as decoder:
        np.testing.assert_allclose(image, decoder.decode(**in_tiles), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_converted_to_the_tensors_dtype(dtype: str) -> None:
    memory = OrtMemory("cpu", 0)
    values = np.append(normal(1000) * 1e3, np.array([0, -0.0, np.inf, np.nan], np.float32))
    tensor = memory.tensor(memory.allocate(8192), 256, dtype, (2, 502))
    memory.write(tensor, values.reshape(2, 502))
    read = memory.read(tensor).astype(np.float32)
    want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(read.reshape(-1), want)
    memory.fill_zero(tensor)
    assert not memory.read(tensor).any()


def test_contrib_files_are_for_the_cpu_and_cuda(edit_bundle: EditBundle) -> None:
    bundle = edit_bundle()
    file = bundle / "image.1.contrib.onnx"
    shutil.copy(bundle / "image.1.onnx", file)
    fields = json.loads((bundle / MANIFEST_FILE).read_text())
    fields["graphs"]["image.1"]["contrib_file"] = file.name
    fields["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    manifest = parse_manifest(json.dumps(fields))
    assert manifest.graphs["image.1"].contrib_file == file.name
    assert parse_manifest(manifest.to_json()) == manifest
    assert '"contrib_file": null' not in manifest.to_json()
    loaded(bundle, manifest).close()
    file.write_bytes(b"no graph")
    with pytest.raises(PidRuntimeError, match=r"cannot load image\.1\.contrib\.onnx: "):
        loaded(bundle, manifest)
    assert set(CONTRIB_PROVIDERS) == {PROVIDERS["cpu"], PROVIDERS["cuda"]}


# providers on a GPU, where ONNX Runtime only logs what is missing


@pytest.fixture
def _with_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An ONNX Runtime with CUDA's provider, but without its libraries."""
    ort = backend_onnxruntime.ort
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS["cuda"]])
    monkeypatch.setattr(ort, "preload_dlls", lambda: sys.stdout.write("Failed to load"))
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    backend_onnxruntime._load_cuda.cache_clear()
    yield
    backend_onnxruntime._load_cuda.cache_clear()


@pytest.mark.usefixtures("_with_cuda")
def test_a_library_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        PidRuntimeError, match=r"providers_shared\.so: cannot open shared"
    ) as caught:
        find_provider("cuda")
    assert str(caught.value).endswith("; pip install 'pid-trt[cuda]' brings CUDA and cuDNN")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("_with_cuda")
def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(*_: object) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(backend_onnxruntime.ctypes, "CDLL", no_driver)
    with pytest.raises(PidRuntimeError, match=r"libcuda\.so\.1: .*; install NVIDIA's driver"):
        find_provider("cuda")


def test_a_provider_that_onnx_runtime_drops_is_told(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_onnxruntime, "find_provider", lambda name: PROVIDERS["cuda"])
    session = backend_onnxruntime.ort.InferenceSession

    def without_gpu(file: Path, options: Any, providers: Any, **_: Any) -> Any:
        assert providers[0] == (PROVIDERS["cuda"], {"device_id": "0"})
        return session(file, options, [PROVIDERS["cpu"]])

    monkeypatch.setattr(backend_onnxruntime.ort, "InferenceSession", without_gpu)
    with pytest.raises(PidRuntimeError, match=r"to run .*\.onnx, but ONNX Runtime took CPUExec"):
        loaded(golden_bundle, read_manifest(golden_bundle, verify=False), "cuda")


def test_two_packages_of_onnx_runtime_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PidRuntimeError, match=r"pip install 'pid-trt\[cuda\]', after uninstalling"):
        find_provider("cuda")
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    packages = backend_onnxruntime.importlib.metadata
    monkeypatch.setattr(packages, "packages_distributions", lambda: both)
    with pytest.raises(PidRuntimeError, match="are both installed and overwrite each other's"):
        find_provider("cuda")


# providers that are plug-ins


@pytest.fixture
def _unregistered() -> None:
    backend_onnxruntime._register_plugin.cache_clear()


@pytest.mark.usefixtures("_unregistered")
def test_a_plugin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(PidRuntimeError) as caught:
        find_provider("nvtensorrtrtx")
    assert str(caught.value) == (
        "expected the package of NvTensorRTRTXExecutionProvider, but it is not installed; "
        "pip install 'pid-trt[rtx-provider]'"
    )


@pytest.mark.usefixtures("_unregistered")
def test_a_plugin_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libnothing.so"
    plugin = SimpleNamespace(get_library_path=lambda: str(library))
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    with pytest.raises(PidRuntimeError, match=r"to load into ONNX Runtime .*libnothing") as caught:
        find_provider("NvTensorRTRTXExecutionProvider")
    assert "\n" not in str(caught.value)


def test_a_plugin_s_device_is_what_sessions_get(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's provider stands in for the plug-in: it too can be chosen by device."""
    name = PROVIDERS["nvtensorrtrtx"]
    registered: list[tuple[str, str]] = []
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    ort = backend_onnxruntime.ort
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *call: registered.append(call)
    )
    manifest = read_manifest(golden_bundle, verify=False)
    backend_onnxruntime._register_plugin.cache_clear()
    with pytest.raises(PidRuntimeError, match=f"expected GPU 0 for {name}, but it finds 0; it"):
        loaded(golden_bundle, manifest, "nvtensorrtrtx")
    assert registered == [(name, "plugin.so")]
    (cpu,) = [each for each in ort.get_ep_devices() if each.ep_name == PROVIDERS["cpu"]]
    monkeypatch.setattr(backend_onnxruntime, "_plugin_device", lambda provider, number: cpu)
    sessions = loaded(golden_bundle, manifest, "nvtensorrtrtx", LoadedSessions)
    memory: Any = sessions.memory()
    assert (memory._device, memory._name) == ((2, 0), "cuda")
    assert sessions.sessions["image.0"].get_providers() == [PROVIDERS["cpu"]]
    assert len(registered) == 1, "a library is registered once in a process"
    backend_onnxruntime._register_plugin.cache_clear()
