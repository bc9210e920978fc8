"""The TensorRT libraries, which are the flavours of engines."""

from collections.abc import Container
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
    architectures: tuple[str, ...]
    """GPU architectures that its engines run on, oldest first; none for those of any NVIDIA GPU
    that its version knows."""
    compiles: bool
    """Whether it compiles kernels for the GPU at run time, and so has a cache of them, kernels for
    the shape at hand, and engines that cannot be captured in a CUDA graph before it is done."""

    def runs_on(self, target: str) -> bool:
        """Whether its engines run on a GPU architecture, such as sm86."""
        return not self.architectures or target in self.architectures


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        Flavor(
            "tensorrt",
            "TensorRT",
            ("tensorrt", "tensorrt_lean"),
            "pip install 'pid-trt[tensorrt]'",
            (),
            compiles=False,
        ),
        Flavor(
            "tensorrt-rtx",
            "TensorRT for RTX",
            ("tensorrt_rtx",),
            "pip install 'pid-trt[tensorrt-rtx]'",
            ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
            compiles=True,
        ),
    )
}
"""By name."""


def flavor_for(target: str, installed: Container[str], wanted: str = "tensorrt-rtx") -> Flavor:
    """The flavour of engines to advise for a GPU architecture: one that runs there.

    Of those the wanted one, else one that is installed; installed: flavours, by name.
    """
    able = [flavor for flavor in FLAVORS.values() if flavor.runs_on(target)]
    return min(able, key=lambda each: (each.name != wanted, each.name not in installed))
