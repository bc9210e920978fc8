"""The TensorRT libraries, which are the flavours of engines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flavor:
    """A library, and where it differs from the others. All else is the same in all of them."""

    name: str
    """What engine sets and `pid-build --flavor` call it."""
    title: str
    """What people call it."""
    modules: tuple[str, ...]
    """Python modules that run its engines, the best first; that one builds them too."""
    install: str
    """The command that installs it."""
    compiles: bool
    """Whether it compiles kernels for the GPU at run time, and so has a cache of them, kernels for
    the shape at hand, and engines that cannot be captured in a CUDA graph before it is done."""


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        Flavor(
            "tensorrt",
            "TensorRT",
            ("tensorrt", "tensorrt_lean"),
            "pip install 'pid-trt[tensorrt]'",
            compiles=False,
        ),
        Flavor(
            "tensorrt-rtx",
            "TensorRT for RTX",
            ("tensorrt_rtx",),
            "pip install 'pid-trt[tensorrt-rtx]'",
            compiles=True,
        ),
    )
}
"""By name."""
