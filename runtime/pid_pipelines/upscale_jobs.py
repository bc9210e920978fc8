"""What `pid-upscale` is to do: photos found, sized and named before the first is encoded."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.decode_jobs import check_target, files_of, skipped_files
from pid_runtime.command.images import usual_format
from pid_runtime.command.sampling_options import Sampling
from pid_runtime.errors import PidRuntimeError
from pid_runtime.nano.photos import (
    PHOTO_SUFFIXES,
    middle_square,
    padded,
    photo_size,
    resized,
)
from pid_runtime.request import largest_latent
from pid_runtime.tiles import pixels_per_latent_pixel

CROP = 16
"""Pixels that the sides of a cropped photo are multiples of, as in NVIDIA's own command."""


@dataclass(frozen=True)
class Photo:
    """A picture to enlarge."""

    path: Path
    prompt: str | None = None
    """What is to be seen in it; None where nobody said."""


@dataclass(frozen=True)
class Frame:
    """How a photo becomes what an encoder takes: reduced, cut in the middle, then padded."""

    reduced: tuple[int, int]
    """Height and width of the whole photo, reduced or as it is."""
    size: tuple[int, int]
    """Height and width of the part of it that is kept."""
    multiple: int
    """Of which the sides of the encoded picture are multiples."""
    is_square: bool = False
    """Whether the part that is kept is the square in the middle, at whatever size it has to be."""

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return -(-self.size[0] // self.multiple), -(-self.size[1] // self.multiple)

    def kept(self, photo: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of a photo `[3, H, W]` the part that is kept, `[3, *size]`."""
        if self.is_square:
            return middle_square(photo, self.size[0])
        photo = resized(photo, *self.reduced)
        top, left = ((a - b) // 2 for a, b in zip(self.reduced, self.size, strict=True))
        return photo[:, top : top + self.size[0], left : left + self.size[1]]

    def padded(self, part: NDArray[np.float32]) -> NDArray[np.float32]:
        """That with its last row and column repeated, a batch of one: `[1, 3, H', W']`."""
        return padded(part, self.multiple)[None]


@dataclass(frozen=True)
class Picture:
    """One picture to make of a photo."""

    sigma: float
    image: Path
    baseline: Path | None
    """Where the codec's own decode of the same latent goes, if it is wanted."""

    @property
    def files(self) -> list[Path]:
        """All that is written for it."""
        return [self.image] if self.baseline is None else [self.image, self.baseline]


@dataclass(frozen=True)
class Job:
    """All that is made of one photo."""

    photo: Photo
    frame: Frame
    pictures: tuple[Picture, ...]
    """Those still to be made."""
    all_pictures: tuple[Picture, ...]
    """Those that the sheet shows."""
    sheet: Path | None

    def size(self, scale: int) -> tuple[int, int]:
        """Height and width of its pictures."""
        return scale * self.frame.size[0], scale * self.frame.size[1]


@dataclass(frozen=True)
class Naming:
    """Where pictures go."""

    output: Path
    """A folder, or the one picture."""
    is_folder: bool
    format: str | None
    """Suffix of pictures in a folder, without the dot; None for the usual one of their size."""
    sigmas: tuple[float, ...]
    baseline: bool

    def pictures(self, photo: Photo, height: int, width: int) -> tuple[Picture, ...]:
        """Of one photo, for every noise level; height, width: of the pictures."""
        if not self.is_folder:
            return (Picture(self.sigmas[0], self.output, None),)
        stems = {
            sigma: photo.path.stem + (f"-sigma{sigma:g}" if len(self.sigmas) > 1 else "")
            for sigma in self.sigmas
        }
        suffix = self.format or usual_format(height, width)
        return tuple(
            Picture(
                sigma,
                self.output / f"{stem}.{suffix}",
                self.output / f"{stem}-vae.{suffix}" if self.baseline else None,
            )
            for sigma, stem in stems.items()
        )

    def sheet(self, photo: Photo) -> Path | None:
        """Of one photo; None without a baseline."""
        return self.output / f"{photo.path.stem}-sheet.png" if self.baseline else None


def find_photos(paths: Sequence[Path], prompt: str | None) -> tuple[list[Photo], list[str]]:
    """The photos at paths of files and folders, and what to say of files that are left out.

    Raises `PidRuntimeError` for a folder without photos.
    """
    photos: list[Photo] = []
    notes: list[str] = []
    for path in paths:
        if not path.is_dir():
            photos.append(Photo(path, prompt))
            continue
        photos += [Photo(file, prompt) for file in files_of(path, PHOTO_SUFFIXES)]
        if skipped := skipped_files(path, PHOTO_SUFFIXES):
            notes.append(skipped)
    return photos, notes


def read_manifest_lines(path: Path, prompt: str | None) -> list[Photo]:
    """The photos of a file of JSON lines, `{"image": PATH, "prompt": TEXT}`.

    Paths are relative to the file's folder; a line without a prompt gets `prompt`. Raises
    `PipelineInputError` for another line, by its number, and for a file without any.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PipelineInputError(
            f"expected a file of JSON lines, but got {path}: {reason}; check --manifest"
        ) from None
    photos = [
        _photo_of_line(path, number, line, prompt)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not photos:
        raise PipelineInputError(
            f"expected a photo in each line, but {path} has none; give lines such as "
            '{"image": "boat.jpg", "prompt": "a small boat"}'
        )
    return photos


def _photo_of_line(path: Path, number: int, line: str, prompt: str | None) -> Photo:
    try:
        entry: Any = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        got = "no JSON" if entry is None else f"{line.strip():.60}"
        raise PipelineInputError(
            f'expected {{"image": PATH, "prompt": TEXT}} in each line, but line {number} of {path} '
            f"is {got}; correct it"
        )
    text = entry.get("prompt", prompt)
    if text is not None and not isinstance(text, str):
        raise PipelineInputError(
            f"expected a text as prompt, but line {number} of {path} has {text!r:.60}; correct it"
        )
    return Photo(path.parent / entry["image"], text)


def plan_job(
    manifest: Manifest,
    photo: Photo,
    multiple: int,
    naming: Naming,
    sampling: Sampling,
    *,
    crop: bool,
    fit: bool,
    side: int | None,
) -> Job:
    """What becomes of a photo, by its header. Raises `PidRuntimeError` if that cannot be.

    side: as `upscale_codecs.side_of` says.
    """
    width, height = photo_size(photo.path)
    if side is not None:
        frame = Frame((height, width), (side, side), multiple, is_square=True)
    else:
        reduces = fit and sampling.tile is None
        frame = _frame(manifest, height, width, multiple, crop=crop, fit=reduces)
    if not all(frame.size):
        raise PidRuntimeError(
            f"{photo.path}: expected sides of at least {CROP} pixels with --crop, but got "
            f"{width}x{height}; leave --crop out"
        )
    try:
        sampling.check_size(manifest, *frame.latent)
    except PidRuntimeError as error:
        raise PidRuntimeError(
            f"{photo.path}: {error}, or use --fit, which reduces this photo of {width}x{height}"
        ) from None
    rows, columns = frame.latent
    side = pixels_per_latent_pixel(manifest)
    pictures = naming.pictures(photo, side * rows, side * columns)
    return Job(photo, frame, pictures, pictures, naming.sheet(photo))


def _frame(
    manifest: Manifest, height: int, width: int, multiple: int, *, crop: bool, fit: bool
) -> Frame:
    reduced = height, width
    rows, columns = -(-height // multiple), -(-width // multiple)
    most = largest_latent(manifest, rows, columns)
    if fit and most != (rows, columns):
        scale = min(multiple * most[0] / height, multiple * most[1] / width)
        reduced = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    size = (reduced[0] // CROP * CROP, reduced[1] // CROP * CROP) if crop else reduced
    return Frame(reduced, size, multiple)


def without_existing(job: Job) -> Job | None:
    """What of a job is not there yet; None if all is."""
    missing = tuple(p for p in job.pictures if not all(file.exists() for file in p.files))
    if not missing and (job.sheet is None or job.sheet.exists()):
        return None
    return replace(job, pictures=missing)


def check_targets(jobs: Sequence[Job], scale: int, *, overwrite: bool, keep_existing: bool) -> None:
    """Raise `PidRuntimeError` unless every file may be written, under a name of its own."""
    owners: dict[Path, Photo] = {}
    for job in jobs:
        files = [file for picture in job.pictures for file in picture.files]
        for file in files if job.sheet is None else [*files, job.sheet]:
            if file in owners:
                raise PidRuntimeError(
                    f"expected every picture to have its own name, but got {file} from both "
                    f"{owners[file].path} and {job.photo.path}; rename one of these"
                )
            owners[file] = job.photo
            if file.resolve() == job.photo.path.resolve():
                raise PidRuntimeError(
                    f"expected another name than the photo's, but got {file}; name another output"
                )
            check_target(file, *job.size(scale), overwrite=overwrite or keep_existing)
