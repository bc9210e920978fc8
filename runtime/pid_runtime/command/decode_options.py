"""What every command that decodes shares: options, how images are made, where they go."""

import argparse
import contextlib
from argparse import Namespace
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pid_runtime.backends.choice import BACKENDS, device_name
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from pid_runtime.command.images import FORMATS
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.schedule import Schedule


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of images in a folder, of those that exist, and of how they were made."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help=f"of the images in a folder: {', '.join(FORMATS)} (default: png, of huge ones tiff)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace images that exist")
    existing.add_argument(
        "--skip-existing", action="store_true", help="keep images that exist, and make the others"
    )
    parser.add_argument(
        "--no-metadata", action="store_true", help="do not write into images how they were made"
    )


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Which backend runs the bundle, and where: what `open_decoder` takes."""
    add = parser.add_argument
    add("--backend", default=BACKENDS[0], help=", ".join(BACKENDS))
    add(
        "--device",
        "--provider",
        metavar="NAME",
        help="cpu, cuda:0, or an ONNX Runtime provider (default: cpu; of tensorrt cuda:0)",
    )
    add("--engines", metavar="NAME", help="tensorrt: the engine set (default: the first that fits)")
    add("--threads", type=_threads, metavar="N", help="on the CPU (default: all cores)")
    add("--no-cuda-graphs", action="store_true", help="tensorrt: do not record and replay steps")
    add("--no-verify", action="store_true", help="do not hash the bundle's files first")


def open_decoder(arguments: Namespace, manifest: Manifest) -> Decoder:
    """A decoder of `arguments.bundle`, whose manifest was read, as `add_backend_options` asks."""
    return Decoder.open(
        arguments.bundle,
        arguments.backend,
        arguments.device,
        threads=arguments.threads,
        verify=not arguments.no_verify,
        engines=arguments.engines,
        cuda_graphs=not arguments.no_cuda_graphs,
        manifest=manifest,
    )


class Making:
    """How images are made, for the result and for the images themselves."""

    def __init__(self, arguments: Namespace, manifest: Manifest, schedule: Schedule) -> None:
        self._in_images = not arguments.no_metadata
        self.common: dict[str, Any] = {
            "bundle_sha256": file_sha256(arguments.bundle / MANIFEST_FILE),
            "backend": arguments.backend,
            "device": device_name(arguments.backend, arguments.device),
            "steps": schedule.steps,
            "times": None if arguments.times is None else list(arguments.times),
            "rule": schedule.rule,
            **_guided_and_tiled(arguments, manifest),
        }
        self._model = {"model": manifest.model.get("name"), "precision": manifest.precision}
        self._license = manifest.model.get("weights_license")

    def record(
        self, *, seed: int, sigma: float, width: int, height: int, **more: Any
    ) -> dict[str, Any] | None:
        """What an image says of its making; None if it is to say nothing."""
        if not self._in_images:
            return None
        image = {"seed": seed, "sigma": sigma, "width": width, "height": height, **more}
        rights = {} if self._license is None else {"weights_license": self._license}
        return {**self._model, **self.common, **image, **rights}


def _guided_and_tiled(arguments: Namespace, manifest: Manifest) -> dict[str, Any]:
    """What is said of guidance and tiles where there are any."""
    asked = arguments.decode_guidance
    guidance = manifest.sampler.guidance if asked is None else asked
    tile = arguments.tile if arguments.tile in (None, "auto") else list(arguments.tile)
    found = {
        "guidance": None if guidance == 1 else guidance,
        "negative": None if arguments.negative is None else str(arguments.negative),
        "tile": tile,
        "overlap": arguments.overlap,
    }
    return {name: value for name, value in found.items() if value is not None}


@contextlib.contextmanager
def image_folder(path: Path) -> Generator[None, None, None]:
    """Make a folder of which nothing is left if nothing was put into it."""
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise PidRuntimeError(
                f"expected a folder for the images, but {path} is a file; choose another name"
            ) from None
        yield
        return
    except OSError as error:
        raise PidRuntimeError(
            f"expected to make the folder {path}, but got: {error.strerror}; choose another place"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # refused unless it is empty


def number(text: str) -> float:
    """An option's number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, but got {text!r}") from None


def seed(text: str) -> int:
    """An option's seed, of 64 bits."""
    return whole_number(text, 0, 2**64 - 1, "2^64 - 1")


def _threads(text: str) -> int:
    return whole_number(text, 1, 4096, "4096")


def whole_number(text: str, least: int, most: int, most_text: str) -> int:
    """An option's whole number, from `least` to `most`."""
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most_text}, but got {text!r}"
        )
    return int(text)
