"""Which cases a run consists of: pipelines, backends, sizes and precisions, as data."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pid_bench.cascades import UPSCALER_STEPS
from pid_bench.errors import BenchInputError
from pid_export.bundle import BUCKETS
from pid_ref.config import PidConfig
from pid_runtime.bundle.manifest import PRECISIONS
from pid_runtime.command.console import read_size

PID = "pid"
"""The pipeline that cascades are compared with."""


@dataclass(frozen=True)
class Backend:
    """One way to run a pipeline."""

    name: str
    title: str
    """What it is, for tables."""
    network: str
    """reference (the network as it stands), public (as the public code runs it) or program (our
    stages, from a bundle)."""
    compile: str
    """eager, inductor, graphs or engines; see `Row.compile`."""
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
        Backend("eager", "reference, torch eager", "reference", "eager"),
        Backend("compile", "reference, torch.compile", "reference", "inductor"),
        Backend("public", "as the public code runs it", "public", "eager"),
        Backend("torch", "our stages, torch eager", "program", "eager"),
        Backend("torch-compile", "our stages, torch.compile", "program", "inductor"),
        Backend(
            "onnxruntime", "our stages, ONNX Runtime", "program", "graphs", runtime="onnxruntime"
        ),
        Backend(
            "onnxruntime-rtx",
            "our stages, ONNX Runtime with TensorRT for RTX",
            "program",
            "engines",
            ("cuda",),
            runtime="onnxruntime",
            provider="nvtensorrtrtx",
        ),
        Backend(
            "tensorrt",
            "our stages, TensorRT",
            "program",
            "engines",
            ("cuda",),
            runtime="tensorrt",
            flavor="enterprise",
        ),
        Backend(
            "tensorrt-rtx",
            "our stages, TensorRT for RTX",
            "program",
            "engines",
            ("cuda",),
            runtime="tensorrt",
            flavor="rtx",
        ),
    )
}
"""By name. Cascades, which have no bundle, run on `CASCADE_BACKENDS`."""

CASCADE_BACKENDS = ("eager", "compile")

DEFAULT_BACKENDS = {
    "cpu": ("eager", "compile", "onnxruntime"),
    "cuda": ("eager", "compile", "public", "torch", "torch-compile"),
}
"""By device, when nothing is said; on CUDA what else is installed is added."""

QUICK_BACKENDS = {"cpu": ("eager", "onnxruntime"), "cuda": ("eager",)}

DRY_BACKENDS = ("eager", "torch")
"""The network as it stands, and our stages: what other backends do is the work of one of these."""

DEFAULT_SIZES = {"cpu": ((256, 256),), "cuda": ((2048, 2048), (4096, 4096))}
"""Width and height by device. A laptop is not made to work for hours unless it is told to."""

DRY_SIZES = ((2048, 2048), (4096, 4096))

QUICK_DEPTH = 1
"""Patch blocks of --quick on the CPU."""


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

    @property
    def reduced(self) -> str:
        """How the network was made smaller; empty when it was not."""
        if self.config.patch_depth == self.full_depth:
            return ""
        return f"{self.config.patch_depth} of {self.full_depth} patch blocks"


@dataclass(frozen=True)
class Case:
    """One row to be: everything that tells it apart, whatever it runs on."""

    pipeline: str
    """`PID` or a cascade's name."""
    backend: str
    space: str
    variant: str
    """Empty for cascades."""
    width: int
    """Of the image that comes out, in pixels."""
    height: int
    precision: str
    device: str
    threads: int
    """On the CPU; 0 on CUDA."""
    steps: int
    """Sampler steps of PiD and of vae+sdx4; 0 for the other cascades."""
    depth: float
    """Patch blocks of PiD; of a cascade the share of its network's blocks that is kept."""
    weights: str

    @property
    def key(self) -> str:
        """What a report knows it by."""
        parts = [self.pipeline, self.backend, self.space, self.variant]
        parts += [f"{self.width}x{self.height}", self.precision, self.device]
        parts += [f"depth{self.depth:g}", f"steps{self.steps}" if self.steps else ""]
        parts += [f"threads{self.threads}" if self.threads else "", self.weights]
        return "/".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """What the command line asks for, checked."""

    network: Network
    sizes: tuple[tuple[int, int], ...]
    backends: tuple[str, ...]
    cascades: tuple[str, ...]
    precisions: tuple[str, ...]
    device: str
    threads: int
    steps: int
    """Of PiD."""
    cascade_depth: float = 1.0
    """Share of the blocks of a cascade's network that is kept."""
    sdx4_steps: int = UPSCALER_STEPS


