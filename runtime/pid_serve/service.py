"""What is done for a request: a task of what it holds, a worker for it, a file of the result."""

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from fastapi import HTTPException
from safetensors.numpy import save

from pid_runtime.bundle.manifest import Manifest
from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError
from pid_runtime.request import check_guidance, check_request, check_size
from pid_runtime.tiles import pixels_per_latent_pixel
from pid_serve.bodies import (
    CaptionBody,
    Settings,
    TooManyPixelsError,
    UpscaleSettings,
    encoded,
    read_picture,
)
from pid_serve.metrics import Metrics
from pid_serve.pool import QueueFullError, WorkerLostError
from pid_serve.sessions import About, Bytes, CaptionTask, DecodeTask, Floats, Made, Step

_log = logging.getLogger(__name__)

_AGAIN = {"Retry-After": "1"}

_Task = TypeVar("_Task", contravariant=True)
_Result = TypeVar("_Result", covariant=True)

Report = Callable[[Step], None] | None
"""Called with the steps; None if nobody looks."""


class Workers(Protocol[_Task, _Result]):
    """What does tasks: `Pool`, or others like it."""

    about: Any
    observe: Callable[[str, float], None]

    @property
    def waiting(self) -> int: ...

    @property
    def ready(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def restarts(self) -> int: ...

    def memory_bytes(self) -> int: ...

    async def run(self, task: _Task, report: Callable[[Any], None] | None = None) -> _Result: ...

    def close(self) -> None: ...


Model = Workers[DecodeTask, Made]
Captions = Workers[CaptionTask, Floats]


@dataclass(frozen=True)
class Files:
    """What a request is answered."""

    image: bytes
    """The picture, or of captions all."""
    native: bytes | None = None
    """What the latent's own decoder made, if that is wanted and can be had."""


class Service:
    """Decodes, enlarges and captions, by workers."""

    def __init__(
        self,
        models: Mapping[str, Model],
        captions: Captions | None,
        most_pixels: int,
        most_result_pixels: int,
        metrics: Metrics,
    ) -> None:
        """most_pixels: of a picture that is sent; most_result_pixels: of an image that is made."""
        self._models, self._captions = models, captions
        self._most_pixels, self._most_result_pixels = most_pixels, most_result_pixels
        self._metrics = metrics

    async def decode(self, tensors: Mapping[str, Any], settings: Settings, report: Report) -> Files:
        """The image of a latent `[1, C, h, w]`."""
        model = self._chosen(settings.model)
        manifest = _about(model).manifest
        _check_guidance(manifest, settings, has_negative="negative" in tensors)
        caption = await self._caption(model, tensors.get("caption"), settings.prompt)
        negative = await self._negative(model, tensors.get("negative"), settings)
        given = tensors.get("sigma", 0.0) if settings.sigma is None else settings.sigma
        task = _task(settings, _number(given), caption, negative, latent=tensors["latent"])
        check_request(
            manifest,
            task.latent,
            task.caption,
            sigma=task.sigma,
            seed=task.seed,
            steps=task.steps,
            negative=task.negative,
            guidance=task.guidance,
            tile=task.tile,
            overlap=task.overlap,
        )
        self._check_result(manifest, *tensors["latent"].shape[2:])
        for name, array, most in (
            ("latent", task.latent, 1e4),
            ("caption", task.caption, 1e6),
            ("negative", task.negative, 1e6),
        ):
            _check_size(name, array, most)
        made = await model.run(task, report)
        return await self._files(made.image, made.native, settings.output)

    async def upscale(self, body: bytes, settings: UpscaleSettings, report: Report) -> Files:
        """A picture enlarged."""
        model = self._chosen(settings.model)
        about = _about(model)
        if about.multiple is None:
            raise unfit("model", "expected a model that enlarges pictures; it decodes latents")
        _check_guidance(about.manifest, settings)

        def check(height: int, width: int) -> None:
            check_size(about.manifest, height, width, settings.tiles, settings.overlap)
            self._check_result(about.manifest, height, width)

        def read() -> tuple[Floats, tuple[int, int]]:
            with self._metrics.stage("read"):
                return read_picture(body, self._most_pixels, check, about.multiple or 1, about.side)

        photo, (height, width) = await asyncio.to_thread(read)
        caption = await self._caption(model, None, settings.prompt)
        negative = await self._negative(model, None, settings)
        task = _task(settings, settings.sigma or 0.0, caption, negative, photo=photo)
        made = await model.run(task, report)
        scale = made.image.shape[0] // photo.shape[2]
        image = made.image[: scale * height, : scale * width]
        native = None if made.native is None else made.native[:height, :width]
        return await self._files(image, native, settings.output)

    async def captions(self, body: CaptionBody) -> Files:
        """Captions of prompts, as safetensors."""
        found = await self._encoded(self._chosen(body.model), tuple(body.prompts), "prompts")
        return Files(save({"caption": np.ascontiguousarray(found)}))

    def described(self, name: str) -> dict[str, Any]:
        """What clients may know of a model."""
        about = _about(self._models[name])
        manifest = about.manifest
        return {
            "name": name,
            "model": manifest.model.get("name"),
            "precision": manifest.precision,
            "latent_channels": manifest.network["latent_channels"],
            "most_pixels": manifest.most_tokens * manifest.network["patch_size"] ** 2,
            "steps": sorted(map(int, manifest.sampler.schedules)),
            "guidance": manifest.sampler.guidance,
            "upscales": about.multiple is not None,
            "prompts": self._captions is not None and manifest.model.get("captioned") is not False,
            "backend": about.backend,
            "device": about.device,
        }

    def _check_result(self, manifest: Manifest, height: int, width: int) -> None:
        """Raise `TooManyPixelsError` for a latent of a height and width that makes a huge image."""
        side = pixels_per_latent_pixel(manifest)
        if height * width * side**2 > self._most_result_pixels:
            raise TooManyPixelsError(
                f"expected an image of at most {self._most_result_pixels} pixels, but got "
                f"{width * side}x{height * side}; ask for less"
            )

    def _chosen(self, name: str | None) -> Model:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise unfit("model", f"expected one of {', '.join(self._models)}")
        return self._models[name]

    async def _caption(self, model: Model, caption: Any, prompt: str | None) -> Any:
        """A caption `[1, T, D]` that came, or of a prompt; None for neither."""
        if prompt is None:
            return caption
        if caption is not None:
            raise unfit("prompt", "expected a caption or a prompt, but got both; drop one")
        return await self._encoded(model, (prompt,), "prompt")

    async def _negative(self, model: Model, negative: Any, settings: Settings) -> Any:
        """A negative caption `[1, T, D]`, as `_caption` finds a caption."""
        field = "negative_prompt"
        if settings.negative_prompt is None:
            return negative
        if negative is not None:
            raise unfit(field, "expected a negative or a prompt of it, but got both; drop one")
        return await self._encoded(model, (settings.negative_prompt,), field)

    async def _encoded(self, model: Model, texts: tuple[str, ...], field: str) -> Floats:
        manifest = _about(model).manifest
        if manifest.model.get("captioned") is False:
            raise unfit(field, "expected no prompt, since the model was trained without captions")
        if self._captions is None:
            raise unfit(
                field,
                "expected a caption, since this server encodes no prompts; send the embedding, or "
                "start it with --encoder",
            )
        width, wanted = self._captions.about, manifest.network["text_dim"]
        if width != wanted:
            raise unfit(
                field, f"expected a model whose captions have {width} channels, not {wanted}"
            )
        return await self._captions.run(CaptionTask(texts, manifest.network["text_max_length"]))

    async def _files(self, image: Bytes, native: Bytes | None, output: str) -> Files:
        def encode() -> Files:
            with self._metrics.stage("encode"):
                return Files(
                    encoded(image, output), None if native is None else encoded(native, output)
                )

        return await asyncio.to_thread(encode)


def _about(model: Model) -> About:
    return model.about


def _task(
    settings: Settings,
    sigma: float,
    caption: Any,
    negative: Any,
    *,
    latent: Any = None,
    photo: Any = None,
) -> DecodeTask:
    """What a request's settings make of a latent, or of a photo."""
    return DecodeTask(
        latent=latent,
        photo=photo,
        caption=caption,
        sigma=sigma,
        seed=settings.seed,
        steps=settings.steps,
        tile=settings.tiles,
        overlap=settings.overlap,
        negative=negative,
        guidance=settings.guidance,
        preview=settings.preview,
        native=settings.native,
    )


def _number(sigma: Any) -> float:
    """A noise level of a request's tensors. Raises `PidRuntimeError` for several, or none."""
    array = np.asarray(sigma)
    if array.size != 1 or array.dtype.kind not in "fiu":
        raise PidRuntimeError(f"expected one number as sigma, but got shape {list(array.shape)}")
    return float(array.reshape(()))


def _check_guidance(manifest: Manifest, settings: Settings, *, has_negative: bool = False) -> None:
    """Refuse guidance that a bundle does not take, or that lacks a negative caption.

    has_negative: whether an embedding of one came.
    """
    has_prompt = settings.negative_prompt is not None
    field = "negative" if has_negative else "negative_prompt" if has_prompt else "guidance"
    try:
        check_guidance(manifest, settings.guidance, has_negative=has_negative or has_prompt)
    except PidRuntimeError as error:
        raise unfit(field, str(error)) from None


def _check_size(name: str, array: Any, most: float) -> None:
    """Raise `PidRuntimeError` for values that no generator makes, which would give NaN."""
    largest = 0.0 if array is None else float(np.abs(array).max())
    if largest > most:
        raise PidRuntimeError(
            f"expected {name} values of at most {most:g}, but got up to {largest:g}; normalise them"
        )


def unfit(field: str, message: str) -> HTTPException:
    """As the framework says what is wrong with a field."""
    return HTTPException(422, [{"loc": [field], "msg": message}])


def refusal(error: Exception, field: str) -> HTTPException:
    """What a request that failed is answered; field: to be named if its input was at fault."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, QueueFullError):
        return HTTPException(429, "expected a shorter queue; try again", _AGAIN)
    if isinstance(error, WorkerLostError):
        return HTTPException(
            503, "expected a worker to end this, but it was lost; try again", _AGAIN
        )
    if isinstance(error, TooManyPixelsError):
        return HTTPException(413, str(error))
    if isinstance(error, OutOfMemoryError | MemoryError):
        return HTTPException(503, "expected enough memory; send a smaller request")
    if isinstance(error, NotFiniteError):
        _log.error("%s", error)
        return HTTPException(500, "expected a finite image, but got NaN")
    if isinstance(error, PidRuntimeError):
        return unfit(field, str(error))
    _log.error("a request failed:\n%s", "".join(traceback.format_exception(error)))
    return HTTPException(500, "expected an image, but the decode failed")
