"""The TensorRT backend: a bundle's engines, in TensorRT 11 or TensorRT for RTX.

Memory on the device is the engines' weights, which are loaded once for all buckets, and the arena.
Engines run one after the other on one stream, and each works in a part of the arena where no buffer
is in use by then; the builder has planned where. A decode in a shape decoded before allocates
nothing. Inputs that are on the device already are copied there into the arena, others pass through
pinned memory.

Threads: a decoder serves one thread at a time, but not always the same one. Decoders of one bundle,
each in a thread of its own, share the engines and their weights; each has its stream, its execution
contexts, its arena and its scratch.

The first decode in a shape runs call by call. With CUDA graphs the second one records what lies
between two draws of noise as a graph, per step, and later ones replay it.
"""

import contextlib
import importlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pid_runtime.backends.device import CudaDevice, DeviceMemory
from pid_runtime.backends.dlpack import RawTensor
from pid_runtime.backends.graphs import Call, PlannedCall
from pid_runtime.backends.memory import Memory
from pid_runtime.bundle.engines import (
    Engine,
    check_engine_set,
    choose_engine_set,
    engine_folder,
    read_engine_sets,
)
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.manifest import PRECISIONS, Bucket, Manifest
from pid_runtime.errors import OutOfMemoryError, PidRuntimeError

_log = logging.getLogger(__name__)


@dataclass
class _Context:
    """What runs one optimisation profile of an engine."""

    execution: Any
    scratch_bytes: int
    planned: bool
    """Whether the arena has place for its scratch; else it works in the session's own block."""


