"""The torch backend: the stages as modules, on any torch device."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pid_runtime.backends.blending import ring_parts
from pid_runtime.backends.device import kernels_of
from pid_runtime.backends.dlpack import CUDA, RawTensor
from pid_runtime.backends.graphs import Call, PlannedCall, in_order
from pid_runtime.backends.memory import Memory, write_normal
from pid_runtime.backends.stages import DTYPES, Dimensions, build_stage
from pid_runtime.bundle.manifest import WEIGHTS_FILE, Bucket, Manifest
from pid_runtime.errors import PidRuntimeError


class LoadedStages:
    """A bundle's stages as modules, with their weights on the device."""

    def __init__(
        self, bundle: Path, manifest: Manifest, device: str = "cpu", threads: int | None = None
    ) -> None:
        """threads: CPU threads of the process, all when None."""
        self.manifest = manifest
        self.stages: dict[str, torch.nn.Module] = {}
        self._bundle, self._device_name, self._threads = bundle, device, threads

    def load(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            self.device = torch.empty(0, device=torch.device(self._device_name)).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0][:200]
            raise PidRuntimeError(
                f"expected a device torch can use, such as cpu or cuda:0, but got "
                f"{self._device_name!r}: {reason}"
            ) from None
        names = {field.name for field in fields(Dimensions)}
        network = Dimensions(**{k: v for k, v in self.manifest.network.items() if k in names})
        path, precision = self._bundle / WEIGHTS_FILE, self.manifest.precision
        try:
            with safe_open(path, "pt", device=str(self.device)) as weights:
                for name, graph in self.manifest.graphs.items():
                    with torch.device("meta"):
                        stage = build_stage(graph.stage, graph.options, network, precision)
                    state = {key: weights.get_tensor(f"{name}.{key}") for key in stage.state_dict()}
                    stage.load_state_dict(state, assign=True)
                    self.stages[name] = stage.eval().requires_grad_(False)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise PidRuntimeError(
                f"expected the bundle's weights in {path}, but got: {reason}; "
                "export or copy the bundle again"
            ) from error

    def compile(self) -> None:
        """Let torch.compile compile every stage: each does when it first runs at a size."""
        for stage in self.stages.values():
            stage.compile(dynamic=False)

    def memory(self) -> "TorchMemory":
        return TorchMemory(self.device)

    def graphs(self, memory: Memory) -> "TorchGraphs":
        return TorchGraphs(self.manifest, self.stages, self.device)

    def close(self) -> None:
        self.stages.clear()


class TorchGraphs:
    """Runs stages, which any number of decoders may do at the same time."""

    whole_batches = True

    def __init__(
        self, manifest: Manifest, stages: Mapping[str, torch.nn.Module], device: torch.device
    ) -> None:
        """stages: by graph."""
        self._manifest, self._stages = manifest, stages
        self.batches_gain = device.type != "cpu"

    def bucket_for(self, tokens: int) -> Bucket:
        return self._manifest.bucket_for(tokens)[1]

    def prepare(self, calls: Iterable[PlannedCall], needed_bytes: int, batch: int) -> None:
        pass  # modules run at any size

    def bind(
        self, graph: str, tensors: Mapping[str, torch.Tensor], scratch: torch.Tensor | None
    ) -> Call:
        stage, described = self._stages[graph], self._manifest.graphs[graph]
        inputs = {name: tensors[name] for name in described.inputs}
        outputs = [tensors[name] for name in described.outputs]

        def call() -> None:
            with torch.inference_mode():
                results = stage(**inputs)
                results = results if isinstance(results, tuple) else (results,)
                for target, result in zip(outputs, results, strict=True):
                    target.copy_(result.view(target.shape))

        return call

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        return in_order(calls)

    def close(self) -> None:
        pass  # stages belong to the bundle


class TorchMemory:
    """Memory of a torch device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kernels = kernels_of(device.index) if device.type == "cuda" else None
        self.blending = TorchBlending()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def tensor(
        self, block: torch.Tensor, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        kind = DTYPES[dtype]
        count = int(np.prod(shape)) * kind.itemsize
        return block[offset_bytes : offset_bytes + count].view(kind).view(shape)

    def write(self, tensor: torch.Tensor, source: Any) -> None:
        if isinstance(source, np.ndarray) and not source.flags.writeable:
            source = source.copy()  # numpy exports no read-only array
        array = torch.from_dlpack(source) if hasattr(source, "__dlpack__") else torch.tensor(source)
        tensor.copy_(array.reshape(tensor.shape))

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            tensor = tensor.float()
        return tensor.cpu().numpy().copy()

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def fill_zero(self, tensor: torch.Tensor) -> None:
        tensor.zero_()

    def is_finite(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.isfinite().all())

    def fill_normal(self, tensor: torch.Tensor, seed: int, draw: int, start: int = 0) -> None:
        if self._kernels is None:
            write_normal(self, tensor, seed, draw, start)
            return
        place = (CUDA, tensor.device.index)
        raw = RawTensor(tensor.data_ptr(), "float32", tuple(tensor.shape), place, tensor)
        torch.cuda.current_stream(self._device).synchronize()  # the kernels have their own stream
        self._kernels.fill_normal(raw, seed, draw, start)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TorchBlending:
    """As of `Blending`, on any device torch has: products and sums apart, which rounds as NumPy."""

    def take(self, state: torch.Tensor, tile: torch.Tensor, row: int, column: int) -> None:
        _, height, width, *_ = tile.shape
        tile.copy_(state[:, row : row + height, column : column + width])

    def add(
        self,
        ring: torch.Tensor,
        tile: torch.Tensor,
        down: torch.Tensor,
        across: torch.Tensor,
        row: int,
        column: int,
    ) -> None:
        tile.mul_(down[:, None, :, None, None]).mul_(across[None, :, None, :, None])
        _, height, width, *_ = tile.shape
        for first, at, count in ring_parts(row, height, ring.shape[1]):
            sums = ring[:, at : at + count, column : column + width]
            sums.add_(tile[:, first : first + count])

    def mix(
        self,
        state: torch.Tensor,
        ring: torch.Tensor,
        before: torch.Tensor | None,
        noise: torch.Tensor | None,
        factors: Sequence[float],
        row: int,
        rows: int,
    ) -> None:
        of_state, of_clean, of_before, of_noise = map(float, factors)
        for first, at, count in ring_parts(row, rows, ring.shape[1]):
            begin, end = row + first, row + first + count
            seen = ring[:, at : at + count]
            mixed = state[:, begin:end].mul_(of_state)
            mixed.add_(seen * of_clean)
            if before is not None:
                if of_before:
                    mixed.add_(before[:, begin:end] * of_before)
                before[:, begin:end] = seen
            if noise is not None:
                mixed.add_(noise[:, first : first + count] * of_noise)
            seen.zero_()
