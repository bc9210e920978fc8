"""What a server adds to a decode: requests of several clients beside a bare `Decoder` in a loop.

python -m pid_bench.load BUNDLE --url http://127.0.0.1:8000: a running `pid-serve` of that bundle,
with or without --ray, or a Triton server, on this machine. One client and the loop take turns, so
that both meet the same moods of a machine whose speed drifts.
"""

import contextlib
import http.client
import json
import re
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pid_bench.errors import BenchInputError
from pid_runtime.command import console
from pid_runtime.decoder import Decoder

TURN = 10
"""Requests that one client or the loop makes before it is the other's turn."""

LOOK_SECONDS = 0.5
"""How often the queue is looked at; the server is kept from its work meanwhile."""

Floats = NDArray[np.float32]

_EXAMPLES = """examples:
  pid-serve nano --threads 1
  python -m pid_bench.load nano --url http://127.0.0.1:8000 --threads 1 --latent 8x8
  python -m pid_bench.load nano --url http://127.0.0.1:8000 --triton nano   # of pid-triton
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _measure, argv, also=(OSError,), extra="bench")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser("pid-bench-load", "Measure a server under load.", _EXAMPLES)
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle that the server serves")
    add("--url", required=True, help="of the server")
    add("--triton", metavar="MODEL", help="the server is Triton, and this is what to ask there")
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
    kind = "server" if arguments.triton is None else "Triton"
    rows: list[dict[str, Any]] = []
    with Decoder.open(arguments.bundle, threads=arguments.threads) as decoder:
        channels = decoder.manifest.network["latent_channels"]
        latent = np.random.default_rng(0).standard_normal((1, channels, height, width), np.float32)
        server = _Server(arguments.url, latent, arguments.triton)
        _asked(server, 1, 10)  # memory for the shape, and connections
        bare = _Bare(decoder, latent)
        if 1 in clients:
            rows.append({"of": kind, "clients": 1, **_loaded(server, 1, arguments, bare)})
        else:
            bare.decode(arguments.requests)
    rows.insert(0, {"of": "bare decoder", "clients": 1, **_summary(bare.seconds, bare.whole)})
    for count in clients:
        if count > 1:
            loaded = _loaded(server, count, arguments)
            rows.append({"of": kind, "clients": count, **loaded})
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


class _Server:
    """What to ask a server, and how."""

    def __init__(self, url: str, latent: Floats, triton: str | None) -> None:
        """triton: the model's name there; None for `pid-serve`."""
        parts = urlsplit(url)
        self.address = parts.hostname or "127.0.0.1", parts.port or 80
        self.is_triton = triton is not None
        self._latent, self._body, self._triton = latent, save({"latent": latent}), triton

    def request(self, seed: int) -> tuple[str, bytes, dict[str, str]]:
        """Path, body and headers of a decode.

        Triton's are KServe's inference protocol, version 2, with its binary tensor data extension.
        """
        if not self.is_triton:
            return f"/v1/decode?output=safetensors&seed={seed}", self._body, {}
        arrays = {"latent": ("FP32", self._latent), "seed": ("UINT64", np.array([[seed]], "<u8"))}
        inputs = [
            {
                "name": name,
                "datatype": kind,
                "shape": array.shape,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, (kind, array) in arrays.items()
        ]
        outputs = [{"name": "image", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        body = b"".join((head, *(array.tobytes() for _, array in arrays.values())))
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return f"/v2/models/{self._triton}/infer", body, headers

    def metric(self, name: str) -> float:
        """Of `pid-serve`, of all its models."""
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=60)) as client:
            client.request("GET", "/metrics")
            text = client.getresponse().read().decode()
        return sum(map(float, re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.M)))


def _loaded(
    server: _Server,
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
        while not server.is_triton and not ended.wait(LOOK_SECONDS):
            waiting.append(server.metric("pid_queue"))

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
            seconds += _asked(server, clients, turn)
            whole += time.perf_counter() - begin
    finally:
        ended.set()
        looking.join()
    found: dict[str, Any] = {**_summary(seconds, whole)}
    if not server.is_triton:
        found["most_waiting"] = int(max(waiting, default=0))
        found["memory_bytes"] = server.metric("pid_memory_bytes")
    return found


def _asked(server: _Server, clients: int, count: int) -> list[float]:
    """Seconds of every request. Raises `BenchInputError` for an answer that is no image."""
    seconds: list[float] = []
    wrong: list[int] = []
    seeds = iter(range(count))
    lock = threading.Lock()

    def ask_on() -> None:
        with contextlib.closing(http.client.HTTPConnection(*server.address, timeout=300)) as client:
            while True:
                with lock:
                    seed = next(seeds, None)
                if seed is None or wrong:
                    return
                path, body, headers = server.request(seed)
                begin = time.perf_counter()
                client.request("POST", path, body, headers)
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


def _summary(seconds: Sequence[float], whole: float) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"per_second": len(seconds) / whole, "p50": float(p50), "p99": float(p99)}


if __name__ == "__main__":
    raise SystemExit(main())