class LoadedEngines:
    """A bundle's engines, with their weights on the GPU once for all decoders."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        device: str = "cuda:0",
        engines: str | None = None,
        *,
        flavor: str | None = None,
        cuda_graphs: bool = True,
        verify: bool = True,
    ) -> None:
        """device: "cuda" or "cuda:N". engines: name of an engine set; None for the first that runs.

        flavor: of the engines, "tensorrt" or "tensorrt-rtx"; None for either.
        cuda_graphs: record and replay. verify: hash the engines' files, not only compare sizes.
        Raises `PidRuntimeError` for a bundle without engines, or an unknown device.
        """
        self.manifest = manifest
        self.cuda_graphs = cuda_graphs
        sets = read_engine_sets(manifest)
        self._sets = {n: each for n, each in sets.items() if flavor in (None, each.flavor)}
        if not self._sets:
            precision = (
                "export it again with --precision bf16, and "
                if PRECISIONS[manifest.precision] == "float32"
                else ""
            )
            wanted = "engines" if flavor is None else f"engines of {FLAVORS[flavor].title}"
            kind = "" if flavor is None else f" --flavor {flavor}"
            raise PidRuntimeError(
                f"expected {wanted} in {bundle}, but it has {', '.join(sets) or 'none'}; "
                f"{precision}build them: pid-build {bundle}{kind} --target current"
            )
        self._bundle, self._wanted, self._verify = bundle, engines, verify
        self._ordinal = _ordinal(device)
        self.engines: dict[str, Any] = {}
        """Those whose weights are on the device, by file."""
        self._lock = threading.Lock()
        self._cache: Any = None
        self._cached = b""

    def load(self) -> None:
        """Choose and check an engine set, and start the library; engines load when first needed."""
        libraries = _load_libraries({each.flavor for each in self._sets.values()})
        self.device = CudaDevice(self._ordinal)
        versions = {name: str(library.__version__) for name, library in libraries.items()}
        name = choose_engine_set(
            self._bundle, self._sets, versions, self.device.target, self._wanted
        )
        self.set = self._sets[name]
        check_engine_set(self._bundle, self.manifest, name, self.set, self._verify)
        self.manifest = self.set.run_by(self.manifest)
        self.flavor = FLAVORS[self.set.flavor]
        self._trt = libraries[self.set.flavor]
        self._folder = engine_folder(self._bundle, name)
        self.device.use()
        self.logger = _make_logger(self._trt)
        try:
            self._runtime: Any = self._trt.Runtime(self.logger)
        except (RuntimeError, TypeError):  # what the bindings make of a null pointer
            raise PidRuntimeError(
                f"expected {self.flavor.title} to start on {self.device.name}, but it says: "
                f"{self.logger.last}; update the NVIDIA driver"
            ) from None
        if self.set.flags.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True
        _log.info(
            "Engines %s by %s %s on %s (%s)",
            name,
            self.flavor.title,
            versions[self.set.flavor],
            self.device.name,
            self.device.target,
        )

    def memory(self) -> CudaDevice:
        device = CudaDevice(self._ordinal)
        device.open()
        return device

    def graphs(self, memory: Memory) -> "TensorRtGraphs":
        return TensorRtGraphs(self, cast(CudaDevice, memory))

    def context(self, engine: Engine, profile: int, stream: int) -> tuple[Any, int]:
        """A new execution context of an engine's profile, and the scratch it works in, in bytes."""
        with self._lock:
            loaded = self._load(engine)
            execution = loaded.create_execution_context(self._configure(loaded))
        if execution is None or not execution.set_optimization_profile_async(profile, stream):
            raise PidRuntimeError(
                f"expected {engine.file} to run on {self.device.name}, but "
                f"{self.flavor.title} says: {self.logger.last}; "
                f"build it again: {self._rebuild()}"
            )
        return execution, int(loaded.get_device_memory_size_for_profile_v2(profile))

    def close(self) -> None:
        self._save_cache()
        self.engines.clear()
        self._cache = self._runtime = None

    def _load(self, engine: Engine) -> Any:
        """An engine with its weights on the device."""
        if engine.file not in self.engines:
            path = self._folder / engine.file
            try:
                blob = path.read_bytes()
            except OSError as error:
                raise PidRuntimeError(f"cannot read {path}: {error.strerror}") from None
            loaded = self._runtime.deserialize_cuda_engine(blob)
            if loaded is None:
                raise PidRuntimeError(
                    f"expected {path} to load on {self.device.name}, but {self.flavor.title} "
                    f"says: {self.logger.last}; build it again: {self._rebuild()}"
                )
            self.engines[engine.file] = loaded
        return self.engines[engine.file]

    def _configure(self, loaded: Any) -> Any:
        """How an engine's contexts run: in memory we give, and with our cache where it compiles."""
        config = loaded.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(strategy.USER_MANAGED)
        if not self.flavor.compiles:
            return config
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._cached = self._cache_file().read_bytes()
            if self._cached and not self._cache.deserialize(self._cached):
                _log.info("%s is of another GPU or driver and will be replaced", self._cache_file())
        config.set_runtime_cache(self._cache)
        if self.cuda_graphs:
            # A graph repeats the kernels it has recorded, so the best ones must be there by then.
            kinds = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        return config

    def _cache_file(self) -> Path:
        return self._folder / f"runtime-{re.sub(r'[^A-Za-z0-9]+', '-', self.device.name)}.cache"

    def _save_cache(self) -> None:
        """Keep the kernels compiled, if there are new ones, for the next process."""
        if self._cache is None:
            return
        self.device.use()
        blob = bytes(memoryview(self._cache.serialize()))
        if blob == self._cached:
            return
        path = self._cache_file()
        try:
            write_whole(path, blob)
        except OSError as error:
            _log.info("Compiled kernels are not kept in %s: %s", path, error.strerror)

    def _rebuild(self) -> str:
        return self.set.build_command(self._folder.parent.parent)


