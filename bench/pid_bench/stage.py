"""What is measured and counted: a pipeline of modules, and how often a decode calls each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One module of a pipeline, and how a decode calls it."""

    name: str
    """What the module is: "vae decode", "rrdbnet", "transformer"."""
    make: Callable[[], nn.Module]
    """Makes the module on the default device and in the default dtype; see `build`."""
    inputs: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    """One call's positional arguments, the same random values every time; on meta only shapes."""
    steps: int = 1
    """Sampler steps that call the module."""
    cfg: int = 1
    """Calls in each step: 2 under classifier-free guidance, otherwise 1."""
    tiles: int = 1
    """Tiles the image or latent is cut into, each of which is one call."""

    @property
    def calls(self) -> int:
        """Calls in one decode: steps x cfg x tiles."""
        return self.steps * self.cfg * self.tiles

    def build(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The module, for inference; its weights are random, the same every time on a device.

        On the meta device it costs neither time nor memory.
        """
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with (
                torch.device(device),
                torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            ):
                torch.manual_seed(0)
                return self.make().to(device, dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Pipeline:
    """A way from a latent to an image, stage by stage."""

    latent_shape: tuple[int, int, int, int]
    """`[1, C, h, w]` of the normalised latent."""
    encoded: tuple[int, int]
    """Width and height in pixels of the image the latent stands for."""
    stages: tuple[Stage, ...]
    """In the order they are first called."""
    run: Callable[[Mapping[str, nn.Module], Tensor], Tensor]
    """The decode: modules by their stage's name, and the latent, to pixels.

    The latent is converted to the modules' dtype; the pixels are `[1, 3, H, W]` float32 on its
    device, about [-1, 1] (not clamped).
    """
    reduced: str = ""
    """How the modules were made smaller than the real ones, or "" when they were not."""

    def build(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Every stage's module by name; see `Stage.build`."""
        return {stage.name: stage.build(device, dtype) for stage in self.stages}


def normal(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard-normal values, the same every time on a device; on meta only the shape."""
    if device.type == "meta":
        return torch.empty(*shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)
