"""A decode's inputs, checked against a bundle before anything runs."""

import logging
import math
import operator
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import as_array
from pid_runtime.bundle.manifest import Manifest, Sampler
from pid_runtime.bundle.sizes import Sizes, sizes_of_request
from pid_runtime.errors import PidRuntimeError
from pid_runtime.latents import shape_hint
from pid_runtime.noise import image_seed

Rule = Literal["sde", "ode"]
RULES = ("sde", "ode")

_log = logging.getLogger(__name__)

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Schedule:
    """The times a decode visits, as the program wants them."""

    rows: tuple[int, ...]
    """Row of the modulation table, per step."""
    updates: NDArray[np.float32]
    """Factors of state, velocity and noise in the sampler's update, `[steps, 3]`."""
    moments: NDArray[np.float32] | None
    """1000 t of every step, `[steps, 1]`, for a bundle that takes any times; None otherwise."""

    @property
    def steps(self) -> int:
        """How often the network runs."""
        return len(self.rows)


@dataclass(frozen=True)
class Request:
    """The inputs of one decode; every array is on the host, or on a device as it was given."""

    sizes: Sizes
    schedule: Schedule
    latent: Any
    """`[B, C, h, w]`."""
    caption: Any
    """`[B, T, D]`, or `[1, T, D]` for every image."""
    sigmas: NDArray[np.float32]
    """`[B]`."""
    seeds: tuple[int, ...]
    """B of them."""
    noises: tuple[Any, ...]
    """Noise images `[B, 3, H, W]`, one before and one per step; None where the seed makes it."""


def empty_caption(manifest: Manifest) -> NDArray[np.float32]:
    """The caption embedding that stands for none: zeros `[1, text_max_length, text_dim]`."""
    network = manifest.network
    return np.zeros((1, network["text_max_length"], network["text_dim"]), np.float32)


def check_request(
    manifest: Manifest,
    latent: Any,
    caption: Any = None,
    *,
    sigma: float | Sequence[float] | NDArray[np.float32] = 0.0,
    seed: Any = 0,
    noise: Any = None,
    step_noise: Sequence[Any] | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    rule: Rule = "sde",
) -> Request:
    """The arguments of `Decoder.decode`, complete and checked.

    Raises `PidRuntimeError` for an input that does not fit the bundle. Arrays on the host are
    looked through for NaN; those on a device are taken as they are.
    """
    network = manifest.network
    schedule = check_schedule(manifest.sampler, steps=steps, times=times, rule=rule)
    fix = shape_hint(manifest, np.shape(latent))
    latent = _check_array(latent, "latent", ("B", network["latent_channels"], "h", "w"), fix)
    batch = latent.shape[0]
    if caption is None:
        caption = empty_caption(manifest)
    most = network["text_max_length"]
    fix = f"B is 1 or that of the latent, {batch}, and T at most {most}"
    caption = _check_array(caption, "caption", ("B", "T", network["text_dim"]), fix)
    if caption.shape[0] not in (1, batch) or caption.shape[1] > most:
        raise _shape_error("caption", ("B", "T", network["text_dim"]), caption.shape, fix)
    sigmas = _check_sigma(manifest, sigma, batch)
    seeds = _check_seeds(seed, batch)
    sizes = sizes_of_request(
        network,
        manifest.tokens_per_latent,
        batch=batch,
        latent_height=latent.shape[2],
        latent_width=latent.shape[3],
        text_tokens=caption.shape[1],
        rows=len(manifest.sampler.times) or schedule.steps,
    )
    check_fits(manifest, latent.shape[2], latent.shape[3])
    noises = _check_noises(noise, step_noise, sizes, schedule.steps, rule)
    return Request(sizes, schedule, latent, caption, sigmas, seeds, noises)