class TensorRtGraphs:
    """Runs a bundle's engines for one decoder: contexts, scratch and CUDA graphs of its own."""

    whole_batches = batches_gain = False

    def __init__(self, shared: LoadedEngines, device: CudaDevice) -> None:
        """device: the decoder's memory, with the stream that all work is put on."""
        self._shared, self._device = shared, device
        self._set, self._flavor, self._manifest = shared.set, shared.flavor, shared.manifest
        self._ports = {g: {**p.inputs, **p.outputs} for g, p in self._manifest.graphs.items()}
        self.range = _nvtx_ranges()
        """Gives the context manager of a named range that profilers show."""
        self._contexts: dict[tuple[str, int], _Context] = {}
        self._scratch: DeviceMemory | None = None
        self.cuda_graphs = shared.cuda_graphs

    def bucket_for(self, tokens: int) -> Bucket:
        built = self._set.buckets.values()
        fitting = [bucket for bucket in built if bucket.max_tokens >= tokens]
        if not fitting:
            most = max((bucket.max_tokens for bucket in built), default=0)
            raise PidRuntimeError(
                f"expected an image of at most {self._manifest.megapixels(most)}, as these engines "
                f"were built for, but got {self._manifest.megapixels(tokens)}; build a larger "
                "bucket with pid-build --buckets, or decode a smaller latent"
            )
        return min(fitting, key=lambda bucket: bucket.max_tokens)

    def prepare(self, calls: Iterable[PlannedCall], needed_bytes: int, batch: int) -> None:
        uses: dict[tuple[str, int], Engine] = {}
        for graph, values in calls:
            engine, profile = self._set.engine_for(graph, values)
            uses[engine.file, profile] = engine
        self._check_memory(uses, needed_bytes, batch)
        for (_, profile), engine in uses.items():
            self._context(engine, profile)
        self._fit_scratch()

    def bind(self, graph: str, tensors: Mapping[str, RawTensor], scratch: RawTensor | None) -> Call:
        values: dict[str, int] = {}
        for name, port in self._ports[graph].items():
            for symbol, size in zip(port.shape, tensors[name].shape, strict=True):
                if isinstance(symbol, str):
                    values[symbol] = size
        context = self._context(*self._set.engine_for(graph, values))
        execution = context.execution
        shapes = {name: tensors[name].shape for name in self._manifest.graphs[graph].inputs}
        addresses = {name: tensor.address for name, tensor in tensors.items()}
        stream = self._device.stream_handle

        def call() -> None:
            with self.range(graph):
                execution.set_device_memory(*self._memory(context, scratch))
                done = all(execution.set_input_shape(name, size) for name, size in shapes.items())
                for name, address in addresses.items():
                    done = done and execution.set_tensor_address(name, address)
                if not (done and execution.execute_async_v3(stream)):
                    raise RuntimeError(f"engine of graph {graph!r}: {self._shared.logger.last}")

        return call

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        return _Sequence(self, name, calls).run

    def record(self, calls: Sequence[Call]) -> Call | None:
        """The call that replays calls as a CUDA graph; None, and no more of them, if it fails."""
        stream = self._device.stream_handle
        try:
            if self._flavor.compiles:
                for each in self._contexts.values():
                    if not each.execution.is_stream_capturable(stream):
                        raise RuntimeError("these engines cannot be captured")
            return self._device.capture(calls)
        except Exception as error:  # noqa: BLE001 - whatever TensorRT or CUDA has against it
            reason = str(error).partition("\n")[0]
            _log.info("Running without CUDA graphs: %s", reason)
            self.cuda_graphs = False
            return None

    def close(self) -> None:
        self._contexts.clear()
        self._scratch = None
        self._device.close()

    @property
    def scratch(self) -> DeviceMemory | None:
        """The block of contexts that ask for more scratch than their builder had planned."""
        return self._scratch

    def _check_memory(
        self, uses: Mapping[tuple[str, int], Engine], needed_bytes: int, batch: int
    ) -> None:
        """Raise `PidRuntimeError` unless what a shape needs is free, by what the builder said."""
        weights = {engine.file: engine.weights_bytes for engine in uses.values()}
        needed = needed_bytes + sum(
            w for file, w in weights.items() if file not in self._shared.engines
        )
        free = self._device.free_bytes()
        if needed <= free:
            return
        loaded = sum(e.weights_bytes for e in self._all_engines() if e.file in self._shared.engines)
        available = free + loaded
        fitting = [
            (self._manifest.buckets[name].max_tokens, name, memory.peak_device_bytes)
            for name, memory in self._set.buckets.items()
            if memory.peak_device_bytes <= available
        ]
        advice = "free memory on the GPU"
        if fitting:
            tokens, name, peak = max(fitting)
            alone = "one image at a time, " if batch > 1 else ""
            advice = (
                f"decode {alone}at most {self._manifest.megapixels(tokens)}: bucket {name} takes "
                f"{peak / 1e9:.2f} GB in all"
            )
        raise OutOfMemoryError(
            f"expected {needed / 1e9:.2f} GB of free device memory for this shape, but got "
            f"{free / 1e9:.2f} GB; {advice}"
        )

    def _all_engines(self) -> Iterable[Engine]:
        return {e.file: e for each in self._set.graphs.values() for e in each}.values()

    def _context(self, engine: Engine, profile: int) -> _Context:
        """The context of a profile, made when first needed."""
        key = engine.file, profile
        if key not in self._contexts:
            self._device.use()
            execution, scratch = self._shared.context(engine, profile, self._device.stream_handle)
            planned = scratch <= engine.scratch_bytes[profile]
            self._contexts[key] = _Context(execution, scratch, planned)
            if not planned:
                _log.info(
                    "%s needs %.3f GB of scratch on %s, %.3f GB were planned: it gets a block of "
                    "its own",
                    engine.file,
                    scratch / 1e9,
                    self._device.name,
                    engine.scratch_bytes[profile] / 1e9,
                )
        return self._contexts[key]

    def _memory(self, context: _Context, scratch: RawTensor | None) -> tuple[int, int]:
        """Address and size of what a context works in."""
        if scratch is None or context.scratch_bytes > scratch.size_bytes:
            context.planned = False
        if context.planned and scratch is not None:
            return scratch.address, context.scratch_bytes
        self._fit_scratch()
        return (0, 0) if self._scratch is None else (self._scratch.address, context.scratch_bytes)

    def _fit_scratch(self) -> None:
        """Make the block large enough for every context that works in it."""
        unplanned = (each.scratch_bytes for each in self._contexts.values() if not each.planned)
        needed = max(unplanned, default=0)
        if needed <= (0 if self._scratch is None else self._scratch.size_bytes):
            return
        self._device.synchronize()
        self._scratch = None  # give the old one back before asking for the new one
        try:
            self._scratch = self._device.allocate(needed)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"expected {needed / 1e9:.2f} GB of device memory for the engines' scratch, but "
                f"got {error}; decode a smaller shape, or free memory on the GPU"
            ) from None


