"""What a server adds to a decode: requests of several clients beside a bare `Decoder` in a loop.

python -m pid_bench.load BUNDLE --url http://127.0.0.1:8000: a running `pid-serve` of that bundle,
with or without --ray, on this machine.
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
    with Decoder.open(arguments.bundle, threads=arguments.threads) as decoder:
        channels = decoder.manifest.network["latent_channels"]
        latent = np.random.default_rng(0).standard_normal((1, channels, height, width), np.float32)
        bare = _bare(decoder, latent, arguments.requests)
    rows: list[dict[str, Any]] = [{"of": "bare decoder", "clients": 1, **bare}]
    url = urlsplit(arguments.url)
    address = url.hostname or "127.0.0.1", url.port or 80
    body = save({"latent": latent})
    _asked(address, body, 1, 10)  # memory for the shape, and connections
    for count in clients:
        rows.append({"of": "server", "clients": count, **_loaded(address, body, count, arguments)})
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


def _bare(decoder: Decoder, latent: Any, count: int) -> dict[str, float]:
    caption = decoder.empty_caption()

    def decode(seed: int) -> float:
        begin = time.perf_counter()
        image = decoder.decode(latent, caption, seed=seed, output="uint8")[0]
        save({"image": np.ascontiguousarray(image)})
        return time.perf_counter() - begin

    for seed in range(5):
        decode(seed)
    begin = time.perf_counter()
    seconds = [decode(seed) for seed in range(count)]
    return _summary(seconds, time.perf_counter() - begin)


def _loaded(
    address: tuple[str, int], body: bytes, clients: int, arguments: Namespace
) -> dict[str, Any]:
    """Seconds of requests, while the queue is looked at; and the memory after."""
    waiting: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            waiting.append(_metric(address, "pid_queue"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        begin = time.perf_counter()
        seconds = _asked(address, body, clients, arguments.requests)
        whole = time.perf_counter() - begin
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
