"""The builders of the TensorRT libraries: which is there, and what GPUs it builds for."""

import importlib
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from pid_engines.errors import BuildInputError
from pid_runtime.backends.device import CudaDevice
from pid_runtime.bundle.flavors import FLAVORS, Flavor
from pid_runtime.errors import PidRuntimeError


@dataclass(frozen=True)
class Builder:
    """Where the builder of a library differs from the others."""

    targets: tuple[str, ...]
    """GPU architectures it builds for without having one; none when it builds where it runs."""
    default_targets: tuple[str, ...]
    flags: tuple[tuple[str, str], ...]
    """Flags of the manifest that are always set, each with its name in `BuilderFlag`."""
    timing_cache: bool
    """Whether it times kernels on the GPU, one build at a time, and caches what it measured."""


BUILDERS = {
    "tensorrt-rtx": Builder(
        FLAVORS["tensorrt-rtx"].architectures,
        ("sm86", "sm89", "sm120"),
        # CUDA graphs can only be captured of engines that allocate nothing themselves.
        (("user_allocation", "REQUIRE_USER_ALLOCATION"),),
        timing_cache=False,
    ),
    "tensorrt": Builder((), (), (), timing_cache=True),
}
"""By the name of the flavour; `--flavor auto` takes the first that is installed."""

OLDEST_POLYGRAPHY = "0.53.6"
"""That was tried with both libraries' interfaces; as in pyproject.toml."""

FIRST_WITH_BF16 = 80
"""Oldest architecture with bfloat16 arithmetic, as the number in its name."""

FIRST_WITH_FP8 = 89
"""Oldest architecture that multiplies 8-bit floats."""


def architecture(target: str) -> int:
    """The number of a target: 86 for sm86."""
    return int(target.removeprefix("sm"))


def capability(target: str) -> tuple[int, int]:
    """The compute capability of a target: 8 and 6 for sm86."""
    return divmod(architecture(target), 10)


def load_library(flavor: Flavor) -> Any:
    """The library's module. Raises `ImportError` or `OSError` when it is not installed."""
    return importlib.import_module(flavor.modules[0])


def load_polygraphy(flavor: Flavor) -> Any:
    """Polygraphy for this library, which it serves until the process ends.

    Not for the process of a command: what else is there may want Polygraphy for another library.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavor.name == "tensorrt-rtx" else "0"
    for name in ("backend.tensorrt_rtx", "backend.trt", "exception"):
        importlib.import_module(f"polygraphy.{name}")
    return importlib.import_module("polygraphy")


def library_version(flavor: Flavor) -> str | None:
    """The library's version, or None when it is not installed."""
    try:
        return str(load_library(flavor).__version__)
    except (ImportError, OSError):
        return None


def find_flavor(name: str) -> tuple[Flavor, str]:
    """The library of that name, or with "auto" the first one installed, and its version.

    Raises `BuildInputError` for an unknown name, and when it or Polygraphy is not installed.
    """
    if name != "auto" and name not in BUILDERS:
        known = ", ".join((*BUILDERS, "auto"))
        raise BuildInputError(f"expected --flavor to be one of {known}, but got {name!r}")
    wanted = [FLAVORS[each] for each in BUILDERS if name in (each, "auto")]
    for flavor in wanted:
        version = library_version(flavor)
        if version is not None:
            _check_polygraphy(flavor)
            return flavor, version
    titles = " or ".join(flavor.title for flavor in wanted)
    commands = " or ".join(flavor.install for flavor in wanted)
    raise BuildInputError(
        f"expected {titles} to be installed, but cannot import "
        f"{' or '.join(flavor.modules[0] for flavor in wanted)}; {commands}"
    )


def _check_polygraphy(flavor: Flavor) -> None:
    try:
        version = metadata.version("polygraphy")
    except metadata.PackageNotFoundError:
        version = "none"
    if version == "none" or Version(version) < Version(OLDEST_POLYGRAPHY):
        raise BuildInputError(
            f"expected polygraphy {OLDEST_POLYGRAPHY} or newer, which drives {flavor.title}, but "
            f"got {version}; {flavor.install}"
        )


def gpu_target() -> str:
    """The architecture of this machine's first GPU. Raises `BuildInputError` if there is none."""
    try:
        return CudaDevice(0).target
    except PidRuntimeError as error:
        reason = str(error).partition(";")[0]
        raise BuildInputError(
            f"{reason}; run pid-build where the GPU is, or name GPU architectures, which "
            "TensorRT for RTX needs none for: --flavor tensorrt-rtx --target sm89"
        ) from None


def parse_targets(text: str | None, flavor: Flavor, oldest: int = 0) -> tuple[str, ...]:
    """Read "sm86,sm89", "current" or None for the flavour's own choice; oldest first.

    oldest: of the flavour's own choice.
    Raises `BuildInputError` for what the flavour does not build for.
    """
    builder = BUILDERS[flavor.name]
    if text is None:
        chosen = tuple(each for each in builder.default_targets if architecture(each) >= oldest)
        return chosen or (gpu_target(),)
    names = {part.strip() for part in text.split(",")}
    if names == {"current"}:
        names = {gpu_target()}
    elif not builder.targets:
        here = gpu_target()
        if names != {here}:
            raise BuildInputError(
                f"expected --target current, as {flavor.title} builds for the GPU that is there "
                f"({here}), but got {text!r}; run pid-build on the other GPU, or take --flavor "
                "tensorrt-rtx"
            )
    for name in sorted(names):
        if builder.targets and name not in builder.targets:
            raise BuildInputError(
                f"expected targets of {', '.join(builder.targets)} or current, which "
                f"{flavor.title} builds for, but got {name!r}{_hint(name)}"
            )
    return tuple(sorted(names, key=architecture))


def _hint(name: str) -> str:
    if name in ("sm90", "sm100", "sm103"):
        return "; data-centre GPUs newer than Ampere need --flavor tensorrt"
    return "; as in --target sm86,sm89"
