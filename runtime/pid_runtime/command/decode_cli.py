"""The `pid-decode` command: latents in safetensors files, or photos, to image files."""

import argparse
import contextlib
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.advice import advice
from pid_runtime.backends.choice import BACKENDS, device_name
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from pid_runtime.command import console
from pid_runtime.command.decode_jobs import (
    Job,
    Settings,
    Source,
    check_target,
    check_targets,
    find_sources,
    plan_jobs,
    request_of,
    skipped_files,
    without_existing,
)
from pid_runtime.command.images import save_image, sheet_size, side_by_side
from pid_runtime.decoder import Decoder
from pid_runtime.errors import NotFiniteError, PidRuntimeError
from pid_runtime.latents import spread_warning
from pid_runtime.request import RULES, Schedule, check_schedule

FORMATS = ("png", "jpg", "webp")

Pixels = NDArray[np.uint8]

_EXAMPLES = """examples:
  pid-decode flux-2k --latent latent.safetensors --caption caption.safetensors -o image.png
  pid-decode flux-2k --latents latents/ --captions captions/ --seed 7 --format webp -o images/
  pid-decode flux-2k --latent latent.safetensors -o image.png --backend tensorrt
  pid-decode nano --image photo.jpg -o larger.png

files:
  A latent file has one tensor, or one named "latent": [C, h, w] or [B, C, h, w] in float32,
  float16 or bfloat16, normalised as the bundle's manifest says. It may also hold "caption",
  [T, D] or [B, T, D], and "sigma", a number or [B]. ComfyUI's .latent files are known, and
  normalised. A batch makes image-0.png, image-1.png, ..
  Image b of a file is decoded with seed + b, so a file gives the same images alone or among
  others. Names, sizes and types of all inputs are checked before the first decode. Images appear
  whole or not at all.

photos:
  A bundle of space nano makes its latents itself: --image takes any photo that Pillow reads, and
  the image is it at four times its size. It is turned as its EXIF data says, converted to sRGB,
  and put on white where it is transparent; --fit reduces one that is too large. --sigma adds as
  much noise, of the seed, to the latent.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _decode, argv, also=(OSError,))


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-decode",
        "Decode latents, or photos, to images with a bundle made by pid-export.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's folder")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--latent", type=Path, metavar="FILE", help="a latent file")
    inputs.add_argument("--latents", type=Path, metavar="DIR", help="a folder of latent files")
    inputs.add_argument("--image", type=Path, metavar="FILE", help="a photo, for space nano")
    inputs.add_argument("--images", type=Path, metavar="DIR", help="a folder of photos")
    add("-o", "--output", type=Path, required=True, help="an image, or a folder for a folder")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--caption", type=Path, metavar="FILE", help="one caption for all")
    captions.add_argument(
        "--captions", type=Path, metavar="DIR", help="a folder of captions named as the inputs"
    )
    add("--latent-key", metavar="NAME", help="the latent's tensor, if it has another name")
    add("--caption-key", metavar="NAME", help="the caption's tensor, if it has another name")
    add(
        "--sigma",
        type=_number,
        help="noise level of the latents, 0 to 1; of a photo's, noise to add "
        "(default: the files', or 0)",
    )
    add("--fit", action="store_true", help="reduce photos that are too large for the bundle")
    add("--seed", type=_seed, default=0, help="of the first image of every file")
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument("--steps", type=int, help="1, 2 or 4 (default: what the bundle says)")
    schedule.add_argument(
        "--times", type=_times, help="for bundles of any times: 1.0,0.75,0.5,0.25,0"
    )
    add(
        "--rule",
        choices=RULES,
        default=RULES[0],
        help="sde, which adds noise between steps, or ode",
    )
    add(
        "--format",
        choices=FORMATS,
        help=f"of the images in a folder: {', '.join(FORMATS)} (default: png)",
    )
    add("--sheet", type=Path, metavar="FILE", help="also write all images side by side")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace images that exist")
    existing.add_argument(
        "--skip-existing", action="store_true", help="keep images that exist, and make the others"
    )
    add("--no-metadata", action="store_true", help="do not write into images how they were made")
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
    return parser


def _decode(arguments: Namespace) -> None:
    many = (arguments.latents or arguments.images) is not None
    photos = (arguments.image or arguments.images) is not None
    _check_kinds(arguments, many=many, photos=photos)
    settings = Settings(
        arguments.latent_key,
        arguments.caption_key,
        arguments.sigma,
        arguments.seed,
        arguments.steps,
        arguments.times,
        arguments.rule,
        arguments.fit,
    )
    manifest = read_manifest(arguments.bundle, verify=False)
    schedule = check_schedule(
        manifest.sampler, steps=settings.steps, times=settings.times, rule=settings.rule
    )
    path = arguments.latent or arguments.latents or arguments.image or arguments.images
    sources = find_sources(path, arguments.caption, arguments.captions, photos=photos)
    skipped = skipped_files(path, photos=photos) if many else None
    jobs = plan_jobs(manifest, sources, settings, _namer(arguments, many))
    planned = len(jobs)
    if arguments.skip_existing:
        jobs = without_existing(jobs)
    making = _Making(arguments, manifest, schedule)
    if not jobs:
        _report(arguments, making, jobs, [], planned)
        return
    folder = _folder(arguments.output) if many else contextlib.nullcontext()
    with folder:
        check_targets(jobs, overwrite=arguments.overwrite)
        _check_sheet(arguments, jobs)
        decoder = Decoder.open(
            arguments.bundle,
            arguments.backend,
            arguments.device,
            threads=arguments.threads,
            verify=not arguments.no_verify,
            engines=arguments.engines,
            cuda_graphs=not arguments.no_cuda_graphs,
            manifest=manifest,
        )
        with decoder:
            decoder.warn([skipped] if skipped else [])
            decoder.warn(_advice(decoder.manifest.model, jobs))
            total = schedule.steps * len(jobs)
            with console.progress("Decoding", total, quiet=arguments.quiet) as advance:
                seconds, tiles = _run(decoder, jobs, settings, making, advance)
        if arguments.sheet:
            save_image(arguments.sheet, side_by_side(tiles))
    _report(arguments, making, jobs, seconds, planned)


class _Making:
    """How images are made, for the result and for the images themselves."""

    def __init__(self, arguments: Namespace, manifest: Manifest, schedule: Schedule) -> None:
        self.keep_tiles, self.in_images = bool(arguments.sheet), not arguments.no_metadata
        self.common: dict[str, Any] = {
            "bundle_sha256": file_sha256(arguments.bundle / MANIFEST_FILE),
            "backend": arguments.backend,
            "device": device_name(arguments.backend, arguments.device),
            "steps": schedule.steps,
            "times": None if arguments.times is None else list(arguments.times),
            "rule": arguments.rule,
        }
        self._model = {"model": manifest.model.get("name"), "precision": manifest.precision}
        self._license = manifest.model.get("weights_license")

    def record(self, job: Job) -> dict[str, Any] | None:
        """What an image says of its making; None if it is to say nothing."""
        if not self.in_images:
            return None
        image = {"seed": job.seed, "sigma": job.sigma, "width": job.width, "height": job.height}
        rights = {} if self._license is None else {"weights_license": self._license}
        return {**self._model, **self.common, **image, **rights}


def _run(
    decoder: Decoder,
    jobs: Sequence[Job],
    settings: Settings,
    making: _Making,
    advance: Callable[[float], None],
) -> tuple[list[float], list[tuple[str, Pixels]]]:
    """Decode and write every image; seconds of each decode, and the images of a sheet."""
    seconds: list[float] = []
    tiles: list[tuple[str, Pixels]] = []
    for source, group in itertools.groupby(jobs, lambda job: job.source):
        inputs = source.read(decoder.manifest, settings)
        for job in group:
            own = inputs.image(job.index)
            request = request_of(decoder.manifest, own, settings, job.seed)
            if spread := spread_warning(decoder.manifest, own.latent):
                decoder.warn([f"{source.path}: {spread}"])
            begin = time.perf_counter()
            try:
                images: Pixels = decoder.run(
                    request, "uint8", progress=lambda _done, _total: advance(1)
                )
            except NotFiniteError as error:
                raise PidRuntimeError(f"{source.path}: {error}") from None
            seconds.append(time.perf_counter() - begin)
            image = images[0, : job.height, : job.width]
            save_image(job.target, image, making.record(job))
            if making.keep_tiles:
                tiles.append((job.target.stem, image))
    return seconds, tiles


def _report(
    arguments: Namespace,
    making: _Making,
    jobs: Sequence[Job],
    seconds: Sequence[float],
    planned: int,
) -> None:
    images = [
        {
            "photo" if job.source.is_photo else "latent": str(job.source.path),
            "index": job.index,
            "image": str(job.target),
            "width": job.width,
            "height": job.height,
            "seed": job.seed,
            "sigma": job.sigma,
            "seconds": round(taken, 4),
        }
        for job, taken in zip(jobs, seconds, strict=True)
    ]
    result = {
        "bundle": str(arguments.bundle),
        **making.common,
        "images": images,
        "skipped": planned - len(jobs),
        "sheet": str(arguments.sheet) if arguments.sheet and jobs else None,
    }
    lines = [
        f"{image['image']}: {image['width']}x{image['height']}, seed {image['seed']}, "
        f"{image['seconds']:.2f} s"
        for image in images
    ]
    if planned > len(jobs):
        lines.append(f"{planned - len(jobs)} of {planned} images were there already")
    if arguments.sheet and jobs:
        lines.append(f"{arguments.sheet}: all of them side by side")
    console.emit(result, "\n".join(lines), as_json=arguments.json)


def _advice(model: dict[str, Any], jobs: Sequence[Job]) -> list[str]:
    """What to say about images that will be made, but not as well as they could."""
    largest_sigma = max(job.sigma for job in jobs)
    lines = [
        line
        for job in jobs
        for line in advice(model, (job.width, job.height), largest_sigma, has_caption=True)
    ]
    bare = sum(not job.has_caption for job in jobs)
    if bare and model.get("captioned") is not False:
        lines.append(
            f"{bare} of {len(jobs)} images have no caption and get the empty embedding (zeros), "
            "which costs quality; give the prompt's embedding, made by pid-caption, by --caption"
        )
    return lines


def _check_kinds(arguments: Namespace, *, many: bool, photos: bool) -> None:
    """Raise `PidRuntimeError` for options that do not belong together."""
    one, all_of = ("--image", "--images") if photos else ("--latent", "--latents")
    for name in ("captions", "format"):
        if getattr(arguments, name) is not None and not many:
            raise PidRuntimeError(f"expected --{name} with {all_of}, but got {one}; drop it")
    if arguments.fit and not photos:
        raise PidRuntimeError(f"expected --fit with a photo, but got {one}; drop it")
    if photos and arguments.latent_key is not None:
        raise PidRuntimeError("expected --latent-key with a latent, but got a photo; drop it")
    for name in ("latent", "image", "caption"):
        file = getattr(arguments, name)
        if file is not None and file.is_dir():
            raise PidRuntimeError(
                f"expected a file for --{name}, but {file} is a folder; use --{name}s"
            )
    for name in ("latents", "images", "captions"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            raise PidRuntimeError(f"expected a folder for --{name}, but {folder} is none")


def _namer(arguments: Namespace, many: bool) -> Callable[[Source], Path]:
    """What to call the image of a source."""
    output: Path = arguments.output
    if not many:
        return lambda source: output
    return lambda source: output / f"{source.path.stem}.{arguments.format or FORMATS[0]}"


def _check_sheet(arguments: Namespace, jobs: Sequence[Job]) -> None:
    if arguments.sheet is None:
        return
    if arguments.sheet.resolve() in {job.target.resolve() for job in jobs}:
        raise PidRuntimeError(
            f"expected another name for the sheet, but {arguments.sheet} is that of an image"
        )
    size = sheet_size([(job.height, job.width) for job in jobs])
    check_target(arguments.sheet, *size, overwrite=arguments.overwrite)


@contextlib.contextmanager
def _folder(path: Path) -> Generator[None, None, None]:
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


def _times(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, but got {text!r}") from None


def _seed(text: str) -> int:
    return _integer(text, 0, 2**64 - 1, "2^64 - 1")


def _threads(text: str) -> int:
    return _integer(text, 1, 4096, "4096")


def _integer(text: str, least: int, most: int, most_text: str) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most_text}, but got {text!r}"
        )
    return int(text)