class _Sequence:
    """Calls that run one by one the first time, and as a CUDA graph from the second time on."""

    def __init__(self, graphs: TensorRtGraphs, name: str, calls: Sequence[Call]) -> None:
        self._graphs, self._name, self._calls = graphs, name, calls
        self._has_run = False
        self._replay: Call | None = None
        self._scratch: DeviceMemory | None = None

    def run(self) -> None:
        graphs = self._graphs
        with graphs.range(self._name):
            if self._replay is not None and self._scratch is not graphs.scratch:
                self._replay = None  # it would work in memory that has been given back
            if self._replay is None and self._has_run and graphs.cuda_graphs:
                self._replay, self._scratch = graphs.record(self._calls), graphs.scratch
            if self._replay is not None:
                self._replay()
            else:
                for call in self._calls:
                    call()
        self._has_run = True


def _load_libraries(flavors: set[str]) -> dict[str, Any]:
    """The libraries installed for these flavours. Raises `PidRuntimeError` when there is none."""
    libraries: dict[str, Any] = {}
    for name in sorted(flavors):
        for module in FLAVORS[name].modules:
            with contextlib.suppress(ImportError, OSError):
                libraries[name] = importlib.import_module(module)
                break
    if not libraries:
        wanted = [FLAVORS[name] for name in sorted(flavors)]
        raise PidRuntimeError(
            f"expected {' or '.join(each.title for each in wanted)} for this bundle's engines, but "
            f"it is not installed; {' or '.join(each.install for each in wanted)}"
        )
    return libraries


def _ordinal(device: str) -> int:
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device)
    if match is None:
        raise PidRuntimeError(
            f"expected a device cuda or cuda:N for the tensorrt backend, but got {device!r}"
        )
    return int(match[1] or 0)


def _make_logger(trt: Any) -> Any:
    """A logger for a library, that remembers its last error."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "nothing"

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                self.last = " ".join(msg.split())
            _log.debug("%s", msg)

    return Logger()


def _nvtx_ranges() -> Callable[[str], AbstractContextManager[Any]]:
    """Ranges in NVTX if nvtx is installed, else nothing."""
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError:
        return lambda name: contextlib.nullcontext()
    return lambda name: nvtx.annotate(name, domain="pid")
