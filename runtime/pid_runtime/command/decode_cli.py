"""The `pid-decode` command: latents in safetensors files to image files."""

import argparse
import contextlib
import itertools
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.advice import advice
from pid_runtime.backends.choice import device_name
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.command.decode_jobs import (
    Inputs,
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
from pid_runtime.command.decode_options import (
    Making,
    add_backend_options,
    add_image_options,
    image_folder,
    open_decoder,
)
from pid_runtime.command.images import save_image, sheet_size, side_by_side, usual_format
from pid_runtime.command.latent_files import LATENT_SUFFIXES
from pid_runtime.command.latent_options import (
    add_latent_options,
    add_latent_paths,
    check_latent_options,
    latent_settings,
)
from pid_runtime.command.sampling_options import add_sampling_options, read_sampling
from pid_runtime.command.spread import Save, add_spread_options, check_spread, spread
from pid_runtime.decoder import Decoder
from pid_runtime.errors import NotFiniteError, PidRuntimeError
from pid_runtime.latents import spread_warning

_log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

_EXAMPLES = """examples:
  pid-decode flux-2k --latent latent.safetensors --caption caption.safetensors -o image.png
  pid-decode flux-2k --latents latents/ --captions captions/ --seed 7 --format webp -o images/
  pid-decode flux-2k --latent latent.safetensors -o image.png --backend tensorrt
  pid-decode flux-2k --latent large.safetensors -o large.png --tile auto
  pid-decode flux-any --latent latent.safetensors --caption caption.safetensors \\
      --negative caption.safetensors --guidance 5 -o image.png

files:
  A latent file has one tensor, or one named "latent": [C, h, w] or [B, C, h, w] in float32,
  float16 or bfloat16, normalised as the bundle's manifest says. It may also hold "caption",
  [T, D] or [B, T, D], and "sigma", a number or [B]. ComfyUI's .latent files are known, and
  normalised. A batch makes image-0.png, image-1.png, ..
  Image b of a file is decoded with seed + b, so a file gives the same images alone or among
  others. Names, sizes and types of all inputs are checked before the first decode. Images appear
  whole or not at all.
  .npy files, and tensors by torch.save, are read too. --latent-form says what a file does not:
  raw, as a VAE's encoder gives it; raw:flux2_ae.safetensors, of FLUX.2, which is normalised by
  statistics in its VAE's file; or packed, tokens [B, n, width] of a square picture or of another,
  packed:1024x768.

  Photos go to pid-upscale, which encodes them first.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _decode, argv, also=(OSError,))


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-decode",
        "Decode latents to images with a bundle made by pid-export.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's folder")
    add_latent_paths(parser, hidden=("--image", "--images"))  # Where photos were, until they moved.
    add("-o", "--output", type=Path, help="an image, or a folder for a folder")
    add("--plan", action="store_true", help="say what decoding would take, and stop")
    add_latent_options(parser)
    add_sampling_options(parser)
    add_image_options(parser)
    add("--sheet", type=Path, metavar="FILE", help="also write all images side by side")
    add_backend_options(parser)
    add_spread_options(parser)
    return parser


def _decode(arguments: Namespace) -> int:
    many = arguments.latents is not None
    _check_kinds(arguments, many=many)
    check_spread(arguments)
    manifest = read_manifest(arguments.bundle, verify=False)
    sampling = read_sampling(arguments, manifest, batches=True)
    settings = latent_settings(arguments, sampling)
    path = arguments.latents if many else arguments.latent
    sources = find_sources(path, arguments.caption, arguments.captions)
    skipped = skipped_files(path, LATENT_SUFFIXES) if many else None
    on_device = device_name(arguments.backend, arguments.device) != "cpu"
    name = _namer(arguments, many)
    jobs = plan_jobs(manifest, sources, settings, name, on_device=on_device)
    if arguments.plan:
        _show_plans(arguments, jobs)
        return 0
    planned = len(jobs)
    if arguments.skip_existing:
        jobs = without_existing(jobs)
    making = Making(arguments, manifest, sampling.schedule(manifest))
    run = _Run(arguments, manifest, settings, making, planned - len(jobs))
    if not jobs:
        return run.report()
    with image_folder(arguments.output) if many else contextlib.nullcontext():
        check_targets(jobs, overwrite=arguments.overwrite)
        _check_sheet(arguments, jobs)
        warnings = [*([skipped] if skipped else []), *_advice(manifest.model, jobs)]
        if arguments.ray is None:
            run.decode(jobs, warnings)
        else:
            run.decode_on_ray(jobs, warnings)
        run.draw_sheet()
    return run.report()


class _Run:
    """Makes the images of jobs, and tells of them."""

    def __init__(
        self,
        arguments: Namespace,
        manifest: Manifest,
        settings: Settings,
        making: Making,
        skipped: int,
    ) -> None:
        self._arguments, self._manifest, self._settings = arguments, manifest, settings
        self._making, self._skipped = making, skipped
        self._done: dict[int, tuple[Job, _Made]] = {}
        self._failed: list[dict[str, Any]] = []

    def decode(self, jobs: Sequence[Job], warnings: Sequence[str]) -> None:
        """Decode and write every image; warnings: of those, told once it can be done."""
        arguments, made = self._arguments, itertools.count()
        with (
            open_decoder(arguments, self._manifest) as decoder,
            console.progress("Decoding", len(jobs), quiet=arguments.quiet) as advance,
        ):
            decoder.warn(warnings)
            maker = _Maker(decoder, self._settings, self._making, sheet=bool(arguments.sheet))
            for source, group in itertools.groupby(jobs, lambda job: job.source):
                inputs = maker.read(source)
                for job in group:
                    self._done[next(made)] = job, maker.make(job, inputs, save_image, advance)

    def decode_on_ray(self, jobs: Sequence[Job], warnings: Sequence[str]) -> None:
        """The same on a cluster, where an image that fails is reported and the rest is made."""
        work = partial(_Work, settings=self._settings)
        for outcome in spread(self._arguments, "Decoding", work, jobs, warnings):
            job = jobs[outcome.index]
            if outcome.reason is not None:
                _log.error("%s: %s", job.target, outcome.reason)
                where = {"latent": str(job.source.path), "index": job.index}
                self._failed.append({**where, "reason": outcome.reason})
                continue
            outcome.write()
            self._done[outcome.index] = job, outcome.made

    def draw_sheet(self) -> None:
        """Write all images side by side, if that is wanted."""
        tiles = [
            (job.target.stem, made.pixels)
            for _, (job, made) in sorted(self._done.items())
            if made.pixels is not None
        ]
        if tiles:
            save_image(self._arguments.sheet, side_by_side(tiles))

    def report(self) -> int:
        """Print what was made, and what was not; 1 if an image failed."""
        arguments = self._arguments
        images = [
            {
                "latent": str(job.source.path),
                "index": job.index,
                "image": str(job.target),
                "width": job.width,
                "height": job.height,
                "seed": job.seed,
                "sigma": job.sigma,
                "seconds": round(made.seconds, 4),
            }
            for _, (job, made) in sorted(self._done.items())
        ]
        result = {
            "bundle": str(arguments.bundle),
            **self._making.common,
            "images": images,
            "skipped": self._skipped,
            "sheet": str(arguments.sheet) if arguments.sheet and images else None,
            "failed": self._failed,
        }
        lines = [
            f"{image['image']}: {image['width']}x{image['height']}, seed {image['seed']}, "
            f"{image['seconds']:.2f} s"
            for image in images
        ]
        if self._skipped:
            planned = self._skipped + len(images) + len(self._failed)
            lines.append(f"{self._skipped} of {planned} images were there already")
        if arguments.sheet and images:
            lines.append(f"{arguments.sheet}: all of them side by side")
        if self._failed:
            lines.append(f"{len(self._failed)} images failed")
        console.emit(result, "\n".join(lines), as_json=arguments.json)
        return 1 if self._failed else 0


@dataclass(frozen=True)
class _Made:
    """What is told of an image."""

    seconds: float
    """Of its decode."""
    pixels: Pixels | None
    """`[H, W, 3]`, if they are wanted for a sheet."""


class _Maker:
    """Makes one image after another with a decoder."""

    def __init__(
        self, decoder: Decoder, settings: Settings, making: Making, *, sheet: bool
    ) -> None:
        self._decoder, self._settings, self._making = decoder, settings, making
        self._sheet = sheet

    def read(self, source: Source) -> Inputs:
        """What a source holds. Raises `PidRuntimeError` for NaN."""
        inputs = source.read(self._decoder.manifest, self._settings)
        if inputs.note is not None:
            _log.info("%s: %s", source.path, inputs.note)
        return inputs

    def make(self, job: Job, inputs: Inputs, save: Save, advance: Callable[[float], None]) -> _Made:
        """Decode one image of a source. Raises `PidRuntimeError` when that gives NaN."""
        decoder = self._decoder
        own = inputs.image(job.index)
        request = request_of(decoder.manifest, own, self._settings, job.seed)
        if spread_out := spread_warning(decoder.manifest, own.latent):
            decoder.warn([f"{job.source.path}: {spread_out}"])
        begin = time.perf_counter()
        try:
            images: Pixels = decoder.run(
                request, "uint8", progress=lambda _done, calls: advance(1 / calls)
            )
        except NotFiniteError as error:
            raise PidRuntimeError(f"{job.source.path}: {error}") from None
        seconds = time.perf_counter() - begin
        record = self._making.record(
            seed=job.seed, sigma=job.sigma, width=job.width, height=job.height
        )
        save(job.target, images[0], record)
        return _Made(seconds, images[0] if self._sheet else None)


class _Work:
    """What an actor holds: a decoder."""

    def __init__(self, arguments: Namespace, settings: Settings) -> None:
        manifest = read_manifest(arguments.bundle, verify=False)
        self._decoder = open_decoder(arguments, manifest)
        making = Making(arguments, manifest, settings.sampling.schedule(manifest))
        self._maker = _Maker(self._decoder, settings, making, sheet=bool(arguments.sheet))

    def make(self, item: Job, save: Save) -> _Made:
        return self._maker.make(item, self._maker.read(item.source), save, lambda amount: None)

    def close(self) -> None:
        self._decoder.close()


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


def _check_kinds(arguments: Namespace, *, many: bool) -> None:
    """Raise `PidRuntimeError` for options that do not belong together."""
    if arguments.image or arguments.images:
        raise PidRuntimeError(
            "expected latents, but got a photo: pid-upscale takes them, as in "
            f"pid-upscale {arguments.bundle} {arguments.image or arguments.images} "
            f"-o {arguments.output or 'larger.png'}"
        )
    if arguments.output is None and not arguments.plan:
        raise PidRuntimeError(
            "expected -o for the image, or a folder of them, but got none; add it"
        )
    if arguments.format is not None and not many:
        raise PidRuntimeError("expected --format with --latents, but got --latent; drop it")
    check_latent_options(arguments)


def _show_plans(arguments: Namespace, jobs: Sequence[Job]) -> None:
    """What every image would take."""
    plans = [{"latent": str(job.source.path), **asdict(job.plan)} for job in jobs]
    lines = [f"{job.source.path}: {job.plan.text}" for job in jobs]
    result = {"bundle": str(arguments.bundle), "plans": plans}
    console.emit(result, "\n".join(lines), as_json=arguments.json)


def _namer(arguments: Namespace, many: bool) -> Callable[[Source, int, int], Path]:
    """What to call the image of a source, by its height and width."""
    output: Path = arguments.output or Path("planned.png")

    def name(source: Source, height: int, width: int) -> Path:
        suffix = arguments.format or usual_format(height, width)
        return output / f"{source.path.stem}.{suffix}" if many else output

    return name


def _check_sheet(arguments: Namespace, jobs: Sequence[Job]) -> None:
    if arguments.sheet is None:
        return
    if arguments.sheet.resolve() in {job.target.resolve() for job in jobs}:
        raise PidRuntimeError(
            f"expected another name for the sheet, but {arguments.sheet} is that of an image"
        )
    size = sheet_size([(job.height, job.width) for job in jobs])
    check_target(arguments.sheet, *size, overwrite=arguments.overwrite)
