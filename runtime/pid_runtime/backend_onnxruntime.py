"""The ONNX Runtime backend: graphs through IoBinding, on the CPU or another provider."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pid_runtime.dlpack import CPU, CUDA, RawTensor
from pid_runtime.errors import PidRuntimeError
from pid_runtime.manifest import Manifest
from pid_runtime.noise import core_count, standard_normal
from pid_runtime.session import as_array

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
"""Short names of providers; any provider's full name does as well."""

ONNX_TYPES = {"float32": 1, "uint8": 2, "float16": 10, "bfloat16": 16}
"""Tensor element types as ONNX numbers them."""

ALIGNMENT = 4096


class OnnxRuntimeSession:
    """Runs a bundle's graphs in ONNX Runtime.

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

        Raises `PidRuntimeError` for a provider this ONNX Runtime lacks, or a graph it cannot load.
        """
        self.provider = find_provider(provider)
        on_cpu = self.provider == PROVIDERS["cpu"]
        if on_cpu and manifest.precision == "bf16":
            raise PidRuntimeError(
                "ONNX Runtime's CPU provider has no bf16 kernels; export with --precision fp32, or "
                "use --backend torch"
            )
        self._device = (CPU, 0) if on_cpu else (CUDA, device_id)
        self._device_name = "cpu" if on_cpu else "cuda"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or core_count()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        _share_scratch()
        providers: list[Any] = [self.provider]
        if not on_cpu:
            providers = [(self.provider, {"device_id": str(device_id)}), PROVIDERS["cpu"]]
        self._graphs: dict[str, ort.InferenceSession] = {}
        self._ports = {
            name: (tuple(g.inputs), tuple(g.outputs)) for name, g in manifest.graphs.items()
        }
        for name, graph in manifest.graphs.items():
            try:
                self._graphs[name] = ort.InferenceSession(bundle / graph.file, options, providers)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise PidRuntimeError(
                    f"{self.provider} cannot load {graph.file}: {reason}"
                ) from error

    def allocate(self, size_bytes: int) -> RawTensor:
        if self._device[0] == CPU:
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
        if self._device[0] == CPU:
            target = np.from_dlpack(tensor)
            np.copyto(_writable(target), as_array(source).reshape(target.shape))
            return
        if not hasattr(source, "__dlpack__") or isinstance(source, np.ndarray):
            source = np.ascontiguousarray(source, dtype=tensor.dtype).reshape(tensor.shape)
        self._copy(_value(source), _value(tensor))

    def read(self, tensor: RawTensor) -> NDArray[Any]:
        if tensor.dtype == "bfloat16":  # numpy has no such type: the upper half of a float32
            halves = RawTensor(tensor.address, "float16", tensor.shape, tensor.device, tensor.owner)
            return (self.read(halves).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if self._device[0] == CPU:
            return np.from_dlpack(tensor).copy()
        host = np.empty(tensor.shape, tensor.dtype)
        self._copy(_value(tensor), _value(host))
        return host

    def clone(self, tensor: RawTensor) -> Any:
        if self._device[0] == CPU:
            return self.read(tensor)
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        target = self.tensor(self.allocate(size), 0, tensor.dtype, tensor.shape)
        self.copy(tensor, target)
        return target

    def copy(self, source: RawTensor, target: RawTensor) -> None:
        if self._device[0] == CPU:
            np.copyto(_writable(np.from_dlpack(target)), np.from_dlpack(source))
        else:
            self._copy(_value(source), _value(target))

    def fill_zero(self, tensor: RawTensor) -> None:
        self.write(tensor, np.zeros(tensor.shape, np.float32))

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int) -> None:
        count = int(np.prod(tensor.shape))
        if self._device[0] == CPU:
            flat = _writable(np.from_dlpack(tensor)).reshape(-1)
            standard_normal(seed, draw, count, out=flat)
        else:
            self.write(tensor, standard_normal(seed, draw, count))

    def bind(self, graph: str, tensors: Mapping[str, RawTensor]) -> Callable[[], None]:
        session = self._graphs[graph]
        binding = session.io_binding()
        inputs, outputs = self._ports[graph]
        for names, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name in names:
                t = tensors[name]
                bind(name, self._device_name, t.device[1], ONNX_TYPES[t.dtype], t.shape, t.address)
        return lambda: session.run_with_iobinding(binding)

    def close(self) -> None:
        self._graphs.clear()

    @staticmethod
    def _copy(source: Any, target: Any) -> None:
        ort.copy_tensors([source], [target])


def find_provider(name: str) -> str:
    """The full name of a provider this ONNX Runtime has. Raises `PidRuntimeError` otherwise."""
    full = PROVIDERS.get(name.lower(), name)
    available = ort.get_available_providers()
    if full not in available:
        raise PidRuntimeError(
            f"expected one of this ONNX Runtime's providers ({', '.join(available)}), "
            f"but got {name!r}; "
            "GPU providers come with onnxruntime-gpu"
        )
    return full


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


def _value(source: Any) -> ort.OrtValue:
    if isinstance(source, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(source)
    return ort.OrtValue.from_dlpack(source.__dlpack__())
