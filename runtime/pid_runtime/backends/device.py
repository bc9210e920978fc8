"""One GPU through cuda-python: memory, copies, captured graphs and our kernels.

Everything runs in the device's primary context, which the whole process shares, and on one stream
per `CudaDevice`. Operations are enqueued; those that hand data to or take it from the host or
another library wait until they are done. A `CudaDevice` serves one thread at a time, and makes
its context current in whichever thread that is.
"""

import contextlib
import ctypes
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.dlpack import CUDA, RawTensor
from pid_runtime.backends.graphs import Call
from pid_runtime.backends.kernels import Kernels, load_kernels
from pid_runtime.backends.memory import (
    all_finite,
    as_array,
    as_bytes,
    from_bytes,
    write_normal,
)
from pid_runtime.errors import PidRuntimeError

STAGING_BYTES = 1 << 25
"""Pinned host memory that data passes through, in pieces of this size."""

DLPACK_DEVICES = (2, 3, 13)
"""DLPack's types of memory that a copy on the device reads: CUDA, pinned, managed."""

_log = logging.getLogger(__name__)


class DeviceMemory:
    """An allocation on a device, of at least one byte; freed with its last reference."""

    address = 0

    def __init__(self, device: Any, driver: Any, size_bytes: int) -> None:
        """Raises `MemoryError` when there is not enough left."""
        self._device, self._driver = device, driver
        device.set_current()
        error, pointer = driver.cuMemAlloc(max(size_bytes, 1))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise MemoryError(f"{error.name} for {size_bytes} bytes of device memory")
        self.address, self.size_bytes = int(pointer), size_bytes

    def __del__(self) -> None:
        if self.address:
            self._device.set_current()  # this may be any thread
            self._driver.cuMemFree(self.address)  # waits for what still uses it


