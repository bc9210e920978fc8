"""The ONNX Runtime backend: graphs through IoBinding, on the CPU or another provider."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pid_runtime.backends import scratch
from pid_runtime.backends.device import kernels_of
from pid_runtime.backends.dlpack import CPU, CUDA, RawTensor
from pid_runtime.backends.graphs import Call, PlannedCall, in_order
from pid_runtime.backends.memory import (
    HostMemory,
    Memory,
    all_finite,
    as_array,
    as_bytes,
    from_bytes,
    write_normal,
)
from pid_runtime.bundle.manifest import Bucket, Manifest
from pid_runtime.errors import PidRuntimeError, memory_shortage
from pid_runtime.noise import core_count

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
"""Short names of providers; any provider's full name does as well."""

ONNX_TYPES = {"float32": 1, "uint8": 2, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17}
"""Tensor element types as ONNX numbers them."""

PLUGINS = {"NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Modules of providers that come as packages of their own, by the provider's full name."""

_FOR_CPU = {"bf16": "fp32", "fp8": "fp8-fp32", "int8": "int8-fp32"}
"""Precisions in bf16, and what to take on the CPU instead."""

CONTRIB_PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Providers with ONNX Runtime's own operators, which `contrib_file` of a graph uses."""


class LoadedSessions:
    """A bundle's graphs in ONNX Runtime.

    All graphs share one scratch arena, so that thirty sessions cost no more memory than one. Each
    has its own threads, which sleep while it does not run: a thread pool for the whole process
    would make every other ONNX Runtime session in it fail.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        provider: str = "cpu",
        device_id: int = 0,
        threads: int | None = None,
    ) -> None:
        """provider: a short name in `PROVIDERS` or a full one. threads: CPU threads, all when None.

        Raises `PidRuntimeError` for a provider this ONNX Runtime lacks, or cannot run this bundle.
        """
        self.provider = find_provider(provider)
        self.manifest = manifest
        self.on_host = self.provider == PROVIDERS["cpu"]
        check_precision(self.provider, manifest.precision, "use --backend torch")
        self.sessions: dict[str, ort.InferenceSession] = {}
        self._bundle, self._device_id, self._threads = bundle, device_id, threads

    def load(self) -> None:
        for name, graph in self.manifest.graphs.items():
            file = graph.file
            if graph.contrib_file is not None and self.provider in CONTRIB_PROVIDERS:
                file = graph.contrib_file
            self.sessions[name] = open_session(
                self._bundle / file, self.provider, self._device_id, self._threads
            )

    def memory(self) -> "HostMemory | OrtMemory":
        return HostMemory() if self.on_host else OrtMemory("cuda", self._device_id)

    def graphs(self, memory: Memory) -> "OnnxRuntimeGraphs":
        return OnnxRuntimeGraphs(self.manifest, self.sessions, on_host=self.on_host)

    def close(self) -> None:
        self.sessions.clear()
        scratch.give_back()


class OnnxRuntimeGraphs:
    """Runs graphs through IoBinding, which any number of decoders may do in the same sessions."""

    whole_batches = True

    def __init__(
        self, manifest: Manifest, sessions: Mapping[str, ort.InferenceSession], *, on_host: bool
    ) -> None:
        """sessions: by graph. on_host: whether they run on the CPU."""
        self._manifest, self._sessions = manifest, sessions
        self.batches_gain = not on_host

    def bucket_for(self, tokens: int) -> Bucket:
        return self._manifest.bucket_for(tokens)[1]

    def prepare(self, calls: Iterable[PlannedCall], needed_bytes: int, batch: int) -> None:
        pass  # graphs run at any size

    def bind(self, graph: str, tensors: Mapping[str, RawTensor], scratch: RawTensor | None) -> Call:
        session, described = self._sessions[graph], self._manifest.graphs[graph]
        binding = session.io_binding()
        for names, bind in (
            (described.inputs, binding.bind_input),
            (described.outputs, binding.bind_output),
        ):
            for name in names:
                t = tensors[name]
                kind, ordinal = t.device
                device = "cpu" if kind == CPU else "cuda"
                bind(name, device, ordinal, ONNX_TYPES[t.dtype], t.shape, t.address)
        return lambda: session.run_with_iobinding(binding)

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        return in_order(calls)

    def close(self) -> None:
        scratch.give_back()  # and the sessions belong to the bundle


class OrtMemory:
    """A device's memory, which ONNX Runtime allocates and copies."""

    def __init__(self, device: str, device_id: int) -> None:
        """device: as ONNX Runtime calls it, "cuda" or "cpu"."""
        self._name = device
        self._device = (CPU if device == "cpu" else CUDA, device_id)
        self.blending = None if device == "cpu" else kernels_of(device_id)

    def allocate(self, size_bytes: int) -> RawTensor:
        memory = ort.OrtValue.ortvalue_from_shape_and_type(
            [size_bytes], np.uint8, self._name, self._device[1]
        )
        return RawTensor(memory.data_ptr(), "uint8", (size_bytes,), self._device, memory)

    def tensor(
        self, block: RawTensor, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> RawTensor:
        return block.part(offset_bytes, dtype, shape)

    def write(self, tensor: RawTensor, source: Any) -> None:
        if hasattr(source, "__dlpack_device__") and source.__dlpack_device__()[0] == CUDA:
            value = ort.OrtValue.from_dlpack(source)
            if value.element_type() == ONNX_TYPES[tensor.dtype]:
                given = RawTensor(
                    value.data_ptr(), tensor.dtype, tensor.shape, tensor.device, value
                )
                self.copy(given, tensor)
                return
            source = value.numpy()
        _bytes_of(tensor).update_inplace(as_bytes(as_array(source), tensor.dtype))

    def read(self, tensor: RawTensor) -> NDArray[Any]:
        return from_bytes(_bytes_of(tensor).numpy(), tensor.dtype).reshape(tensor.shape)

    def clone(self, tensor: RawTensor) -> RawTensor:
        target = self.tensor(self.allocate(tensor.size_bytes), 0, tensor.dtype, tensor.shape)
        self.copy(tensor, target)
        return target

    def copy(self, source: RawTensor, target: RawTensor) -> None:
        _bytes_of(target).update_inplace(_bytes_of(source))

    def fill_zero(self, tensor: RawTensor) -> None:
        self.write(tensor, np.zeros(tensor.shape, np.float32))

    def is_finite(self, tensor: RawTensor) -> bool:
        return all_finite(self.read(tensor))

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int, start: int = 0) -> None:
        if self.blending is None:
            write_normal(self, tensor, seed, draw, start)
        else:
            self.blending.fill_normal(tensor, seed, draw, start)

    def synchronize(self) -> None:
        pass  # ONNX Runtime waits for what it has run and copied


def check_precision(provider: str, precision: str, otherwise: str) -> None:
    """Raise `PidRuntimeError` for a precision that a provider has no kernels for."""
    if provider == PROVIDERS["cpu"] and precision in _FOR_CPU:
        raise PidRuntimeError(
            "ONNX Runtime's CPU provider has no bf16 kernels; export with --precision "
            f"{_FOR_CPU[precision]}, or {otherwise}"
        )


def open_session(
    path: Path, provider: str, device_id: int = 0, threads: int | None = None
) -> ort.InferenceSession:
    """A graph in ONNX Runtime, on a provider by its full name, in the shared scratch arena.

    Raises `PidRuntimeError` when the provider does not load, or not this graph.
    """
    on_host = provider == PROVIDERS["cpu"]
    options = ort.SessionOptions()
    # On the host every error is raised; a GPU's provider logs what it lacks, and is left out.
    options.log_severity_level = 4 if on_host else 3
    options.intra_op_num_threads = threads or core_count()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Products of rounded matrices are computed as written: it would make integers of 8-bit floats.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    scratch.use_shared_arena(options)
    providers: list[Any] | None = [provider]
    if provider in PLUGINS:
        options.add_provider_for_devices([_plugin_device(provider, device_id)], {})
        providers = None  # they are in the options
    elif not on_host:
        gpu = {"device_id": str(device_id)}
        kinds = dict.fromkeys((provider, PROVIDERS["cuda"]))
        providers = [*((kind, gpu) for kind in kinds), PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(path, options, providers, enable_fallback=0)
    except Exception as error:
        if memory_shortage(error) is not None:
            raise
        reason = str(error).splitlines()[0]
        raise PidRuntimeError(f"{provider} cannot load {path.name}: {reason}") from error
    loaded = session.get_providers()
    if providers and provider not in loaded:  # ONNX Runtime logs why, and goes on without
        raise PidRuntimeError(
            f"expected {provider} to run {path.name}, but ONNX Runtime took {', '.join(loaded)}; "
            "nvidia-smi should show a GPU and a driver as new as this ONNX Runtime's CUDA"
        )
    return session


def find_provider(name: str) -> str:
    """The full name of a provider this ONNX Runtime has. Raises `PidRuntimeError` otherwise."""
    full = PROVIDERS.get(name.lower(), name)
    available = ort.get_available_providers()
    if full in PLUGINS:
        _register_plugin(full)
    elif full not in available:
        fix = "GPU providers come with pip install 'pid-trt[cuda]', after uninstalling onnxruntime"
        if _packages() > 1:
            fix = (
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's "
                "files: pip uninstall onnxruntime onnxruntime-gpu, then install one"
            )
        raise PidRuntimeError(
            f"expected one of this ONNX Runtime's providers ({', '.join(available)}), "
            f"but got {name!r}; {fix}"
        )
    elif full == PROVIDERS["cuda"]:
        _load_cuda()
    return full


def is_installed(name: str) -> bool:
    """Whether a provider's files are there, which does not say that they load."""
    full = PROVIDERS.get(name.lower(), name)
    if full in PLUGINS:
        try:
            importlib.import_module(PLUGINS[full])
        except ImportError:
            return False
        return True
    return full in ort.get_available_providers()


def _packages() -> int:
    """How many of the packages that bring the module `onnxruntime` are installed."""
    return len(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))


@functools.cache
def _load_cuda() -> None:
    """Load CUDA's libraries and the provider's own, so that what is missing can be named.

    ONNX Runtime logs it in many lines, and goes on without a GPU. Raises `PidRuntimeError`.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints is raised below
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        library, _, reason = str(error).partition(":")
        fix = "pip install 'pid-trt[cuda]' brings CUDA and cuDNN"
        if library.startswith("libcuda.so"):
            fix = "install NVIDIA's driver"
        raise PidRuntimeError(
            f"expected {PROVIDERS['cuda']} to load, but {library}:{reason}; {fix}"
        ) from None


@functools.cache
def _register_plugin(provider: str) -> None:
    """Let ONNX Runtime load a provider from its own package; once in a process.

    Raises `PidRuntimeError` when that is not installed or does not load.
    """
    package = PLUGINS[provider].replace("_", "-")
    try:
        plugin: Any = importlib.import_module(PLUGINS[provider])
        ort.register_execution_provider_library(provider, plugin.get_library_path())
    except ImportError:
        raise PidRuntimeError(
            f"expected the package of {provider}, but it is not installed; "
            "pip install 'pid-trt[rtx-provider]'"
        ) from None
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no other class
        reason = str(error).partition("\n")[0]
        raise PidRuntimeError(
            f"expected {package} to load into ONNX Runtime {ort.__version__}, but got: {reason}"
        ) from None


def _plugin_device(provider: str, device_id: int) -> Any:
    """A GPU as a plug-in provider has it. Raises `PidRuntimeError` if it has no such GPU."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if device_id >= len(devices):
        raise PidRuntimeError(
            f"expected GPU {device_id} for {provider}, but it finds {len(devices)}; it needs an "
            "NVIDIA RTX GPU and its driver"
        )
    return devices[device_id]


def _bytes_of(tensor: RawTensor) -> ort.OrtValue:
    """A tensor's memory, as bytes: ONNX Runtime copies these between host and device."""
    flat = RawTensor(tensor.address, "uint8", (tensor.size_bytes,), tensor.device, tensor.owner)
    return ort.OrtValue.from_dlpack(flat)
