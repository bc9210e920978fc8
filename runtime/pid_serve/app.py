"""The application: paths, and what requests to them are answered."""

import asyncio
import base64
import contextlib
import hmac
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from PIL import Image
from prometheus_client import generate_latest
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from pid_runtime import __version__
from pid_serve.bodies import (
    MEDIA_TYPES,
    CaptionBody,
    DecodeBody,
    DecodeSettings,
    UpscaleSettings,
    as_tensors,
    read_tensors,
)
from pid_serve.guard import Guard
from pid_serve.metrics import Metrics
from pid_serve.service import Captions, Files, Model, Report, Service, refusal, unfit
from pid_serve.sessions import Step

_POLL_SECONDS = 0.05
"""How often a request that waits looks whether its client is still there."""

_EVENTS = "text/event-stream"
_JSON = "application/json"
_SAFETENSORS = "application/octet-stream"

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}

_ERROR: dict[str, Any] = {"content": {_JSON: {"schema": {"$ref": "#/components/schemas/Refusal"}}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {**_ERROR, "description": "the body is no JSON or no form"},
    401: {**_ERROR, "description": "another token is expected"},
    408: {**_ERROR, "description": "the body came too slowly"},
    411: {**_ERROR, "description": "the body says no length"},
    413: {**_ERROR, "description": "too many bytes or pixels"},
    422: {**_ERROR, "description": "a field is wrong; loc names it"},
    429: {**_ERROR, "description": "too many requests wait; Retry-After says for how long"},
    503: {**_ERROR, "description": "no worker or no memory for it"},
    504: {**_ERROR, "description": "it takes too long"},
}
_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {kind: {} for kind in (*MEDIA_TYPES.values(), _EVENTS)},
        "description": "the image, or with Accept: text/event-stream the steps and the image",
    },
    **_REFUSALS,
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_LATENT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            _SAFETENSORS: _BINARY,
            _JSON: {"schema": {"$ref": "#/components/schemas/DecodeBody"}},
        },
    }
}
_REFUSAL: dict[str, Any] = {
    "title": "Refusal",
    "type": "object",
    "required": ["detail"],
    "properties": {
        "detail": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["loc", "msg"],
                        "properties": {
                            "loc": {
                                "type": "array",
                                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                            },
                            "msg": {"type": "string"},
                        },
                    },
                },
            ]
        }
    },
}


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    body_bytes: int = 64 * 2**20
    """Most bytes of a body."""
    pixels: int = 16 * 2**20
    """Most pixels of a picture that is sent."""
    seconds: float = 300.0
    """Most seconds from the body's end to the answer."""
    upload_seconds: float = 60.0
    """Most seconds until the body has come."""
    result_pixels: int = 2**26
    """Most pixels of an image that is made."""
    bodies: int = 64
    """Most bodies that are held at a time."""


