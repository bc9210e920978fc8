"""A make-believe GPU with TensorRT, for tests of what drives the real ones.

The GPU is the host's memory, and an engine (of `fakes.engines`) computes what the torch stage of
its graph does. `install` puts them where the backend imports the real libraries.
"""

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fakes import kernels
from fakes.engines import VERSION
from pid_runtime.backends.dlpack import CPU, RawTensor
from pid_runtime.backends.kernels import PTX
from pid_runtime.backends.torch import LoadedStages, TorchGraphs
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest

Operation = Callable[[bool], object]
"""What a stream does; called with whether it is replayed."""

ALIGNMENT = 256
"""Of memory, in bytes."""


class Refused(Exception):
    """What cuda.core raises."""


@dataclass
class Gpu:
    """The device: memory by address, what has happened, and what it lets happen."""

    free: int = 1 << 30
    capability: tuple[int, int] = (8, 9)
    driver: int = 13020
    devices: int = 1
    has_driver: bool = True
    takes_kernels: bool = True
    """Whether the driver reads our kernels' PTX."""
    captures: bool = True
    """Whether a stream can be captured while TensorRT runs on it."""
    capturable: bool = True
    """What engines say about that."""
    more_scratch: dict[str, int] = field(default_factory=dict[str, int])
    """Scratch engines ask for, where it is not what was planned."""
    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict[int, Any])
    events: list[str] = field(default_factory=list[str])
    runs: list["EngineRun"] = field(default_factory=list["EngineRun"])
    current: set[int] = field(default_factory=set[int])
    """Threads in which the context is current."""
    threads: set[int] = field(default_factory=set[int])
    """Threads that have run engines."""
    contexts: list["FakeContext"] = field(default_factory=list["FakeContext"])
    lock: Any = field(default_factory=threading.Lock)
    """Real GPUs are thread-safe; the stages here are not."""

    def allocate(self, size: int) -> int | None:
        if size > self.free:
            return None
        block = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        with self.lock:
            self.memory[address] = block
        self.free -= size
        self.events.append(f"allocate {size}")
        return address

    def release(self, address: int) -> None:
        with self.lock:
            self.free += self.memory.pop(address).size - ALIGNMENT
        self.events.append("free")

    def require_context(self) -> None:
        assert threading.get_ident() in self.current, "no context is current in this thread"

    def holds(self, address: int, size: int) -> bool:
        """Whether this is memory that has been allocated and not given back."""
        with self.lock:
            return any(
                begin <= address and address + size <= begin + block.size - ALIGNMENT
                for begin, block in self.memory.items()
            )

    def count(self, kind: str) -> int:
        return sum(event.split()[0] == kind for event in self.events)


@dataclass(frozen=True)
class EngineRun:
    """One run of an engine."""

    graph: str
    file: str
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    scratch: int
    """Address of the memory it worked in."""
    replayed: bool


class FakeStream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.recording: list[Operation] | None = None
        self.handle = id(self)
        STREAMS[self.handle] = self

    def enqueue(self, operation: Operation) -> None:
        self.gpu.require_context()
        if self.recording is None:
            operation(False)
        else:
            self.recording.append(operation)

    def sync(self) -> None:
        assert self.recording is None, "a capture does not survive synchronisation"
        self.gpu.events.append("sync")

    def create_graph_builder(self) -> "FakeGraphBuilder":
        return FakeGraphBuilder(self)

    def close(self) -> None:
        del STREAMS[self.handle]


STREAMS: dict[int, FakeStream] = {}


class FakeGraphBuilder:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.operations: list[Operation] = []

    def begin_building(self, mode: str) -> None:
        assert mode == "thread_local" and self.stream.recording is None
        self.stream.recording = self.operations

    def end_building(self) -> None:
        self.stream.recording = None
        if not self.stream.gpu.captures:
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: no")

    def complete(self) -> "FakeGraph":
        self.stream.gpu.events.append(f"capture {len(self.operations)}")
        return FakeGraph(self.operations)

    def close(self) -> None:
        assert self.stream.recording is None


class FakeGraph:
    def __init__(self, operations: list[Operation]) -> None:
        self.operations = operations

    def launch(self, stream: FakeStream) -> None:
        stream.gpu.require_context()
        stream.gpu.events.append("launch")
        for operation in self.operations:
            operation(True)


class FakeBuffer:
    def __init__(self, address: int, size: int) -> None:
        self.handle, self.size = address, size

    @classmethod
    def from_handle(cls, ptr: int, size: int, owner: Any = None) -> "FakeBuffer":
        assert owner is not None
        return cls(ptr, size)

    def copy_to(self, dst: "FakeBuffer", *, stream: FakeStream) -> None:
        assert self.size == dst.size
        stream.enqueue(lambda _: ctypes.memmove(dst.handle, self.handle, dst.size))
        stream.gpu.events.append("copy")

    def fill(self, value: int, *, stream: FakeStream) -> None:
        stream.enqueue(lambda _: ctypes.memset(self.handle, value, self.size))

    def close(self) -> None:
        pass


