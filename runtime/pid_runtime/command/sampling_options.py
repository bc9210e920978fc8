"""How commands are told to decode: steps, rule, guidance and tiles."""

import argparse
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.bundle.manifest import RULES, Manifest
from pid_runtime.command import console
from pid_runtime.command.decode_options import number, seed, whole_number
from pid_runtime.command.latent_files import open_negative_file
from pid_runtime.errors import PidRuntimeError
from pid_runtime.request import check_guidance, check_size
from pid_runtime.schedule import Rule, Schedule, check_schedule


@dataclass(frozen=True)
class Sampling:
    """What `Decoder.decode` is given for every image, by its arguments' names."""

    steps: int | None = None
    times: tuple[float, ...] | None = None
    rule: Rule | None = None
    negative: NDArray[np.float32] | None = None
    """`[1, T, D]` for every latent, or `[B, T, D]` for those of a file."""
    guidance: float | None = None
    tile: tuple[int, int] | Literal["auto"] | None = None
    overlap: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def schedule(self, manifest: Manifest) -> Schedule:
        """What a decode of the size that times shift by visits. Raises `PidRuntimeError`."""
        return check_schedule(manifest.sampler, steps=self.steps, times=self.times, rule=self.rule)

    def check_size(self, manifest: Manifest, height: int, width: int) -> None:
        """Raise `PidRuntimeError` for a latent of a size that cannot be decoded so."""
        check_size(manifest, height, width, self.tile, self.overlap)


def add_sampling_options(parser: argparse.ArgumentParser, decoder: str = "") -> None:
    """What `read_sampling` reads, and the seed.

    decoder: before the names of options that a generator has too.
    """
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of the first image of every file")
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument(
        "--steps", type=int, help="1, 2 or 4; undistilled 1 to 100 (default: what the bundle says)"
    )
    schedule.add_argument(
        "--times", type=_times, help="for bundles of any times: 1.0,0.75,0.5,0.25,0"
    )
    add(
        "--rule",
        choices=RULES,
        help="sde, which adds noise between steps, ode, or dpm++2m (default: what the bundle says)",
    )
    add(
        f"--{decoder}negative",
        dest="negative",
        type=Path,
        metavar="FILE",
        help="undistilled: a caption to stay away from",
    )
    add(
        f"--{decoder}guidance",
        dest="decode_guidance",
        type=number,
        metavar="G",
        help="undistilled: how far, 1 for not at all (default: what the bundle says)",
    )
    add(
        "--tile",
        type=read_tile,
        metavar="WxH",
        help="decode in tiles of so many pixels of the result, or auto: where it has to be",
    )
    add("--overlap", type=_overlap, metavar="N", help="of tiles, in pixels of the result")


def read_sampling(arguments: Namespace, manifest: Manifest, *, batches: bool = False) -> Sampling:
    """The options, checked against a bundle. Raises `PidRuntimeError`.

    batches: whether there may be a negative caption for every latent of a file, or only one.
    """
    path = arguments.negative
    negative = None if path is None else read_negative(path, batches=batches)
    sampling = Sampling(
        arguments.steps,
        arguments.times,
        arguments.rule,
        negative,
        arguments.decode_guidance,
        arguments.tile,
        arguments.overlap,
    )
    sampling.schedule(manifest)
    check_guidance(manifest, sampling.guidance, has_negative=negative is not None)
    if sampling.overlap is not None and sampling.tile is None:
        raise PidRuntimeError("expected --tile with --overlap, but got none; add --tile auto")
    return sampling


def read_negative(path: Path, *, batches: bool = False) -> NDArray[np.float32]:
    """The negative caption of --negative, `[1, T, D]`, or with `batches` `[B, T, D]`.

    Raises `PidRuntimeError` for what is no file of one.
    """
    if path.is_dir():
        raise PidRuntimeError(
            f"expected a file for --negative, but {path} is a folder; give a file made by "
            "pid-caption"
        )
    negative = open_negative_file(path).read()
    if len(negative) > 1 and not batches:
        raise PidRuntimeError(
            f"expected one negative caption in {path}, as pictures are decoded one by one, but "
            f"got {len(negative)}; save one alone"
        )
    return negative


def _times(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def read_tile(text: str) -> tuple[int, int] | Literal["auto"]:
    """A tile as it is typed. Raises `ArgumentTypeError` for what is none."""
    if text == "auto":
        return text
    try:
        return console.read_size(text)
    except PidRuntimeError:
        raise argparse.ArgumentTypeError(
            f"expected auto or a size such as 2048x2048, but got {text[:60]!r}"
        ) from None


def _overlap(text: str) -> int:
    return whole_number(text, 0, 2**24, "16777216")
