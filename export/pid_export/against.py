"""Compares what two bundles of one network make of the same latents, captions, seeds and noise.

That is how an owner of weights sees what a precision costs: PSNR of every picture against that of
the other bundle, the float32 one, say. One bundle is open at a time: the pictures of the other
wait on the disk.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_export.errors import ExportInputError
from pid_runtime.bundle.manifest import FP8_PRECISIONS, Manifest
from pid_runtime.command.decode_jobs import Job, Settings, Source, plan_jobs, request_of
from pid_runtime.decoder import Bundle
from pid_runtime.errors import NotFiniteError, PidRuntimeError

Advance = Callable[[float], None]

_PEAK = 2.0
"""Pictures lie in [-1, 1]."""


@dataclass(frozen=True)
class Side:
    """A bundle, and how it is run."""

    path: Path
    manifest: Manifest
    backend: str
    device: str | None
    """None for the backend's usual one."""
    threads: int | None

    def open(self) -> Bundle:
        """The bundle, opened. Raises `PidRuntimeError` as `Bundle.open` does."""
        return Bundle.open(
            self.path,
            self.backend,
            self.device,
            threads=self.threads,
            manifest=self.manifest,
            verify=False,
        )

    @property
    def counts_clipped(self) -> bool:
        """Whether it can be seen how many of its numbers are too large for their scales."""
        return self.backend == "torch" and self.manifest.precision in FP8_PRECISIONS


@dataclass(frozen=True)
class Difference:
    """How a picture differs from the other bundle's."""

    latent: str
    """The latent's file."""
    index: int
    """Of the picture in its file."""
    width: int
    height: int
    seed: int
    sigma: float
    max_abs_error: float
    """Largest difference of a value; they lie in [-1, 1]."""
    psnr_db: float
    """Of the values of the whole picture, not rounded to 8 bits; infinite for equal pictures."""


def check_pair(one: Side, other: Side, settings: Settings) -> str | None:
    """What to say of two bundles that belong together, or None for nothing.

    Raises `ExportInputError` for bundles of other networks, latents or checkpoints, or that decode
    at other times, by another rule or with other guidance.
    """
    ours, theirs = _traits(one.manifest, settings), _traits(other.manifest, settings)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ExportInputError(
                f"expected two bundles of one network, but got {name} {_shown(theirs[name])} in "
                f"{other.path} and {_shown(value)} in {one.path}; compare bundles that were "
                "exported from one checkpoint with the same options"
            )
    weights = [side.manifest.model.get("weights") for side in (one, other)]
    if weights[0] == weights[1]:
        return None
    names = [str(each.get("file")) if isinstance(each, dict) else "?" for each in weights]
    return (
        f"the bundles were exported from different files, {names[0]} and {names[1]}: what is "
        "measured is the difference of these too"
    )


def _traits(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """What must be the same on both sides, by a name to print."""
    model, sampling = manifest.model, settings.sampling
    weights = model.get("weights")
    seed = weights.get("random_seed") if isinstance(weights, dict) else None
    schedule = sampling.schedule(manifest)
    shift = None if sampling.times is not None else manifest.sampler.flow_shift
    guidance = manifest.sampler.guidance if sampling.guidance is None else sampling.guidance
    return {
        **{name: model.get(name) for name in ("space", "variant", "checkpoint")},
        **manifest.network,
        "random weights of seed": seed,
        "times": tuple(round(time, 6) for time in schedule.times),
        "rule": schedule.rule,
        "flow shift": shift,
        "guidance": guidance,
    }


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)[:80]


def jobs_of(one: Side, other: Side, sources: Sequence[Source], settings: Settings) -> list[Job]:
    """The pictures to compare. Raises `PidRuntimeError` for latents that do not fit a bundle."""
    plans = [
        plan_jobs(side.manifest, sources, settings, lambda source, height, width: source.path)
        for side in (other, one)
    ]
    return plans[-1]


def compare_pictures(
    one: Side,
    other: Side,
    jobs: Sequence[Job],
    settings: Settings,
    advance: Advance,
    clipped: dict[str, float] | None = None,
) -> Iterator[Difference]:
    """Make every picture with `other`, then with `one`, and compare them one after another.

    jobs: see `jobs_of`. advance: called with shares of a picture, twice as many as there are jobs.
    clipped: to be filled with `calibrate.clipped_shares` of `one`, which `counts_clipped`.
    Raises `PidRuntimeError` for a latent or a picture with NaN.
    """
    with tempfile.TemporaryDirectory(prefix="pid-verify-") as name:
        files = [Path(name, f"{number}.npy") for number in range(len(jobs))]
        for file, (_, picture) in zip(
            files, _pictures(other, jobs, settings, advance), strict=True
        ):
            np.save(file, picture)
        for file, (job, picture) in zip(
            files, _pictures(one, jobs, settings, advance, clipped), strict=True
        ):
            yield difference(job, picture, np.load(file))
            file.unlink()


def _pictures(
    side: Side,
    jobs: Sequence[Job],
    settings: Settings,
    advance: Advance,
    clipped: dict[str, float] | None = None,
) -> Iterator[tuple[Job, NDArray[np.float32]]]:
    """Every picture `[3, H, W]` in [-1, 1], in order."""
    with side.open() as bundle, bundle.decoder() as decoder:
        if clipped is not None:
            from pid_export.calibrate import count_clipped  # loads torch

            count_clipped(bundle, clipped)
        for source, group in itertools.groupby(jobs, lambda job: job.source):
            inputs = source.read(side.manifest, settings)
            for job in group:
                request = request_of(side.manifest, inputs.image(job.index), settings, job.seed)
                try:
                    image = decoder.run(request, progress=lambda _done, calls: advance(1 / calls))
                except NotFiniteError as error:
                    raise PidRuntimeError(f"{side.path}, {source.path}: {error}") from None
                yield job, image[0]


def difference(job: Job, picture: NDArray[np.float32], other: NDArray[np.float32]) -> Difference:
    """Compare two pictures `[3, H, W]` of values in [-1, 1]."""
    error = picture - other
    mean = float(np.mean(np.square(error, dtype=np.float64)))
    return Difference(
        str(job.source.path),
        job.index,
        job.width,
        job.height,
        job.seed,
        job.sigma,
        float(np.abs(error).max()),
        10 * math.log10(_PEAK**2 / mean) if mean else math.inf,
    )
