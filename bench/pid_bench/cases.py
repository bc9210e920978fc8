"""What is measured, as data: backends, the network, and cases. Loads without torch."""

import math
from dataclasses import dataclass

from pid_ref.config import PidConfig
from pid_runtime.bundle.manifest import PRECISIONS
from pid_runtime.tiles import cut

PID = "pid"
"""The pipeline that cascades are compared with."""


@dataclass(frozen=True)
class Backend:
    """One way to run a pipeline."""

    name: str
    network: str
    """reference (the network as it stands), public (as the public code runs it) or program (our
    stages, from a bundle)."""
    compile: str
    """eager, inductor, graphs or engines; see `Case.compile`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    runtime: str = "torch"
    """Of a program: the backend of `Decoder`."""
    provider: str = ""
    """Of a program on ONNX Runtime: its provider, where that is not the device's name."""
    flavor: str = ""
    """Of a program on TensorRT: the engines' flavour."""


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager", "reference", "eager"),
        Backend("compile", "reference", "inductor"),
        Backend("public", "public", "eager"),
        Backend("torch", "program", "eager"),
        Backend("torch-compile", "program", "inductor"),
        Backend("onnxruntime", "program", "graphs", runtime="onnxruntime"),
        Backend(
            "onnxruntime-rtx",
            "program",
            "engines",
            ("cuda",),
            "onnxruntime",
            provider="nvtensorrtrtx",
        ),
        Backend("tensorrt", "program", "engines", ("cuda",), "tensorrt", flavor="tensorrt"),
        Backend("tensorrt-rtx", "program", "engines", ("cuda",), "tensorrt", flavor="tensorrt-rtx"),
    )
}
"""By name. Cascades, which have no bundle, run on those of torch alone."""


@dataclass(frozen=True)
class Network:
    """What PiD cases decode with."""

    space: str
    """Name of a latent space; "custom" for dimensions from a file without one."""
    variant: str
    config: PidConfig
    """As it runs, with fewer patch blocks than `full_depth` when it was reduced."""
    full_depth: int
    weights: str = "random"
    """"random", or "real" with a checkpoint or a bundle of one."""
    kept: tuple[str, ...] = ()
    """Graphs that its bundle does not round to 8 bits, in a precision that rounds."""

    @property
    def reduced(self) -> str:
        """How the network was made smaller; empty when it was not."""
        if self.config.patch_depth == self.full_depth:
            return ""
        return f"{self.config.patch_depth} of {self.full_depth} patch blocks"


@dataclass(frozen=True)
class Case:
    """A decode to be measured: everything that tells it apart, whatever it runs on."""

    pipeline: str
    """`PID`, a cascade such as "vae+rrdbnet", or what somebody published."""
    backend: str
    """A name of `BACKENDS`; empty for what was published."""
    space: str
    variant: str
    """Empty for cascades."""
    width: int
    """Of the image that comes out, in pixels."""
    height: int
    precision: str
    """As bundles have it."""
    device: str
    """cpu or cuda."""
    threads: int
    """On the CPU; 0 on CUDA."""
    steps: int
    """Sampler steps of PiD and of vae+sdx4; 0 for the other cascades."""
    depth: float
    """Patch blocks of PiD; of a cascade the share of its network's blocks that is kept."""
    weights: str
    """random or real."""
    tile: tuple[int, ...] = ()
    """Width and height in pixels of the tiles that a bundle decodes in; empty for none."""
    overlap: int = 0
    """Of the tiles, at least, in pixels; 0 where there are none."""

    @property
    def tile_name(self) -> str:
        """Such as "tile2176x2176-256"; empty where there are none."""
        return f"tile{self.tile[0]}x{self.tile[1]}-{self.overlap}" if self.tile else ""

    @property
    def key(self) -> str:
        """What a report knows it by."""
        parts = [self.pipeline, self.backend, self.space, self.variant]
        parts += [f"{self.width}x{self.height}", self.precision, self.device]
        parts += [f"depth{self.depth:g}", f"steps{self.steps}" if self.steps else ""]
        parts += [f"threads{self.threads}" if self.threads else "", self.weights, self.tile_name]
        return "/".join(part for part in parts if part)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image that comes out, in pixels."""
        return self.width, self.height

    @property
    def decoded_size(self) -> tuple[int, int]:
        """Width and height of what a bundle decodes at a time: a tile, or the image."""
        return (self.tile[0], self.tile[1]) if self.tile else self.size

    @property
    def label(self) -> str:
        """Pipeline and backend, for people."""
        parts = [self.pipeline, self.backend]
        parts += [f"tiles {self.tile[0]}x{self.tile[1]}"] if self.tile else []
        return ", ".join(part for part in parts if part)

    @property
    def compile(self) -> str:
        """eager, inductor, graphs (ONNX Runtime) or engines (TensorRT)."""
        return BACKENDS[self.backend].compile

    @property
    def dtype(self) -> str:
        """Of weights and activations, in words."""
        dtype = PRECISIONS[self.precision]
        if self.backend == "public":
            return f"float32 weights, {dtype} autocast"
        if BACKENDS[self.backend].network == "program" and dtype != "float32":
            return f"{dtype}, norms and tables float32"
        return dtype


def tiles_of(case: Case, config: PidConfig) -> int:
    """How many tiles a case decodes; 1 if it has none.

    Sides and overlap are multiples of the network's `size_multiple`.
    """
    side = config.size_multiple
    axes = [
        cut(size // side, tile // side, case.overlap // side)
        for size, tile in zip(case.size, case.decoded_size, strict=True)
    ]
    return math.prod(len(axis.starts) for axis in axes)


def tokens_of(config: PidConfig, size: tuple[int, int]) -> int:
    """Patch tokens of an image of `size` (width, height) pixels."""
    return (size[0] // config.patch_size) * (size[1] // config.patch_size)
