"""The ONNX Runtime backend: graphs through IoBinding, on the CPU or another provider."""

import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pid_runtime.backends.dlpack import CPU, CUDA, RawTensor
from pid_runtime.backends.session import Call, as_array, from_bits, in_order, to_bits
from pid_runtime.bundle.manifest import Bucket, Manifest
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import core_count, standard_normal

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
"""Short names of providers; any provider's full name does as well."""

ONNX_TYPES = {"float32": 1, "uint8": 2, "float16": 10, "bfloat16": 16}
"""Tensor element types as ONNX numbers them."""

PLUGINS = {"NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Modules of providers that come as packages of their own, by the provider's full name."""

CONTRIB_PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Providers with ONNX Runtime's own operators, which `contrib_file` of a graph uses."""

ALIGNMENT = 4096


class OnnxRuntimeSession:
    """Runs a bundle's graphs in ONNX Runtime.

    All graphs share one scratch arena, so that thirty sessions cost no more memory than one. Each
    has its own threads, which sleep while it does not run: a thread pool for the whole process
    would make every other ONNX Runtime session in it fail.
    """

    whole_batches = True

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        provider: str = "cpu",
        device_id: int = 0,
        threads: int | None = None,
    ) -> None:
        """provider: a short name in `PROVIDERS` or a full one. threads: CPU threads, all when None.

        Raises `PidRuntimeError` for a provider this ONNX Runtime lacks, or a graph it cannot load.
        """
        self.provider = find_provider(provider)
        self._on_host = self.provider == PROVIDERS["cpu"]
        if self._on_host and manifest.precision == "bf16":
            raise PidRuntimeError(
                "ONNX Runtime's CPU provider has no bf16 kernels; export with --precision fp32, or "
                "use --backend torch"
            )
        self._device = (CPU, 0) if self._on_host else (CUDA, device_id)
        self._device_name = "cpu" if self._on_host else "cuda"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or core_count()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        _share_scratch()
        providers: list[Any] | None = [self.provider]
        if self.provider in PLUGINS:
            options.add_provider_for_devices([_plugin_device(self.provider, device_id)], {})
            providers = None  # they are in the options
        elif not self._on_host:
            gpu = {"device_id": str(device_id)}
            kinds = dict.fromkeys((self.provider, PROVIDERS["cuda"]))
            providers = [*((kind, gpu) for kind in kinds), PROVIDERS["cpu"]]
        self._manifest = manifest
        self._graphs: dict[str, ort.InferenceSession] = {}
        self._ports = {
            name: (tuple(g.inputs), tuple(g.outputs)) for name, g in manifest.graphs.items()
        }
        for name, graph in manifest.graphs.items():
            file = graph.file
            if graph.contrib_file is not None and self.provider in CONTRIB_PROVIDERS:
                file = graph.contrib_file
            try:
                self._graphs[name] = ort.InferenceSession(
                    bundle / file, options, providers, enable_fallback=0
                )
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise PidRuntimeError(f"{self.provider} cannot load {file}: {reason}") from error

    def bucket_for(self, tokens: int) -> Bucket:
        return self._manifest.bucket_for(tokens)[1]

    def prepare(
        self, calls: Iterable[tuple[str, Mapping[str, int]]], needed_bytes: int, batch: int
    ) -> None:
        pass  # graphs run at any size

    def allocate(self, size_bytes: int) -> RawTensor:
        if self._on_host:
            memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
            address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        else:
            memory = ort.OrtValue.ortvalue_from_shape_and_type(
                [size_bytes], np.uint8, self._device_name, self._device[1]
            )
            address = memory.data_ptr()
        return RawTensor(address, "uint8", (size_bytes,), self._device, memory)

    def tensor(
        self, block: RawTensor, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> RawTensor:
        return RawTensor(block.address + offset_bytes, dtype, shape, self._device, block.owner)

    def write(self, tensor: RawTensor, source: Any) -> None:
        if self._on_host:
            target = np.from_dlpack(tensor)
            np.copyto(_writable(target), as_array(source).reshape(target.shape))
            return
        if hasattr(source, "__dlpack_device__") and source.__dlpack_device__()[0] == CUDA:
            value = ort.OrtValue.from_dlpack(source)
            if value.element_type() == ONNX_TYPES[tensor.dtype]:
                given = RawTensor(
                    value.data_ptr(), tensor.dtype, tensor.shape, tensor.device, value
                )
                self.copy(given, tensor)
                return
            source = value.numpy()
        bits = to_bits(as_array(source), tensor.dtype)
        _bytes_of(tensor).update_inplace(bits.reshape(-1).view(np.uint8))

    def read(self, tensor: RawTensor) -> NDArray[Any]:
        if self._on_host:
            return np.from_dlpack(tensor).copy()
        return from_bits(_bytes_of(tensor).numpy(), tensor.dtype).reshape(tensor.shape)

    def clone(self, tensor: RawTensor) -> Any:
        if self._on_host:
            return self.read(tensor)
        target = self.tensor(self.allocate(tensor.size_bytes), 0, tensor.dtype, tensor.shape)
        self.copy(tensor, target)
        return target

    def copy(self, source: RawTensor, target: RawTensor) -> None:
        if self._on_host:
            np.copyto(_writable(np.from_dlpack(target)), np.from_dlpack(source))
        else:
            _bytes_of(target).update_inplace(_bytes_of(source))

    def fill_zero(self, tensor: RawTensor) -> None:
        self.write(tensor, np.zeros(tensor.shape, np.float32))

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int) -> None:
        count = int(np.prod(tensor.shape))
        if self._on_host:
            flat = _writable(np.from_dlpack(tensor)).reshape(-1)
            standard_normal(seed, draw, count, out=flat)
        else:
            self.write(tensor, standard_normal(seed, draw, count))

    def bind(self, graph: str, tensors: Mapping[str, RawTensor], scratch: RawTensor | None) -> Call:
        session = self._graphs[graph]
        binding = session.io_binding()
        inputs, outputs = self._ports[graph]
        for names, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name in names:
                t = tensors[name]
                bind(name, self._device_name, t.device[1], ONNX_TYPES[t.dtype], t.shape, t.address)
        return lambda: session.run_with_iobinding(binding)

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        return in_order(calls)

    def close(self) -> None:
        self._graphs.clear()


def find_provider(name: str) -> str:
    """The full name of a provider this ONNX Runtime has. Raises `PidRuntimeError` otherwise."""
    full = PROVIDERS.get(name.lower(), name)
    available = ort.get_available_providers()
    if full in PLUGINS:
        _register_plugin(full)
    elif full not in available:
        raise PidRuntimeError(
            f"expected one of this ONNX Runtime's providers ({', '.join(available)}), "
            f"but got {name!r}; "
            "GPU providers come with onnxruntime-gpu"
        )
    return full


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
            f"expected the package of {provider}, but it is not installed; pip install {package}"
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


@functools.cache
def _share_scratch() -> None:
    """Register one arena for the scratch memory of all sessions; once in a process."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory, writable: numpy marks what it imports through DLPack read-only."""
    if array.flags.writeable:
        return array
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("Memory", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)


def _bytes_of(tensor: RawTensor) -> ort.OrtValue:
    """A tensor's memory, as bytes: ONNX Runtime copies these between host and device."""
    flat = RawTensor(tensor.address, "uint8", (tensor.size_bytes,), tensor.device, tensor.owner)
    return ort.OrtValue.from_dlpack(flat)