class CudaDevice:
    """A GPU and a stream on it."""

    def __init__(self, ordinal: int) -> None:
        """Look the GPU up; nothing is allocated before `open`.

        Raises `PidRuntimeError` without cuda-python, a driver, or this GPU.
        """
        try:
            self._core = importlib.import_module("cuda.core")
            self._driver = importlib.import_module("cuda.bindings.driver")
            bindings = importlib.import_module("cuda.bindings")
        except ImportError:
            raise PidRuntimeError(
                "expected cuda-python for the tensorrt backend, but it is not installed; "
                "pip install 'pid-trt[tensorrt-rtx]' or 'pid-trt[tensorrt]'"
            ) from None
        self.ordinal = ordinal
        count = self._count_devices(int(bindings.__version__.partition(".")[0]))
        if ordinal >= count:
            raise PidRuntimeError(
                f"expected one of this machine's {count} GPUs, but got cuda:{ordinal}; "
                "choose another device"
            )
        self._device = self._core.Device(ordinal)
        capability = self._device.compute_capability
        self.name = str(self._device.name)
        self.target = f"sm{capability.major}{capability.minor}"
        """Its architecture, such as sm89."""
        self._stream: Any = None
        self._staging: Any = None
        self._kernels: Kernels | Literal[False] | None = None  # False: the driver refuses them

    def open(self) -> None:
        """Make the context current and a stream in it."""
        self.use()
        self._stream = self._device.create_stream()
        self.stream_handle = int(self._stream.handle)

    @property
    def blending(self) -> Kernels | None:
        """Our kernels, loaded when first asked for; None where the driver refuses them."""
        if self._kernels is None:
            self.use()
            self._kernels = load_kernels(self._core, self._stream, self.use) or False
        return self._kernels or None

    def use(self) -> None:
        """Make the context current in the calling thread."""
        self._device.set_current()

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._stream.sync()

    def close(self) -> None:
        """Release the stream and the staging memory."""
        if self._stream is None:
            return
        self.use()
        self.synchronize()
        self._kernels = None
        if self._staging is not None:
            self._staging.close()
        self._stream.close()
        self._stream = self._staging = None

    def free_bytes(self) -> int:
        """Device memory that is not in use."""
        return self.memory_bytes()[0]

    def memory_bytes(self) -> tuple[int, int]:
        """Device memory that is not in use, and all there is; zeros when CUDA does not say."""
        self.use()
        error, free, total = self._driver.cuMemGetInfo()
        return (int(free), int(total)) if error == self._driver.CUresult.CUDA_SUCCESS else (0, 0)

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory aligned to at least 256 bytes. Raises `MemoryError` when there is too little."""
        return DeviceMemory(self._device, self._driver, size_bytes)

    def tensor(
        self, block: DeviceMemory, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> RawTensor:
        """A part of a block."""
        return RawTensor(block.address + offset_bytes, dtype, shape, (CUDA, self.ordinal), block)

    def copy(self, source: RawTensor, target: RawTensor) -> None:
        """Enqueue a copy between tensors of the same size."""
        self._view(source).copy_to(self._view(target), stream=self._stream)

    def clone(self, tensor: RawTensor) -> RawTensor:
        """Copy a tensor to new memory, which any stream may read when this returns."""
        clone = self.tensor(self.allocate(tensor.size_bytes), 0, tensor.dtype, tensor.shape)
        self.copy(tensor, clone)
        self.synchronize()
        return clone

    def is_finite(self, tensor: RawTensor) -> bool:
        """Whether a tensor has neither NaN nor infinity; it is read for that."""
        return all_finite(self.read(tensor))

    def fill_zero(self, tensor: RawTensor) -> None:
        """Enqueue a fill with zeros."""
        self._view(tensor).fill(0, stream=self._stream)

    def write(self, tensor: RawTensor, source: Any) -> None:
        """Copy an array into a tensor, converted to its dtype.

        Arrays on the device that have the tensor's dtype are copied there, in order with the work
        of the library they come from; others pass through the host.
        """
        self.use()
        on_host = not hasattr(source, "__dlpack_device__")
        if on_host or source.__dlpack_device__()[0] not in DLPACK_DEVICES:
            self._upload(tensor, as_array(source))
            return
        view = self._core.utils.StridedMemoryView.from_dlpack(source, stream_ptr=self.stream_handle)
        shape, dtype = tuple(view.shape), _dtype_of(source, view)
        if math.prod(shape) != math.prod(tensor.shape) or not _is_contiguous(shape, view.strides):
            raise PidRuntimeError(
                f"expected a contiguous array of shape {list(tensor.shape)}, but got shape "
                f"{list(shape)} and strides {view.strides}; make it contiguous"
            )
        given = RawTensor(int(view.ptr), dtype, shape, (CUDA, self.ordinal), view)
        if dtype == tensor.dtype:
            self.copy(given, tensor)
            self.synchronize()  # the owner may reuse its memory when this returns
        else:
            self._upload(tensor, self.read(given))

    def read(self, tensor: RawTensor) -> NDArray[Any]:
        """Copy a tensor to a new array on the host, bfloat16 as float32."""
        self.use()
        result = np.empty(tensor.size_bytes, np.uint8)
        staging, memory = self._staging_memory()
        for begin in range(0, result.size, STAGING_BYTES):
            size = min(STAGING_BYTES, result.size - begin)
            part = self._memory(tensor.address + begin, size, tensor.owner)
            part.copy_to(self._memory(int(staging.handle), size, staging), stream=self._stream)
            self.synchronize()
            result[begin : begin + size] = memory[:size]
        return from_bytes(result, tensor.dtype).reshape(tensor.shape)

    def fill_normal(self, tensor: RawTensor, seed: int, draw: int, start: int = 0) -> None:
        """As of `Memory`: by a kernel, or on the host where the driver refuses it."""
        kernels = self.blending
        if kernels is None:
            write_normal(self, tensor, seed, draw, start)
        else:
            kernels.fill_normal(tensor, seed, draw, start)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """Record what calls enqueue as one CUDA graph; gives the call that replays it.

        Nothing of it runs. Raises what CUDA and the calls raise when it cannot be recorded; the
        stream is usable again then.
        """
        self.use()
        builder = self._stream.create_graph_builder()
        builder.begin_building(mode="thread_local")
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(Exception):
                builder.end_building()
            builder.close()
            raise
        builder.end_building()
        graph = builder.complete()
        builder.close()
        stream = self._stream
        return lambda: graph.launch(stream)

    def _count_devices(self, least_cuda: int) -> int:
        """How many GPUs there are, after a check of the driver."""
        driver = self._driver
        try:
            error, version = driver.cuDriverGetVersion()
            (started,) = driver.cuInit(0)
        except RuntimeError:  # what cuda-python raises when there is no libcuda
            error, version, started = driver.CUresult.CUDA_ERROR_NO_DEVICE, 0, None
        success = driver.CUresult.CUDA_SUCCESS
        if error == success and version // 1000 < least_cuda:
            raise PidRuntimeError(
                f"expected a driver for CUDA {least_cuda} or newer, but the one installed is for "
                f"CUDA {version // 1000}.{version % 1000 // 10}; update the NVIDIA driver"
            )
        if error != success or started != success:
            raise PidRuntimeError(
                "expected an NVIDIA GPU and its driver for the tensorrt backend, but found none; "
                "install the driver, or use --backend onnxruntime"
            )
        error, count = driver.cuDeviceGetCount()
        return int(count) if error == success else 0

    def _upload(self, tensor: RawTensor, array: NDArray[Any]) -> None:
        """Copy an array, converted to the tensor's dtype, through pinned memory."""
        data = as_bytes(array, tensor.dtype)
        if data.size != tensor.size_bytes:
            raise ValueError(f"{array.shape} does not fill a tensor {tensor.shape}")
        staging, memory = self._staging_memory()
        for begin in range(0, data.size, STAGING_BYTES):
            size = min(STAGING_BYTES, data.size - begin)
            memory[:size] = data[begin : begin + size]
            part = self._memory(tensor.address + begin, size, tensor.owner)
            self._memory(int(staging.handle), size, staging).copy_to(part, stream=self._stream)
            self.synchronize()  # the staging memory is used again

    def _staging_memory(self) -> tuple[Any, NDArray[np.uint8]]:
        """The pinned buffer, made when first needed, and the same as an array."""
        if self._staging is None:
            self._staging = self._core.LegacyPinnedMemoryResource().allocate(STAGING_BYTES)
        raw = (ctypes.c_uint8 * STAGING_BYTES).from_address(int(self._staging.handle))
        return self._staging, np.frombuffer(memoryview(raw), np.uint8)

    def _view(self, tensor: RawTensor) -> Any:
        return self._memory(tensor.address, tensor.size_bytes, tensor.owner)

    def _memory(self, address: int, size_bytes: int, owner: Any) -> Any:
        """Memory as cuda.core copies it."""
        return self._core.Buffer.from_handle(address, size_bytes, owner=owner)


def kernels_of(ordinal: int) -> Kernels | None:
    """Our kernels on a GPU that another library drives: each is done when its call returns.

    None where there is no cuda-python, or where the driver refuses them.
    """
    try:
        device = CudaDevice(ordinal)
    except PidRuntimeError as error:
        _log.info("Noise is made on the host: %s", error)
        return None
    device.open()
    kernels = device.blending
    if kernels is not None:
        kernels.after = device.synchronize
    return kernels


def _dtype_of(source: Any, view: Any) -> str:
    """The dtype's name; the view has no numpy type for bfloat16."""
    kind = getattr(source, "dtype", None)
    return str(view.dtype if kind is None else kind).removeprefix("torch.")


def _is_contiguous(shape: Sequence[int], strides: Sequence[int] | None) -> bool:
    """Whether elements lie dense and row-major; strides in elements, None if they do."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
