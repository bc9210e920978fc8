"""The socket, and how long a client may take for a request's head."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pid_runtime.errors import PidRuntimeError

HEAD_SECONDS = 20.0
"""Most seconds for a request's head: uvicorn itself would wait for ever for a slow one."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that will listen at an address. Raises `PidRuntimeError` for one that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise PidRuntimeError(
            f"expected an address of this machine, but got {host[:100]!r}; change --host"
        ) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1)  # or two servers could share it until the first client comes
    except OSError as error:
        bound.close()
        raise PidRuntimeError(
            f"expected to listen at {host} port {port}, but got: {error.strerror}; change --port "
            "or --host"
        ) from None
    return bound


class Protocol(H11Protocol):
    """uvicorn's, which closes connections whose next request's head comes too slowly."""

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Have a timer while a head is awaited, from its first byte or the connection's begin."""
        if self._has_request():
            self._forget()
        elif self._slow is None:
            self._slow = self.loop.call_later(HEAD_SECONDS, self._close_if_slow)

    def _has_request(self) -> bool:
        cycle: Any = self.cycle  # None at first
        return cycle is not None and not cycle.response_complete

    def _close_if_slow(self) -> None:
        self._slow = None
        if not self._has_request():
            self.transport.close()

    def _forget(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