def make_app(
    models: Mapping[str, Model],
    limits: Limits = Limits(),
    token: str | None = None,
    captions: Captions | None = None,
) -> FastAPI:
    """An application that serves bundles by name, and closes their workers when it ends.

    token: what clients must send as `Authorization: Bearer TOKEN`; None for nothing. captions:
    workers that encode prompts; None where clients must send captions.
    """
    pools = {**models, **({} if captions is None else {"captions": captions})}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        for pool in pools.values():
            await asyncio.to_thread(pool.close)

    app = FastAPIOffline(
        redoc_url=None,
        title="pid-serve",
        version=__version__,
        lifespan=lifespan,
    )
    metrics = Metrics(pools)
    service = Service(models, captions, limits.pixels, limits.result_pixels, metrics)

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, own = models_json_schema(
                [(DecodeBody, "validation")], ref_template="#/components/schemas/{model}"
            )
            schema["components"]["schemas"] |= {**own["$defs"], "Refusal": _REFUSAL}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {token}".encode()
        ):
            raise HTTPException(401, "expected a bearer token", {"WWW-Authenticate": "Bearer"})

    guarded: dict[str, Any] = {
        "dependencies": [Depends(check_token)],
        "response_class": Response,
    }
    app.add_middleware(
        Guard,
        most_bytes=limits.body_bytes,
        seconds=limits.upload_seconds,
        most_bodies=limits.bodies,
        requests=metrics.requests,
    )

    @app.exception_handler(RequestValidationError)
    def invalid(  # pyright: ignore[reportUnusedFunction]
        _: Request, error: RequestValidationError
    ) -> Response:
        # Without the input: it may be long, and no text.
        detail = [{"loc": list(each["loc"]), "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": detail}, 422)

    async def answer(
        request: Request, make: Callable[[Report], Awaitable[Files]], output: str, field: str
    ) -> Response:
        """What `make` makes, when it is made or with its steps as events."""
        if _EVENTS in request.headers.get("accept", ""):
            return StreamingResponse(
                _events(make, MEDIA_TYPES[output], limits.seconds, field),
                media_type=_EVENTS,
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        making = asyncio.ensure_future(_within(limits.seconds, make(None)))
        try:
            while not (await asyncio.wait({making}, timeout=_POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)
            return Response((await making).image, media_type=MEDIA_TYPES[output])
        except Exception as error:  # noqa: BLE001  each has its answer
            raise refusal(error, field) from None
        finally:
            making.cancel()

    @app.post("/v1/decode", **guarded, responses=_IMAGE, openapi_extra=_LATENT)
    async def decode(  # pyright: ignore[reportUnusedFunction]
        request: Request, settings: Annotated[DecodeSettings, Query()]
    ) -> Response:
        """The image of a latent: a safetensors body with "latent", "caption" and "sigma", and the
        settings in the query; or JSON with all of them.
        """
        body = await request.body()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()

        async def make(report: Report) -> Files:
            given = await asyncio.to_thread(read_tensors, body)
            return await service.decode(given, settings, report)

        async def make_of_json(report: Report) -> Files:
            return await service.decode(as_tensors(sent), sent, report)

        if kind != _JSON:
            return await answer(request, make, settings.output, "body")
        if request.query_params:
            raise unfit("query", "expected the settings in the JSON, but got a query")
        try:
            sent = await asyncio.to_thread(DecodeBody.model_validate_json, body)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from None
        return await answer(request, make_of_json, sent.output, "latent")

    @app.post("/v1/upscale", **guarded, responses=_IMAGE)
    async def upscale(  # pyright: ignore[reportUnusedFunction]
        request: Request, settings: Annotated[UpscaleSettings, Form()]
    ) -> Response:
        """A picture enlarged, by a bundle whose latents this server can make."""
        body = await settings.image.read()
        if settings.negative_prompt is None and "negative_prompt" in await request.form():
            # The framework leaves empty fields out, but the usual negative is an empty text.
            settings = settings.model_copy(update={"negative_prompt": ""})

        async def make(report: Report) -> Files:
            return await service.upscale(body, settings, report)

        return await answer(request, make, settings.output, "image")

    @app.post(
        "/v1/captions",
        **guarded,
        responses={
            200: {"content": {_SAFETENSORS: {}}, "description": 'a tensor "caption" [B, T, D]'},
            **_REFUSALS,
        },
    )
    async def captions_(  # pyright: ignore[reportUnusedFunction]
        request: Request, body: CaptionBody
    ) -> Response:
        """Captions of prompts, as safetensors: what `/v1/decode` takes, one at a time."""
        return await answer(request, lambda _: service.captions(body), "safetensors", "prompts")

    @app.get("/", include_in_schema=False)
    def page() -> Response:  # pyright: ignore[reportUnusedFunction]
        """For people."""
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))

    @app.get("/v1/models", dependencies=[Depends(check_token)], responses={401: _REFUSALS[401]})
    def models_(  # pyright: ignore[reportUnusedFunction]
    ) -> dict[str, Any]:
        """The bundles."""
        return {"models": [service.described(name) for name in models]}

    @app.get("/healthz")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {**_ERROR, "description": "a model has no worker"}})
    def readyz() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Every model has a worker that runs; 503 otherwise."""
        missing = [name for name, pool in pools.items() if not pool.ready]
        if missing:
            raise HTTPException(503, f"expected a worker for {', '.join(missing)}")
        workers = {name: {"ready": pool.ready, "of": pool.size} for name, pool in pools.items()}
        return {"status": "ready", "workers": workers}

    @app.get("/metrics", response_class=Response)
    def metrics_() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counts and seconds, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


async def _within(seconds: float, making: Awaitable[Files]) -> Files:
    try:
        return await asyncio.wait_for(making, seconds)
    except asyncio.TimeoutError:
        raise HTTPException(504, f"expected an answer in {seconds:g} s") from None


async def _events(
    make: Callable[[Report], Awaitable[Files]], media_type: str, seconds: float, field: str
) -> AsyncIterator[str]:
    """Events "step", perhaps "native", and at last "image" or "error"."""
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    making = asyncio.ensure_future(_within(seconds, make(steps.put_nowait)))
    making.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        yield ": begun\n\n"  # so that the head of the answer is sent
        while (step := await steps.get()) is not None:
            yield _event("step", step=step.done, steps=step.steps, preview=_data_url(step))
        try:
            files = await making
            if files.native is not None:
                yield _event("native", media_type=media_type, data=_base64(files.native))
            yield _event("image", media_type=media_type, data=_base64(files.image))
        except Exception as error:  # noqa: BLE001  each has its answer
            refused = refusal(error, field)
            yield _event("error", status=refused.status_code, detail=refused.detail)
    finally:
        making.cancel()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _data_url(step: Step) -> str | None:
    """A step's preview as a picture."""
    if step.preview is None:
        return None
    file = io.BytesIO()
    Image.fromarray(step.preview).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + _base64(file.getvalue())