def plan(selection: Selection) -> list[Case]:
    """All cases, those that are to be compared next to each other."""
    network = selection.network
    cases: list[Case] = []
    for width, height in selection.sizes:
        for precision in selection.precisions:
            common = Case(
                pipeline=PID,
                backend="",
                space=network.space,
                variant=network.variant,
                width=width,
                height=height,
                precision=precision,
                device=selection.device,
                threads=selection.threads if selection.device == "cpu" else 0,
                steps=selection.steps,
                depth=network.config.patch_depth,
                weights=network.weights,
            )
            cases += [replace(common, backend=name) for name in selection.backends]
            cascade = replace(common, variant="", depth=selection.cascade_depth, weights="random")
            levels = [name for name in CASCADE_BACKENDS if name in selection.backends]
            cases += [
                replace(
                    cascade,
                    pipeline=name,
                    backend=level,
                    steps=selection.sdx4_steps if name == "vae+sdx4" else 0,
                )
                for name in selection.cascades
                for level in levels or CASCADE_BACKENDS[:1]
            ]
    return [case for case in cases if _makes_sense(case)]


def _makes_sense(case: Case) -> bool:
    """Whether a backend has a precision at all.

    What the public code does is bf16 autocast. ONNX Runtime has no bf16 on the CPU.
    """
    if case.backend == "public":
        return case.precision == "bf16"
    return not (case.backend == "onnxruntime" and case.device == "cpu" and case.precision == "bf16")


def parse_list(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Read "a,b", each one known, or "all" or "none". Raises `BenchInputError` otherwise."""
    known = tuple(known)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            raise BenchInputError(
                f"expected {option} of {', '.join(known)} (or all, none), but got {name[:60]!r}; "
                "choose from these"
            )
    return names


def parse_sizes(text: str, config: PidConfig) -> tuple[tuple[int, int], ...]:
    """Read "2048x2048,2688x1536" as widths and heights.

    Raises `PidRuntimeError` for other text, `BenchInputError` for a size the network has not, or
    that no bucket holds.
    """
    multiple, sizes = config.size_multiple, list[tuple[int, int]]()
    for part in text.split(","):
        size = read_size(part.strip())
        if config.latent_size(size[1], size[0]) is None:
            raise BenchInputError(
                f"expected width and height in multiples of {multiple}, but got {part.strip()}; "
                f"{_rounded(size[0], multiple)}x{_rounded(size[1], multiple)} is near"
            )
        tokens, most = tokens_of(config, size), max(BUCKETS.values())
        if tokens > most:
            raise BenchInputError(
                f"expected a size of at most {most} tokens (bucket 4k: 4096x4096, or as many "
                f"pixels in another shape), but got {part.strip()} of {tokens}"
            )
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def parse_precisions(text: str) -> tuple[str, ...]:
    """Read "bf16,fp32". Raises `BenchInputError` for others."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PRECISIONS:
            raise BenchInputError(
                f"expected --precision of {', '.join(PRECISIONS)}, but got {name[:60]!r}"
            )
    return names


def buckets_for(config: PidConfig, sizes: Sequence[tuple[int, int]]) -> tuple[tuple[str, int], ...]:
    """Buckets of a bundle for these sizes: the usual ones, and one for what is much smaller."""
    needed = [tokens_of(config, size) for size in sizes]
    smallest = min(BUCKETS.values())
    small = [tokens for tokens in needed if 2 * tokens <= smallest]
    found = {"small": max(small)} if small else {}
    for tokens in needed:
        if tokens not in small:
            name = min(
                (n for n, most in BUCKETS.items() if most >= tokens), key=BUCKETS.__getitem__
            )
            found[name] = BUCKETS[name]
    return tuple(found.items())


def tokens_of(config: PidConfig, size: tuple[int, int]) -> int:
    """Patch tokens of an image of `size` (width, height) pixels."""
    return (size[0] // config.patch_size) * (size[1] // config.patch_size)


def variant_of_file(fields: Mapping[str, Any]) -> str:
    """A short name for dimensions from a file: the same for the same dimensions."""
    text = json.dumps(dict(fields), sort_keys=True)
    return "config-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def _rounded(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
