"""The backends there are, and how one is chosen; each is imported when it is."""

from pathlib import Path

from pid_runtime.backends.graphs import LoadedGraphs
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import PidRuntimeError

HOST_BACKENDS = ("onnxruntime", "torch")
"""Backends that run without a GPU too."""

INSTALL_ONNXRUNTIME = (
    "pip install 'pid-trt[cpu]', or on a machine with an NVIDIA GPU 'pid-trt[cuda]', never both"
)

DEFAULT_DEVICES = {
    "onnxruntime": "cpu",
    "torch": "cpu",
    "tensorrt": "cuda:0",
    "tensorrt-rtx": "cuda:0",
}
"""By backend."""

ENGINE_BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Backends that run a bundle's engines: of either TensorRT, and of TensorRT for RTX alone."""

BACKENDS = (*HOST_BACKENDS, *ENGINE_BACKENDS)


def device_name(backend: str, device: object) -> str:
    """The name of a device given by name, as a `torch.device`, or as None for the default.

    Raises `PidRuntimeError` for anything else.
    """
    if device is None:
        return DEFAULT_DEVICES.get(backend, "cpu")
    if isinstance(device, str) or type(device).__module__ == "torch":
        return str(device)
    raise PidRuntimeError(f"expected a device by name, such as cpu or cuda:0, but got {device!r}")


def split_device(device: str) -> tuple[str, int]:
    """A device of ONNX Runtime, such as cuda:0, as its provider and its number, 0 if it has none.

    Raises `PidRuntimeError` for a number that is none.
    """
    provider, colon, ordinal = device.partition(":")
    if colon and not (ordinal.isascii() and ordinal.isdecimal()):
        raise PidRuntimeError(f"expected a device such as cuda:0, but got {device!r}")
    return provider, int(ordinal or 0)


def choose_graphs(
    bundle: Path,
    manifest: Manifest,
    backend: str,
    device: object = None,
    *,
    threads: int | None = None,
    verify: bool = True,
    engines: str | None = None,
    cuda_graphs: bool = True,
) -> LoadedGraphs:
    """A bundle's graphs on a backend, to be loaded; arguments as of `pid_runtime.Bundle.open`.

    Raises `PidRuntimeError` for a backend, provider or device that is not there.
    """
    if threads is not None and threads < 1:
        raise PidRuntimeError(f"expected at least one thread, but got {threads}; leave it out")
    if engines is not None and backend not in ENGINE_BACKENDS:
        raise PidRuntimeError(
            f"expected the tensorrt backend to run engines {engines!r}, but got {backend!r}"
        )
    device = device_name(backend, device)
    if backend == "onnxruntime":
        try:
            from pid_runtime.backends.onnxruntime import LoadedSessions
        except ImportError as error:
            reason = "it is not installed" if isinstance(error, ModuleNotFoundError) else error
            raise PidRuntimeError(
                f"expected ONNX Runtime for the onnxruntime backend, but {reason}; "
                f"{INSTALL_ONNXRUNTIME}"
            ) from None

        provider, ordinal = split_device(device)
        return LoadedSessions(bundle, manifest, provider, ordinal, threads)
    if backend == "torch":
        try:
            from pid_runtime.backends.torch import LoadedStages
        except ImportError:
            raise PidRuntimeError(
                "expected PyTorch for the torch backend, but it is not installed; "
                "pip install 'pid-trt[torch]'"
            ) from None
        return LoadedStages(bundle, manifest, device, threads)
    if backend in ENGINE_BACKENDS:
        from pid_runtime.backends.tensorrt import LoadedEngines

        return LoadedEngines(
            bundle,
            manifest,
            device,
            engines,
            flavor=None if backend == "tensorrt" else backend,
            cuda_graphs=cuda_graphs,
            verify=verify,
        )
    raise PidRuntimeError(
        f"expected a backend of {', '.join(BACKENDS)}, but got {backend!r}; choose one of these"
    )
