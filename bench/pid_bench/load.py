"""What a server adds to a decode: requests of several clients beside a bare `Decoder` in a loop.

python -m pid_bench.load BUNDLE --url http://127.0.0.1:8000: a running `pid-serve` of that bundle,
with or without --ray, on this machine. One client and the loop take turns, so that both meet the
same moods of a machine whose speed drifts.
"""

import contextlib
import http.client
import re
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from safetensors.numpy import save

from pid_bench.errors import BenchInputError
from pid_runtime.command import console
from pid_runtime.decoder import Decoder

TURN = 10
"""Requests that one client or the loop makes before it is the other's turn."""

LOOK_SECONDS = 0.5
"""How often the queue is looked at; the server is kept from its work meanwhile."""

_EXAMPLES = """examples:
  pid-serve nano --threads 1
  python -m pid_bench.load nano --url http://127.0.0.1:8000 --threads 1 --latent 8x8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _measure, argv, also=(OSError,), extra="bench")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser("pid-bench-load", "Measure a server under load.", _EXAMPLES)
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle that the server serves")
    add("--url", required=True, help="of the server")
    add("--clients", default="1,4,16", metavar="N,N,..", help="that ask at a time")
    add("--requests", type=int, default=200, metavar="N", help="of all clients together")
    add("--latent", type=console.read_size, default=(8, 8), metavar="WxH", help="latent pixels")
    add("--threads", type=int, metavar="N", help="of the bare decoder, as the server has them")
    return parser


def _measure(arguments: Namespace) -> None:
    clients = [int(each) for each in arguments.clients.split(",")]
    if arguments.requests < max(clients) or min(clients) < 1:
        raise BenchInputError(
            f"expected a request for each client, but got {arguments.requests} for "
            f"{max(clients)}; change --requests"
        )
    width, height = arguments.latent
    url = urlsplit(arguments.url)
    address = url.hostname or "127.0.0.1", url.port or 80
    rows: list[dict[str, Any]] = []
    with Decoder.open(arguments.bundle, threads=arguments.threads) as decoder:
        channels = decoder.manifest.network["latent_channels"]
        latent = np.random.default_rng(0).standard_normal((1, channels, height, width), np.float32)
        body = save({"latent": latent})
        _asked(address, body, 1, 10)  # memory for the shape, and connections
        bare = _Bare(decoder, latent)
        if 1 in clients:
            rows.append(
                {"of": "server", "clients": 1, **_loaded(address, body, 1, arguments, bare)}
            )
        else:
            bare.decode(arguments.requests)
    rows.insert(0, {"of": "bare decoder", "clients": 1, **_summary(bare.seconds, bare.whole)})
    for count in clients:
        if count > 1:
            loaded = _loaded(address, body, count, arguments)
            rows.append({"of": "server", "clients": count, **loaded})
    table = [
        ["of", "clients", "requests/s", "p50 ms", "p99 ms", "most waiting", "MB"],
        *(
            [
                str(row["of"]),
                str(row["clients"]),
                f"{row['per_second']:.1f}",
                f"{1000 * row['p50']:.1f}",
                f"{1000 * row['p99']:.1f}",
                str(row.get("most_waiting", "")),
                f"{row['memory_bytes'] / 1e6:.0f}" if "memory_bytes" in row else "",
            ]
            for row in rows
        ),
    ]
    console.emit({"rows": rows}, console.aligned(table), as_json=arguments.json)


class _Bare:
    """A decoder in a loop, and how long it took."""

    def __init__(self, decoder: Decoder, latent: Any) -> None:
        self._decoder, self._latent, self._caption = decoder, latent, decoder.empty_caption()
        self.seconds: list[float] = []
        self.whole = 0.0
        self.decode(5)
        self.seconds, self.whole = [], 0.0

    def decode(self, count: int) -> None:
        """As the server answers: an image, as safetensors."""
        begin = time.perf_counter()
        for _ in range(count):
            start = time.perf_counter()
            seed = len(self.seconds)
            image = self._decoder.decode(self._latent, self._caption, seed=seed, output="uint8")[0]
            save({"image": np.ascontiguousarray(image)})
            self.seconds.append(time.perf_counter() - start)
        self.whole += time.perf_counter() - begin


def _loaded(
    address: tuple[str, int],
    body: bytes,
    clients: int,
    arguments: Namespace,
    other: _Bare | None = None,
) -> dict[str, Any]:
    """Seconds of requests, while the queue is looked at; and the memory after.

    other: what takes turns with the clients.
    """
    waiting: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            waiting.append(_metric(address, "pid_queue"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        seconds: list[float] = []
        whole = 0.0
        while (left := arguments.requests - len(seconds)) > 0:
            turn = left if other is None else min(TURN, left)
            if other is not None:
                other.decode(turn)
            begin = time.perf_counter()
            seconds += _asked(address, body, clients, turn)
            whole += time.perf_counter() - begin
    finally:
        ended.set()
        looking.join()
    return {
        **_summary(seconds, whole),
        "most_waiting": int(max(waiting, default=0)),
        "memory_bytes": _metric(address, "pid_memory_bytes"),
    }


def _asked(address: tuple[str, int], body: bytes, clients: int, count: int) -> list[float]:
    """Seconds of every request. Raises `BenchInputError` for an answer that is no image."""
    seconds: list[float] = []
    wrong: list[int] = []
    seeds = iter(range(count))
    lock = threading.Lock()

    def ask_on() -> None:
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=300)) as client:
            while True:
                with lock:
                    seed = next(seeds, None)
                if seed is None or wrong:
                    return
                begin = time.perf_counter()
                client.request("POST", f"/v1/decode?output=safetensors&seed={seed}", body)
                answer = client.getresponse()
                answer.read()
                seconds.append(time.perf_counter() - begin)
                if answer.status != 200:
                    wrong.append(answer.status)

    threads = [threading.Thread(target=ask_on) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong or len(seconds) != count:
        got = f"{wrong[0]}" if wrong else f"{len(seconds)} answers of {count}"
        raise BenchInputError(
            f"expected 200 of the server, but got {got}; does it serve this bundle, with a queue "
            f"for {clients} clients?"
        )
    return seconds


def _metric(address: tuple[str, int], name: str) -> float:
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as client:
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
    return sum(map(float, re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.M)))


def _summary(seconds: Sequence[float], whole: float) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"per_second": len(seconds) / whole, "p50": float(p50), "p99": float(p99)}


if __name__ == "__main__":
    raise SystemExit(main())