def largest_latent(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest latent of about this shape that a bucket holds."""
    most = manifest.most_tokens // manifest.tokens_per_latent**2
    scale = min(1.0, math.sqrt(most / (height * width)))
    rows = max(1, math.floor(height * scale))
    columns = max(1, min(math.floor(width * scale), most // rows))
    return min(rows, most), columns


def check_fits(manifest: Manifest, height: int, width: int) -> None:
    """Raise `PidRuntimeError` for a latent of a height and width that no bucket holds."""
    per_latent = manifest.tokens_per_latent
    tokens = height * width * per_latent**2
    if tokens <= manifest.most_tokens:
        return
    side = per_latent * manifest.network["patch_size"]
    rows, columns = largest_latent(manifest, height, width)
    raise PidRuntimeError(
        f"expected an image of at most {manifest.megapixels(manifest.most_tokens)}, the largest "
        f"bucket of this bundle, but got {side * width}x{side * height}; the largest of this shape "
        f"is {side * columns}x{side * rows}, of a latent of height {rows} and width {columns}; or "
        f"export with --buckets large={tokens}"
    )


def check_schedule(
    sampler: Sampler,
    *,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    rule: Rule = "sde",
) -> Schedule:
    """What a decode with these arguments of `Decoder.decode` visits.

    Raises `PidRuntimeError` for a schedule the bundle does not know.
    """
    if rule not in RULES:
        raise PidRuntimeError(f"expected rule {' or '.join(RULES)}, but got {rule!r}")
    if sampler.times:
        if times is not None:
            raise PidRuntimeError(
                "expected no times, since this bundle knows only its own, but got "
                f"{list(times)}; give steps, or export with --arbitrary-timesteps"
            )
        steps = sampler.steps if steps is None else _integer(steps, "steps")
        rows = sampler.schedules.get(str(steps))
        if rows is None:
            raise PidRuntimeError(
                f"expected {', '.join(sampler.schedules)} steps, but got {steps}; more steps "
                "need a bundle exported with --arbitrary-timesteps"
            )
        visited = [*(sampler.times[row] for row in rows), 0.0]
        return Schedule(rows, _updates(visited, rule), None)
    if times is None:
        raise PidRuntimeError(
            "expected times, since this bundle takes any, but got none; give for example "
            "1.0,0.75,0.5,0.25,0"
        )
    visited = [float(time) for time in _numbers(times, "times").reshape(-1)]
    descending = all(a > b for a, b in pairwise(visited))
    if len(visited) < 2 or visited[-1] != 0 or visited[0] > 1 or not descending:
        raise PidRuntimeError(
            f"expected times descending from at most 1 to 0, but got {visited}; the last is 0"
        )
    if steps not in (None, len(visited) - 1):
        raise PidRuntimeError(
            f"expected {steps} steps, but got times of {len(visited) - 1}; give the times alone"
        )
    if len(visited) - 1 > sampler.max_steps:
        raise PidRuntimeError(
            f"expected at most {sampler.max_steps} steps, but got {len(visited) - 1}; "
            "leave out some times"
        )
    moments = np.array(visited[:-1], np.float32)[:, None] * np.float32(1000)
    return Schedule(tuple(range(len(visited) - 1)), _updates(visited, rule), moments)


def update_factors(t: float, t_next: float, rule: Rule) -> tuple[float, float, float]:
    """Factors of state, velocity and noise in the sampler's update from t to t_next.

    sde: x0 = x - t v, then (1 - t_next) x0 + t_next noise. ode: x + (t_next - t) v.
    """
    if rule == "ode":
        return 1.0, t_next - t, 0.0
    return 1.0 - t_next, -(1.0 - t_next) * t, t_next


def _updates(visited: Sequence[float], rule: Rule) -> NDArray[np.float32]:
    factors = [update_factors(t, t_next, rule) for t, t_next in pairwise(visited)]
    return np.array(factors, np.float32)


def _check_array(source: Any, name: str, wanted: tuple[int | str, ...], fix: str) -> Any:
    """An input as an array on the host, or as it is when it lives on a device.

    wanted: its shape; letters stand for any size but 0.
    """
    if isinstance(source, str | os.PathLike):
        if name == "caption":
            fix = "give the embedding, which pid-caption makes of a prompt"
        raise PidRuntimeError(f"expected an array as {name}, but got {str(source)[:60]!r}; {fix}")
    if getattr(source, "requires_grad", False):
        source = source.detach()
    kind = str(getattr(source, "dtype", "")).removeprefix("torch.")
    if kind == "bfloat16":  # numpy has none of its own
        source = source.float() if hasattr(source, "float") else source.astype(np.float32)
    on_host = not hasattr(source, "__dlpack_device__") or source.__dlpack_device__()[0] == 1
    array = as_array(source) if on_host else source
    shape = tuple(array.shape)
    if len(shape) != len(wanted) or any(
        has == 0 or (isinstance(size, int) and has != size)
        for has, size in zip(shape, wanted, strict=True)
    ):
        raise _shape_error(name, wanted, shape, fix)
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in _FLOATS:
        raise PidRuntimeError(
            f"expected {name} values of {', '.join(_FLOATS)}, but got {kind}; convert them"
        )
    if on_host and not np.isfinite(array).all():
        raise PidRuntimeError(
            f"expected a finite {name}, but it holds NaN or infinity; look at the step that made it"
        )
    return array


def _shape_error(
    name: str, wanted: Sequence[int | str], shape: Sequence[int], fix: str
) -> PidRuntimeError:
    letters = ", ".join(str(size) for size in wanted)
    return PidRuntimeError(f"expected {name} shape [{letters}], but got {list(shape)}; {fix}")


def _check_sigma(manifest: Manifest, sigma: Any, batch: int) -> NDArray[np.float32]:
    sigmas = _numbers(sigma, "sigma").astype(np.float32)
    if sigmas.shape not in ((), (1,), (batch,)):
        raise PidRuntimeError(
            f"expected one sigma{_or_more(batch)}, but got shape {list(sigmas.shape)}; give one "
            "per image"
        )
    if not ((sigmas >= 0) & (sigmas <= 1)).all():
        fix = "0 is a clean latent"
        if manifest.model.get("partly_denoised") == "euler":
            fix += ", and for x0 + sigma noise divide latent and sigma by sqrt(sigma^2 + 1) first"
        shown = ", ".join(f"{value:g}" for value in np.atleast_1d(sigmas))
        raise PidRuntimeError(f"expected sigma in [0, 1], but got [{shown}]; {fix}")
    return np.ascontiguousarray(np.broadcast_to(sigmas, (batch,)))


def _numbers(given: Any, name: str) -> NDArray[Any]:
    """A number, or several. Raises `PidRuntimeError` for text, truth values and others."""
    try:
        array = as_array(given.detach() if getattr(given, "requires_grad", False) else given)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.dtype.kind not in "fiu":
        raise PidRuntimeError(f"expected numbers as {name}, but got {str(given)[:60]!r}")
    return array


def _check_seeds(seed: Any, batch: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbits(64)
        _log.info("Seed %s", seed)
    if np.ndim(seed) == 0:
        return tuple(image_seed(_integer(seed, "seed"), b) for b in range(batch))
    seeds = tuple(image_seed(_integer(each, "seed"), 0) for each in seed)
    if len(seeds) != batch:
        raise PidRuntimeError(f"expected one seed{_or_more(batch)}, but got {len(seeds)}")
    return seeds


def _integer(given: Any, name: str) -> int:
    """A whole number, or the seed of a `torch.Generator`."""
    if hasattr(given, "initial_seed"):
        return int(given.initial_seed())
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise PidRuntimeError(
            f"expected a whole number as {name}, but got {str(given)[:60]!r}"
        ) from None


def _or_more(batch: int) -> str:
    return "" if batch == 1 else f" or {batch}"


def _check_noises(
    noise: Any, step_noise: Sequence[Any] | None, sizes: Sizes, steps: int, rule: Rule
) -> tuple[Any, ...]:
    """The noise image of every draw, None where the seed makes it."""
    later: list[Any] = [None] * (steps - 1)
    if step_noise is not None and rule == "sde":  # ode adds none
        later = list(step_noise)
    if len(later) != steps - 1:
        raise PidRuntimeError(
            f"expected {steps - 1} step noises, one after every step but the last, "
            f"but got {len(later)}"
        )
    shape = sizes.shape(("B", 3, "H", "W"))
    fix = "it has the shape of the images"
    return tuple(
        None if image is None else _check_array(image, "noise", shape, fix)
        for image in (noise, *later, None)
    )
