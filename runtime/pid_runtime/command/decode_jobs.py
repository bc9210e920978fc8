"""What `pid-decode` is to do: found and checked before the first decode, by sizes and headers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.images import check_image_path, check_image_size
from pid_runtime.command.latent_files import (
    CAPTION_SUFFIX,
    LATENT_SUFFIXES,
    LatentForm,
    StoredTensor,
    open_caption_file,
    open_latent_file,
)
from pid_runtime.command.sampling_options import Sampling
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import image_seed
from pid_runtime.plan import Plan, plan_of
from pid_runtime.request import Request, check_request

Values = Callable[[StoredTensor], NDArray[np.float32]]
"""What becomes of a tensor in a file: its values, or an outline of them."""


@dataclass(frozen=True)
class Settings:
    """What holds for every latent."""

    latent_key: str | None = None
    """Name of the latent's tensor; None to find it."""
    caption_key: str | None = None
    """Name of the caption's tensor in a caption file; None to find it."""
    latent_form: LatentForm = field(default_factory=LatentForm)
    """What the latents are."""
    sigma: float | None = None
    """Noise level, in place of what the files say; None for theirs, or 0."""
    seed: int = 0
    """Of the first image of every file; the next have the next seeds."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Source:
    """A latent file, and the file of its caption, if that is another one."""

    path: Path
    caption: Path | None

    def outline(self, manifest: Manifest, settings: Settings) -> "Inputs":
        """The inputs with zeros for what only the files know, by their headers alone.

        Raises `PidRuntimeError` for files that hold something else.
        """
        return self._inputs(manifest, settings, StoredTensor.outline)

    def read(self, manifest: Manifest, settings: Settings) -> "Inputs":
        """Read both files. Raises `PidRuntimeError` for NaN."""
        return self._inputs(manifest, settings, StoredTensor.read)

    def _inputs(self, manifest: Manifest, settings: Settings, values: Values) -> "Inputs":
        file = open_latent_file(
            self.path,
            manifest,
            settings.latent_key,
            form=settings.latent_form,
            embedded_caption=self.caption is None,
        )
        sigma = np.zeros(1, np.float32) if file.sigma is None else file.sigma.read()
        if settings.sigma is not None:
            sigma = np.array([settings.sigma], np.float32)
        caption = file.caption
        if self.caption is not None:
            caption = open_caption_file(self.caption, settings.caption_key)
        latent, embedding = values(file.latent), None if caption is None else values(caption)
        return Inputs(latent, embedding, settings.sampling.negative, sigma, file.note)


@dataclass(frozen=True)
class Inputs:
    """The content of a source, float32."""

    latent: NDArray[np.float32]
    """`[B, C, h, w]`."""
    caption: NDArray[np.float32] | None
    """`[B, T, D]`, `[1, T, D]` for all, or None."""
    negative: NDArray[np.float32] | None
    """As the caption."""
    sigma: NDArray[np.float32]
    """`[B]`, or `[1]` for all."""
    note: str | None = None
    """What was done to the latent; None for nothing."""

    def image(self, index: int) -> "Inputs":
        """What belongs to one image of the batch."""

        def part(array: NDArray[np.float32]) -> NDArray[np.float32]:
            return array if len(array) == 1 else array[index : index + 1]

        caption = None if self.caption is None else part(self.caption)
        negative = None if self.negative is None else part(self.negative)
        return Inputs(part(self.latent), caption, negative, part(self.sigma))


def request_of(manifest: Manifest, inputs: Inputs, settings: Settings, seed: int) -> Request:
    """What the decoder is asked for. Raises `PidRuntimeError` for inputs that do not fit."""
    sampling = replace(settings.sampling, negative=inputs.negative)
    return check_request(
        manifest, inputs.latent, inputs.caption, sigma=inputs.sigma, seed=seed, **sampling.options
    )


@dataclass(frozen=True)
class Job:
    """One image to decode."""

    source: Source
    index: int
    """Of the image in its file."""
    target: Path
    width: int
    height: int
    seed: int
    sigma: float
    has_caption: bool
    plan: Plan
    """Of the decode of this one image."""


def find_sources(
    path: Path, caption: Path | None = None, captions: Path | None = None
) -> list[Source]:
    """Pair latents with captions.

    path: a file, or a folder of latent files, taken in the order of their names.
    caption: one caption file for all. captions: a folder of `*.safetensors` named as the others.
    Raises `PidRuntimeError` for a folder without such files, or one without its caption file.
    """
    if not path.is_dir():
        return [Source(path, caption)]
    files = files_of(path, LATENT_SUFFIXES)
    if captions is None:
        return [Source(file, caption) for file in files]
    sources = [Source(file, captions / f"{file.stem}{CAPTION_SUFFIX}") for file in files]
    for source in sources:
        if source.caption is not None and not source.caption.is_file():
            raise PidRuntimeError(
                "expected a caption for every latent, but got no "
                f"{source.caption.name} in {captions}; add it, or use --caption FILE for all"
            )
    return sources


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of these suffixes in a folder, in the order of their names.

    Raises `PidRuntimeError` for a folder without.
    """
    files = [file for file in _files(folder) if file.suffix.lower() in suffixes]
    if not files:
        raise PidRuntimeError(
            f"expected *{', *'.join(suffixes)} files, but got none in {folder}; give another folder"
        )
    return files


