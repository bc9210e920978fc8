"""What is refused before a request is read: bodies by their length, their number and their time."""

import asyncio

from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WITH_BODY = ("POST", "PUT", "PATCH")


class Guard:
    """Refuses bodies, and counts answers.

    Below the framework's own middleware, which would hide that a client hung up.
    """

    def __init__(
        self, app: ASGIApp, most_bytes: int, seconds: float, most_bodies: int, requests: Counter
    ) -> None:
        """most_bytes: of a body; seconds: until it has come; most_bodies: held at a time."""
        self._app, self._requests = app, requests
        self._most_bytes, self._seconds, self._most_bodies = most_bytes, seconds, most_bodies
        self._bodies = 0

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

        if scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, count)
            return
        refused = self._refused(Request(scope))
        if refused is not None:
            await refused(scope, receive, count)
            return
        self._bodies += 1
        try:
            await self._app(scope, self._timed(receive), count)
        finally:
            self._bodies -= 1

    def _refused(self, request: Request) -> Response | None:
        """An answer to a body that is too long, or one too many, or of unknown length."""
        headers = request.headers
        # Without either there is no body.
        length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        if not (length.isascii() and length.isdecimal()):
            return JSONResponse({"detail": "expected a Content-Length"}, 411)
        if len(length) > 18 or int(length) > self._most_bytes:
            detail = f"expected a body of at most {self._most_bytes} bytes"
            return JSONResponse({"detail": detail}, 413)
        if self._bodies >= self._most_bodies:
            return busy("expected fewer requests at a time; try again")
        return None

    def _timed(self, receive: Receive) -> Receive:
        """The same, but a body that comes too slowly is answered 408."""
        end = asyncio.get_running_loop().time() + self._seconds
        is_whole = False

        async def timed() -> Message:
            nonlocal is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            left = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except asyncio.TimeoutError:
                detail = f"expected the body within {self._seconds:g} s"
                raise HTTPException(408, detail, {"Connection": "close"}) from None
            is_whole = not message.get("more_body", False)
            return message

        return timed


def busy(detail: str, status: int = 429) -> Response:
    """An answer that tells the client to come again."""
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"})
