"""The application: requests to workers and back."""

import asyncio
import contextlib
import hmac
import logging
import queue
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pid_runtime import __version__
from pid_runtime.decoder import Decoder, Progress
from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError
from pid_runtime.request import check_request
from pid_serve.bodies import (
    MEDIA_TYPES,
    DecodeSettings,
    Settings,
    TooManyPixelsError,
    UpscaleSettings,
    encoded,
    read_picture,
    read_tensors,
)
from pid_serve.workers import CancelledError, Work, Workers

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
"""How often a request that waits looks whether its client is still there."""

_PICTURES: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}, "description": "the image"}
}
_LATENT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
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


class _Metrics:
    def __init__(self, models: Mapping[str, Workers]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pid_requests", "answered", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "pid_seconds", "in a decoder's thread, by stage", ["stage"], registry=self.registry
        )
        waiting = Gauge("pid_queue", "jobs that wait", ["model"], registry=self.registry)
        for name, workers in models.items():
            waiting.labels(name).set_function(lambda w=workers: w.waiting)

    @contextlib.contextmanager
    def stage(self, name: str) -> Any:
        """Measure a block."""
        begin = time.perf_counter()
        yield
        self.seconds.labels(name).observe(time.perf_counter() - begin)


def make_app(
    models: Mapping[str, Workers], limits: Limits = Limits(), token: str | None = None
) -> FastAPI:
    """An application that serves bundles by name, and closes them when it ends.

    token: what clients must send as `Authorization: Bearer TOKEN`; None for nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        for workers in models.values():
            await asyncio.to_thread(workers.close)

    app = FastAPI(title="pid-serve", version=__version__, lifespan=lifespan)
    metrics = _Metrics(models)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {token}".encode()
        ):
            raise HTTPException(401, "expected a bearer token", {"WWW-Authenticate": "Bearer"})

    app.add_middleware(_Guard, most_bytes=limits.body_bytes, requests=metrics.requests)

    @app.exception_handler(RequestValidationError)
    def invalid(  # pyright: ignore[reportUnusedFunction]
        _: Request, error: RequestValidationError
    ) -> Response:
        # Without the input: it may be long, and no text.
        detail = [{"loc": list(each["loc"]), "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": detail}, 422)

    def chosen(settings: Settings) -> Workers:
        name = next(iter(models)) if settings.model is None else settings.model
        if name not in models:
            raise _unfit("model", f"expected one of {', '.join(models)}")
        return models[name]

    async def answer(
        request: Request, workers: Workers, work: Work, output: str, field: str
    ) -> Response:
        try:
            job = workers.submit(work)
        except queue.Full:
            raise HTTPException(
                429, "expected a shorter queue; try again", {"Retry-After": "1"}
            ) from None
        waited = asyncio.wrap_future(job.result)
        end = time.monotonic() + limits.seconds
        try:
            while not (await asyncio.wait({waited}, timeout=_POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)
                if time.monotonic() > end:
                    raise HTTPException(504, f"expected an answer in {limits.seconds:g} s")
            return Response(await waited, media_type=MEDIA_TYPES[output])
        except HTTPException:
            raise
        except TooManyPixelsError as error:
            raise HTTPException(413, str(error)) from None
        except (OutOfMemoryError, MemoryError):
            raise HTTPException(503, "expected enough memory; send a smaller request") from None
        except NotFiniteError as error:
            _log.error("%s", error)
            raise HTTPException(500, "expected a finite image, but got NaN") from None
        except PidRuntimeError as error:
            raise _unfit(field, str(error)) from None
        except Exception:  # noqa: BLE001  its text is for the log alone
            _log.exception("a decode failed")
            raise HTTPException(500, "expected an image, but the decode failed") from None
        finally:
            job.cancel()
            waited.add_done_callback(_take_error)

    @app.post(
        "/v1/decode",
        dependencies=[Depends(check_token)],
        responses=_PICTURES,
        response_class=Response,
        openapi_extra=_LATENT,
    )
    async def decode(  # pyright: ignore[reportUnusedFunction]
        request: Request, settings: Annotated[DecodeSettings, Query()]
    ) -> Response:
        """The image of a latent: a safetensors body with "latent", "caption" and "sigma"."""
        body, workers = await request.body(), chosen(settings)

        def work(decoder: Decoder, progress: Progress) -> bytes:
            tensors = read_tensors(body)
            sigma = tensors.get("sigma", 0.0) if settings.sigma is None else settings.sigma
            checked = check_request(
                decoder.manifest,
                tensors["latent"],
                tensors.get("caption"),
                sigma=sigma,
                seed=settings.seed,
                steps=settings.steps,
            )
            with metrics.stage("decode"):
                pixels = decoder.run(checked, "uint8", progress=progress)[0]
            with metrics.stage("encode"):
                return encoded(pixels, settings.output)

        return await answer(request, workers, work, settings.output, "body")

    @app.post(
        "/v1/upscale",
        dependencies=[Depends(check_token)],
        responses=_PICTURES,
        response_class=Response,
    )
    async def upscale(  # pyright: ignore[reportUnusedFunction]
        request: Request, settings: Annotated[UpscaleSettings, Form()]
    ) -> Response:
        """A picture enlarged by a bundle that has a codec."""
        body, workers = await settings.image.read(), chosen(settings)

        def work(decoder: Decoder, progress: Progress) -> bytes:
            with metrics.stage("read"):
                picture = read_picture(body, limits.pixels)
                latent = decoder.encode(picture, sigma=settings.sigma, seed=settings.seed)
            checked = check_request(
                decoder.manifest,
                latent,
                sigma=settings.sigma,
                seed=settings.seed,
                steps=settings.steps,
            )
            with metrics.stage("decode"):
                pixels = decoder.run(checked, "uint8", progress=progress)[0]
            with metrics.stage("encode"):
                return encoded(pixels, settings.output)

        return await answer(request, workers, work, settings.output, "image")

    @app.get("/v1/models", dependencies=[Depends(check_token)])
    def models_(  # pyright: ignore[reportUnusedFunction]
    ) -> dict[str, Any]:
        """The bundles."""
        return {"models": [_described(name, workers) for name, workers in models.items()]}

    @app.get("/healthz")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """Every decoder's thread runs; 503 otherwise."""
        if not all(workers.is_alive() for workers in models.values()):
            raise HTTPException(503, "expected every decoder to run")
        return {"status": "ready"}

    @app.get("/metrics")
    def metrics_() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counts and seconds, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