def skipped_files(folder: Path, suffixes: Sequence[str]) -> str | None:
    """What to say of files in a folder that `files_of` leaves out; None if there are none."""
    files = _files(folder)
    skipped = [file for file in files if file.suffix.lower() not in suffixes]
    if not skipped:
        return None
    kinds = ", ".join(sorted({file.suffix or file.name for file in skipped}))
    return (
        f"skipped {len(skipped)} of {len(files)} files in {folder}: {kinds} is none of "
        f"*{', *'.join(suffixes)}"
    )


def _files(folder: Path) -> list[Path]:
    """In the order of their names, without hidden ones."""
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def plan_jobs(
    manifest: Manifest,
    sources: Iterable[Source],
    settings: Settings,
    name: Callable[[Source, int, int], Path],
    *,
    on_device: bool = False,
) -> list[Job]:
    """Check every source against the bundle, by its headers, and list the images to make of it.

    name: the image file of a source, of its height and width; sources of several images get `-0`,
    `-1`, .. in front of the suffix. on_device: whether they are made on a GPU. Raises
    `PidRuntimeError` for an input that does not fit, or two images of one name.
    """
    jobs: list[Job] = []
    for source in sources:
        inputs = source.outline(manifest, settings)
        try:
            request = request_of(manifest, inputs, settings, settings.seed)
        except PidRuntimeError as error:
            raise PidRuntimeError(f"{source.path}: {error}") from None
        batch = len(inputs.latent)
        one = replace(request, sizes=request.sizes.of_batch(1))
        plan = plan_of(manifest, one, state_on_device=on_device)
        height, width = request.sizes.value("H"), request.sizes.value("W")
        target = name(source, height, width)
        jobs += [
            Job(
                source,
                index,
                target if batch == 1 else target.with_stem(f"{target.stem}-{index}"),
                width,
                height,
                image_seed(settings.seed, index),
                round(float(request.sigmas[index]), 6),
                inputs.caption is not None,
                plan,
            )
            for index in range(batch)
        ]
    return jobs


def without_existing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose image is not there yet."""
    return [job for job in jobs if not (job.target.exists() or job.target.is_symlink())]


def check_targets(jobs: Sequence[Job], *, overwrite: bool) -> None:
    """Raise `PidRuntimeError` unless every image may be written, under a name of its own."""
    sources: dict[Path, Source] = {}
    for job in jobs:
        if job.target in sources:
            raise PidRuntimeError(
                f"expected every image to have its own name, but got {job.target} from both "
                f"{sources[job.target].path} and {job.source.path}; rename one of these"
            )
        sources[job.target] = job.source
        check_target(job.target, job.height, job.width, overwrite=overwrite)


def check_target(path: Path, height: int, width: int, *, overwrite: bool) -> None:
    """Raise `PidRuntimeError` unless an image of this size may be written to `path`."""
    check_image_path(path)
    check_image_size(path, height, width)
    if not overwrite and (path.exists() or path.is_symlink()):
        raise PidRuntimeError(
            f"expected a new file, but {path} exists; choose another name or add --overwrite"
        )
