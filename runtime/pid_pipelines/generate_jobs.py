"""What `pid-generate` is to do: sizes, steps and names, settled before anything is loaded."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pid_pipelines.backbones import Backbone
from pid_pipelines.errors import PipelineInputError
from pid_ref.registry import SPACES
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.decode_jobs import check_target
from pid_runtime.command.sampling_options import Sampling
from pid_runtime.noise import image_seed
from pid_runtime.tiles import pixels_per_latent_pixel

MULTIPLE = 16
"""Pixels of which the sides of what generators make are multiples."""

END, EARLY = "end", "early"

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, of what the generator makes and of PiD's picture."""

    generated: tuple[int, int]
    decoded: tuple[int, int]


@dataclass(frozen=True)
class Steps:
    """Which latents of a generator are decoded."""

    count: int
    """Steps to the end."""
    at: tuple[int, ...]
    """After which a latent is decoded, ascending, counted from 1; `count` is the end."""
    run: int
    """Steps that are computed: up to the last of `at`, unless told to go on."""


@dataclass(frozen=True)
class Picture:
    """One picture to make of a prompt."""

    step: int
    image: Path
    baseline: Path | None
    """Where the autoencoder's own decode of the same latent goes, if it is wanted."""

    @property
    def files(self) -> list[Path]:
        """All that is written for it."""
        return [self.image] if self.baseline is None else [self.image, self.baseline]


@dataclass(frozen=True)
class Job:
    """All that is made of one prompt."""

    prompt: str
    seed: int
    pictures: tuple[Picture, ...]


def plan_size(
    manifest: Manifest,
    backbone: Backbone,
    wanted: tuple[int, int] | None,
    sampling: Sampling,
) -> Size:
    """Both sizes; wanted: width and height of the picture, None for the largest trained square.

    Raises `PipelineInputError` for a size that the scale does not divide, with the two nearest that
    it does, and `PidRuntimeError` for one that is too large for the bundle.
    """
    down = SPACES[backbone.space].down
    pixels = pixels_per_latent_pixel(manifest)
    scale = pixels // down
    width, height = wanted or _default_size(manifest)
    multiple = MULTIPLE * scale
    if width % multiple or height % multiple or not width or not height:
        below, above = (
            "x".join(str(max(multiple, (side + more) // multiple * multiple)) for side in sides)
            for sides, more in (((width, height), 0), ((width, height), multiple - 1))
        )
        nearest = below if below == above else f"{below} or {above}"
        raise PipelineInputError(
            f"expected a size of multiples of {multiple} ({MULTIPLE} of the generator's pixels, "
            f"{scale} times), but got {width}x{height}; nearest are {nearest}"
        )
    sampling.check_size(manifest, height // pixels, width // pixels)
    return Size((height // scale, width // scale), (height, width))


def _default_size(manifest: Manifest) -> tuple[int, int]:
    """The largest square that the decoder was trained at and a bucket holds."""
    sizes: Any = manifest.model.get("trained_sizes") or []
    patch = manifest.network["patch_size"]
    squares = [
        size[0]
        for size in sizes
        if size[0] == size[1] and (size[0] // patch) ** 2 <= manifest.most_tokens
    ]
    side = max(squares, default=2048)
    return side, side


def plan_steps(
    backbone: Backbone,
    count: int | None,
    decode_at: Sequence[int | str] | None,
    stop_at: int | str | None,
) -> Steps:
    """What to decode; arguments: of the command, None where nobody said.

    Raises `PipelineInputError` for steps that there are not, or that come after the last one run.
    """
    steps = backbone.steps if count is None else count

    def number(step: int | str, option: str) -> int:
        if step == END:
            return steps
        if step == EARLY:
            return _early(backbone, steps)
        if not isinstance(step, int) or not 1 <= step <= steps:
            raise PipelineInputError(
                f"expected {option} from 1 to {steps}, the generator's steps, but got {step}; name "
                "an earlier one, or give more --generator-steps"
            )
        return step

    last = None if stop_at is None else number(stop_at, "--stop-at")
    wanted = decode_at or ([END] if last is None else [last])
    at = sorted({number(step, "--decode-at") for step in wanted})
    if last is not None and at[-1] > last:
        raise PipelineInputError(
            f"expected --decode-at up to {last}, where --stop-at ends the generator, but got "
            f"{at[-1]}{' (the end)' if at[-1] == steps else ''}; drop it, or stop later"
        )
    return Steps(steps, tuple(at), at[-1] if last is None else last)


def _early(backbone: Backbone, steps: int) -> int:
    if backbone.early is None or steps != backbone.steps:
        known = "none is known"
        if backbone.early is not None:
            known = f"{backbone.early} is, of {backbone.steps}"
        raise PipelineInputError(
            f"expected a step that is recommended for {backbone.name} in {steps} steps, but {known}"
            "; name a number, or end"
        )
    return backbone.early


def plan_jobs(
    prompts: Sequence[str],
    seed: int,
    steps: Steps,
    output: Path,
    suffix: str | None,
    *,
    baseline: bool,
) -> list[Job]:
    """What becomes of prompts, in order; suffix: of pictures in a folder, None for one picture."""
    jobs: list[Job] = []
    for index, prompt in enumerate(prompts):
        pictures: list[Picture] = []
        for step in steps.at:
            image, own = output, None
            if suffix is not None:
                stem = f"{index + 1:04}" + ("" if step == steps.count else f"-step{step}")
                image = output / f"{stem}.{suffix}"
                own = output / f"{stem}-vae.{suffix}" if baseline else None
            pictures.append(Picture(step, image, own))
        jobs.append(Job(prompt, image_seed(seed, index), tuple(pictures)))
    return jobs


def without_existing(jobs: Sequence[Job]) -> list[Job]:
    """What of jobs is not there yet."""
    rest: list[Job] = []
    for job in jobs:
        missing = tuple(p for p in job.pictures if not all(file.exists() for file in p.files))
        rest += [replace(job, pictures=missing)] if missing else []
    return rest


def check_targets(jobs: Sequence[Job], size: Size, *, overwrite: bool) -> None:
    """Raise `PidRuntimeError` unless every file may be written."""
    for job in jobs:
        for picture in job.pictures:
            for file in picture.files:
                check_target(file, *size.decoded, overwrite=overwrite)


class Results:
    """A file with a line of JSON for each picture of its folder, by which it can be made again.

    A line is written before its picture. Lines of pictures that are made again are replaced.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        """jobs: what is made now. Raises `OSError` when there is no writing."""
        self._path = folder / RESULTS
        made = [picture.image.name for job in jobs for picture in job.pictures]
        self._order = {name: number for number, name in enumerate(made)}
        with contextlib.suppress(FileNotFoundError):
            lines = self._path.read_text("utf-8", "replace").splitlines()
            kept = [line for line in lines if _image(line) not in (None, *made)]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line; `image` is the picture's name."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def put_in_order(self) -> None:
        """Sort the lines of what was made now as the jobs are, behind the others."""
        with contextlib.suppress(FileNotFoundError):
            lines = self._path.read_text("utf-8").splitlines()
            lines.sort(key=lambda line: self._order.get(_image(line) or "", -1))
            write_whole(self._path, "".join(f"{line}\n" for line in lines))


def _image(line: str) -> str | None:
    """The picture of a line; None for a line that was cut short."""
    try:
        found: Any = json.loads(line)
    except ValueError:
        return None
    return found.get("image") if isinstance(found, dict) else None