class _Guard:
    """Refuses bodies by their length, and counts answers.

    Below the framework's own middleware, which would hide that a client hung up.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, requests: Counter) -> None:
        self._app, self._most, self._requests = app, most_bytes, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A label for every path that is tried would grow for ever.
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        refused = _refused_length(Request(scope), self._most)
        await (refused or self._app)(scope, receive, count)


def _refused_length(request: Request, most: int) -> Response | None:
    """An answer to a body that is too long, or of which nobody says how long it is."""
    if request.method not in ("POST", "PUT", "PATCH"):
        return None
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal()):
        return JSONResponse({"detail": "expected a Content-Length"}, 411)
    if int(length) > most:
        return JSONResponse({"detail": f"expected a body of at most {most} bytes"}, 413)
    return None


def _unfit(field: str, message: str) -> HTTPException:
    """As the framework says what is wrong with a field."""
    return HTTPException(422, [{"loc": [field], "msg": message}])


def _take_error(waited: "asyncio.Future[bytes]") -> None:
    """Have read the error of a job that nobody waits for, or asyncio logs it."""
    if not waited.cancelled() and not isinstance(waited.exception(), CancelledError | None):
        _log.info("a request that has ended gave: %s", waited.exception())


def _described(name: str, workers: Workers) -> dict[str, Any]:
    manifest = workers.bundle.manifest
    return {
        "name": name,
        "model": manifest.model.get("name"),
        "precision": manifest.precision,
        "latent_channels": manifest.network["latent_channels"],
        "upscales": manifest.codec is not None,
        "backend": workers.bundle.backend,
        "device": workers.bundle.device,
    }