class FakeStridedMemoryView:
    @classmethod
    def from_dlpack(cls, obj: Any, stream_ptr: int) -> SimpleNamespace:
        assert stream_ptr in STREAMS
        array = obj.array
        strides = None
        if not array.flags.c_contiguous:
            strides = tuple(stride // array.itemsize for stride in array.strides)
        return SimpleNamespace(
            ptr=array.ctypes.data, shape=array.shape, strides=strides, dtype=array.dtype
        )


class OnDevice:
    """An array that says it is on the GPU."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("only through cuda.core")


def fake_cuda(gpu: Gpu) -> dict[str, Any]:
    """cuda.core, cuda.bindings and nvtx, by module name."""

    class CUresult:
        CUDA_SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")
        CUDA_ERROR_OUT_OF_MEMORY = SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
        CUDA_ERROR_NO_DEVICE = SimpleNamespace(name="CUDA_ERROR_NO_DEVICE")

    success = CUresult.CUDA_SUCCESS

    def alloc(size: int) -> tuple[Any, int]:
        gpu.require_context()
        address = gpu.allocate(size)
        return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0) if address is None else (success, address)

    def free(address: int) -> tuple[Any]:
        gpu.require_context()
        gpu.release(address)
        return (success,)

    def version() -> tuple[Any, int]:
        if not gpu.has_driver:
            raise RuntimeError("no libcuda")
        return success, gpu.driver

    class FakeDevice:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal
            self.name = "NVIDIA GeForce RTX 4090"
            self.compute_capability = SimpleNamespace(
                major=gpu.capability[0], minor=gpu.capability[1]
            )

        def set_current(self) -> None:
            gpu.current.add(threading.get_ident())

        def create_stream(self) -> FakeStream:
            gpu.require_context()
            return FakeStream(gpu)

    class FakePinned:
        def allocate(self, size: int) -> FakeBuffer:
            gpu.events.append(f"pin {size}")
            memory = np.zeros(size, np.uint8)
            buffer = FakeBuffer(memory.ctypes.data, size)
            buffer.memory = memory  # type: ignore[attr-defined]
            return buffer

    def from_ptx(module: bytes) -> SimpleNamespace:
        assert module == PTX.read_bytes()
        gpu.require_context()
        if not gpu.takes_kernels:
            raise Refused("CUDA_ERROR_UNSUPPORTED_PTX_VERSION\nat all")
        return SimpleNamespace(get_kernel=lambda name: name)

    def launch(stream: FakeStream, config: Any, kernel: str, *arguments: Any) -> None:
        gpu.events.append(kernel)
        stream.enqueue(lambda _: kernels.run(kernel, config.grid, config.block, *arguments))

    driver = SimpleNamespace(
        CUresult=CUresult,
        cuMemAlloc=alloc,
        cuMemFree=free,
        cuMemGetInfo=lambda: (success, gpu.free, 1 << 30),
        cuDriverGetVersion=version,
        cuInit=lambda flags: (success,),
        cuDeviceGetCount=lambda: (success, gpu.devices),
    )
    core = SimpleNamespace(
        Device=FakeDevice,
        Buffer=FakeBuffer,
        LegacyPinnedMemoryResource=FakePinned,
        LaunchConfig=SimpleNamespace,
        ObjectCode=SimpleNamespace(from_ptx=from_ptx),
        launch=launch,
        utils=SimpleNamespace(StridedMemoryView=FakeStridedMemoryView),
    )

    class Annotate:
        def __init__(self, message: str, domain: str) -> None:
            assert domain == "pid"
            self.message = message

        def __enter__(self) -> None:
            gpu.events.append(f"range {self.message}")

        def __exit__(self, *_: object) -> None:
            pass

    return {
        "cuda.core": core,
        "cuda.bindings": SimpleNamespace(__version__="13.4.4"),
        "cuda.bindings.driver": driver,
        "nvtx": SimpleNamespace(annotate=Annotate),
    }


class FakeContext:
    def __init__(self, engine: "FakeEngine", config: Any) -> None:
        self.engine, self.config = engine, config
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        engine.gpu.contexts.append(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in STREAMS
        self.profile = profile_index
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.described.inputs
        self.shapes[name] = shape
        return self.holds(name, shape)

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = {"B": (1, 1, 1), **self.engine.profiles[self.profile or 0]}
        for symbol, size in zip(self.engine.described.inputs[name].shape, shape, strict=True):
            least, _, most = ranges[symbol] if isinstance(symbol, str) else (symbol, 0, symbol)
            if not least <= size <= most:
                return False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Run the stage; everything has to be set for this very run."""
        gpu, described = self.engine.gpu, self.engine.described
        shapes, addresses, scratch = self.shapes, self.addresses, self.scratch
        self.shapes, self.addresses, self.scratch = {}, {}, None
        assert self.profile is not None
        assert shapes.keys() == described.inputs.keys()
        assert addresses.keys() == {*described.inputs, *described.outputs}
        assert scratch is not None, "no scratch was set"
        memory, size = scratch
        assert memory % ALIGNMENT == 0
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        values = {
            symbol: size
            for name, shape in shapes.items()
            for symbol, size in zip(described.inputs[name].shape, shape, strict=True)
        }
        network = self.engine.manifest.network
        for axis, latent in (("Hs", "h"), ("Ws", "w")):
            if latent in values:
                values[axis] = values[latent] * self.engine.manifest.tokens_per_latent
        values.setdefault("H", values.get("Hs", 0) * network["patch_size"])
        values.setdefault("W", values.get("Ws", 0) * network["patch_size"])
        ports = {**described.inputs, **described.outputs}
        tensors = {
            name: torch.from_dlpack(
                RawTensor(
                    addresses[name],
                    port.dtype,
                    tuple(s if isinstance(s, int) else values[s] for s in port.shape),
                    (CPU, 0),
                    self,
                )
            )
            for name, port in ports.items()
        }
        call = self.engine.stages.bind(self.engine.graph, tensors, None)
        thread = threading.get_ident()

        def run(replayed: bool) -> None:
            assert gpu.holds(memory, size), "scratch that was given back"
            ctypes.memset(memory, 0xFF, size)  # NaN for whoever finds it
            with gpu.lock:
                call()
            ctypes.memset(memory, 0xFF, size)
            gpu.threads.add(thread)
            gpu.runs.append(
                EngineRun(self.engine.graph, self.engine.file, shapes, addresses, memory, replayed)
            )

        STREAMS[stream_handle].enqueue(run)
        return True


class FakeRtxContext(FakeContext):
    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in STREAMS
        return self.engine.gpu.capturable


class FakeConfig:
    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels:"):
            return False
        self.kernels = set(blob.decode()[8:].split())
        return True

    def serialize(self) -> bytes:
        return b"kernels:" + " ".join(sorted(self.kernels)).encode()


class FakeRtxConfig(FakeConfig):
    dynamic_shapes_kernel_specialization_strategy = "LAZY"
    cache: FakeCache

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        cache.kernels.add(self.engine.file)
        return True


class FakeEngine:
    context_class: type[FakeContext] = FakeContext
    config_class: type[FakeConfig] = FakeConfig

    def __init__(self, gpu: Gpu, manifest: Manifest, stages: TorchGraphs, blob: bytes) -> None:
        fields = json.loads(blob)
        self.gpu, self.manifest, self.stages = gpu, manifest, stages
        self.graph, self.file = fields["graph"], fields["file"]
        self.described = manifest.graphs[self.graph]
        (raw,) = manifest.engines.values()
        (engine,) = [e for e in raw["graphs"][self.graph] if e["file"] == self.file]
        self.profiles, self.scratch = engine["profiles"], engine["scratch_bytes"]

    def create_runtime_config(self) -> FakeConfig:
        return self.config_class(self)

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        assert config.strategy == "USER_MANAGED"
        return self.context_class(self, config)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        planned: int = self.scratch[profile_index]
        return self.gpu.more_scratch.get(self.file, planned)


class FakeRtxEngine(FakeEngine):
    context_class = FakeRtxContext
    config_class = FakeRtxConfig


def fake_tensorrt(gpu: Gpu, bundle: Path, engine_class: type[FakeEngine]) -> SimpleNamespace:
    manifest = read_manifest(bundle, verify=False)
    loaded = LoadedStages(bundle, manifest)
    loaded.load()
    stages = loaded.graphs(loaded.memory())

    class FakeLogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class FakeRuntime:
        engine_host_code_allowed = False

        def __init__(self, logger: FakeLogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, blob: bytes) -> FakeEngine | None:
            gpu.require_context()
            if b"broken" in blob:
                self.logger.log(1, "[engine] is\nbroken")
                return None
            engine = engine_class(gpu, manifest, stages, blob)
            gpu.events.append(f"load {engine.file}")
            return engine

    library = SimpleNamespace(
        __version__=VERSION,
        ILogger=FakeLogger,
        Runtime=FakeRuntime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )
    if engine_class is FakeRtxEngine:
        library.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    return library


def install(patch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    """Let these be what imports find; None where there is nothing."""
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
