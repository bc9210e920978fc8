"""Requests that nobody should send, and many at once: no 5xx, no growth, nothing left behind.

The long ones are marked slow.
"""

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.numpy import save
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serving import ask, ask_form, metric, own_bytes, picture, running, wait_until

LATENT = np.linspace(-1, 1, 192 * 2 * 3, dtype=np.float32).reshape(192, 2, 3)
GOOD = save({"latent": LATENT})
BINARY = {"Content-Type": "application/octet-stream"}

SMALL = ("--max-body", "1", "--max-pixels", "16384", "--threads", "1")


def attack(port: int, examples: int) -> Counter[int]:
    """Send requests as the OpenAPI document says, and as it says not; gives the statuses.

    Every answer is one that the document has for the request.
    """
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    found: Counter[int] = Counter()
    for each in schema.get_all_operations():
        operation: Any = each.ok()  # pyright: ignore[reportAttributeAccessIssue]
        takes_nothing = operation.method == "get"
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        for mode in modes[:1] if takes_nothing else modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=1 if takes_nothing else examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            )
            def send(case: Any) -> None:
                answer = case.call()
                found[answer.status_code] += 1
                # What tensors are in a safetensors body the document cannot say; and 411 is no
                # acceptance, though schemathesis takes it for one.
                but = [positive_data_acceptance]
                but += [negative_data_rejection] if answer.status_code == 411 else []
                case.validate_response(answer, excluded_checks=but)

            send()
    return found


def fuzzed(draw: random.Random) -> bytes:
    """A safetensors body with a latent, and something wrong with it; not always."""
    kind = draw.randrange(6)
    if kind == 0:  # bytes of the header
        body = bytearray(GOOD)
        for _ in range(draw.randint(1, 4)):
            body[draw.randrange(80)] = draw.randrange(256)
        return bytes(body)
    if kind == 1:  # cut, or with more
        return GOOD[: draw.randrange(len(GOOD))] if draw.random() < 0.5 else GOOD + bytes(9)
    if kind == 2:  # the header's length
        length = draw.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, draw.randrange(2**16)])
        return length.to_bytes(8, "little") + GOOD[8:]
    if kind == 3:  # JSON that is deep or long
        text = draw.choice([b"[" * 5000, b'{"a":' * 3000, b'{"a":"' + b"x" * 90_000 + b'"}'])
        return len(text).to_bytes(8, "little") + text
    if kind == 4:  # numbers
        values = draw.choice([np.nan, np.inf, 1e38, -1e38, 1e-45, 0])
        return save({"latent": np.full_like(LATENT, values)})
    sizes = [0, 1, 2, 384, 768, -1, 2**31, 2**63, 1.5, "1", None]
    info = {
        "dtype": draw.choice(["F32", "F16", "BF16", "F64", "I8", "U64", "BOOL", "F8_E4M3", "X"]),
        "shape": [draw.choice([0, 1, 2, 3, 192, 2**40, -1, 1.5]) for _ in range(draw.randrange(6))],
        "data_offsets": [draw.choice(sizes), draw.choice(sizes)],
    }
    names = draw.sample(["latent", "caption", "negative", "sigma", "__metadata__", "other"], 2)
    text = json.dumps(dict.fromkeys(names, info)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(draw.choice([0, 1, 384, 768]))


def fuzz(port: int, count: int, seed: int = 17) -> Counter[int]:
    """Send fuzzed bodies over one connection; gives the statuses."""
    draw, found = random.Random(seed), Counter[int]()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        for _ in range(count):
            client.request("POST", "/v1/decode?steps=1", fuzzed(draw), BINARY)
            answer = client.getresponse()
            answer.read()
            found[answer.status] += 1
    return found


def leave(port: int, draw: random.Random) -> None:
    """Ask for a decode, and hang up."""
    head = f"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()
    body = GOOD[: draw.randrange(len(GOOD))] if draw.random() < 0.3 else GOOD
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head + body)
        time.sleep(draw.random() * 0.05)


def ask_by_json(port: int) -> int:
    tensor = {"shape": [192, 2, 3], "data": base64.b64encode(LATENT.tobytes()).decode()}
    kind = {"Content_Type": "application/json", "Accept": "text/event-stream"}
    body = json.dumps({"latent": tensor, "preview": True}).encode()
    return ask(port, "POST", "/v1/decode", body, **kind)[0]


def mixed_load(port: int, clients: int, seconds: float) -> Counter[int]:
    """Good and bad requests of several clients, some of whom hang up; gives the statuses."""
    found: Counter[int] = Counter()
    end = time.monotonic() + seconds
    failures: list[Exception] = []

    def ask_on(seed: int) -> None:
        draw = random.Random(seed)
        kinds: list[Callable[[], int]] = [
            lambda: ask(port, "POST", "/v1/decode", GOOD)[0],
            lambda: ask(port, "POST", "/v1/decode?steps=1", fuzzed(draw))[0],
            lambda: ask_form(port, picture(24, 16), sigma="0.1", native="true")[0],
            lambda: ask_by_json(port),
            lambda: ask(port, "GET", "/metrics")[0],
        ]
        try:
            while time.monotonic() < end:
                if draw.random() < 0.3:
                    leave(port, draw)
                else:
                    found[draw.choice(kinds)()] += 1
        except Exception as error:  # noqa: BLE001  for the test to see
            failures.append(error)

    threads = [threading.Thread(target=ask_on, args=[seed]) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return found


def is_idle(port: int) -> bool:
    return metric(port, "pid_queue") == 0 and ask(port, "GET", "/readyz")[0] == 200


def handles(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_requests_that_the_document_has_and_has_not(nano: Path) -> None:
    with running(nano, *SMALL) as (port, _):
        found = attack(port, 10)
        assert found[422] > 20 and found[200] >= 4 and max(found) < 500
        assert fuzz(port, 150).keys() <= {200, 422}
        assert metric(port, "pid_worker_restarts") == 0
        assert ask(port, "POST", "/v1/decode", GOOD)[0] == 200


def test_mixed_load_leaves_nothing_behind(nano: Path) -> None:
    load_leaves_nothing(nano, seconds=1.5, most_growth=2**30)


@pytest.mark.slow
def test_two_minutes_of_mixed_load_leave_nothing_behind(nano: Path) -> None:
    load_leaves_nothing(nano, seconds=120, most_growth=16 * 2**20)


def load_leaves_nothing(nano: Path, seconds: float, most_growth: int) -> None:
    with running(nano, *SMALL, "--workers", 2, "--queue", 4, "--batch", 2) as (port, pid):
        before = ask(port, "POST", "/v1/decode", GOOD)[2]
        mixed_load(port, 6, min(seconds, 10))  # until what is kept is there
        wait_until(lambda: is_idle(port))
        memory, open_before = own_bytes(pid), handles(pid)
        workers = metric(port, "pid_memory_bytes")
        found = mixed_load(port, 6, seconds)
        assert found.keys() <= {200, 422, 429} and found[200] > 5 and found[422] > 5
        wait_until(lambda: is_idle(port))
        wait_until(lambda: handles(pid) <= open_before)
        assert ask(port, "POST", "/v1/decode", GOOD)[2] == before
        assert metric(port, "pid_worker_restarts") == 0
        assert own_bytes(pid) - memory < most_growth
        assert metric(port, "pid_memory_bytes") - workers < most_growth


def ask_often(port: int, count: int, clients: int = 4) -> Counter[int]:
    """Latents to decode and pictures to enlarge, in turn; gives the statuses."""
    found: Counter[int] = Counter()

    def ask_on() -> None:
        for number in range(count // clients):
            if number % 2:
                found[ask(port, "POST", f"/v1/decode?seed={number}", GOOD)[0]] += 1
            else:
                found[ask_form(port, picture(24, 16), seed=str(number))[0]] += 1

    threads = [threading.Thread(target=ask_on) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests(nano: Path) -> None:
    with running(nano, *SMALL) as (port, pid):
        ask_often(port, 200)  # until what is kept is there
        memory, workers = own_bytes(pid), metric(port, "pid_memory_bytes")
        assert ask_often(port, 1000) == {200: 1000}
        assert own_bytes(pid) - memory < 8 * 2**20
        assert metric(port, "pid_memory_bytes") - workers < 8 * 2**20


@pytest.mark.slow
def test_ten_thousand_malformed_requests(nano: Path) -> None:
    with running(nano, *SMALL) as (port, pid):
        fuzz(port, 1000)
        attack(port, 100)
        memory, workers = own_bytes(pid), metric(port, "pid_memory_bytes")
        found = attack(port, 1700) + fuzz(port, 10_000, 18)
        assert found.total() > 20_000 and found.keys() <= {200, 400, 405, 411, 413, 415, 422}
        assert own_bytes(pid) - memory < 16 * 2**20
        assert metric(port, "pid_memory_bytes") - workers < 16 * 2**20


@pytest.mark.slow
def test_workers_that_are_killed_lose_their_own_requests(nano: Path) -> None:
    """Ten kills under load: as many 503 at most, everything else is answered."""
    with running(nano, *SMALL, "--workers", 2, "--queue", 32) as (port, pid):
        found: Counter[int] = Counter()
        ended = threading.Event()

        def ask_on() -> None:
            while not ended.is_set():
                found[ask(port, "POST", "/v1/decode", GOOD)[0]] += 1

        threads = [threading.Thread(target=ask_on) for _ in range(8)]
        for thread in threads:
            thread.start()
        for kill in range(10):
            wait_until(lambda: ask(port, "GET", "/readyz")[2].count(b'"ready":2') == 1)
            workers = workers_of(pid)
            os.kill(workers[kill % 2], signal.SIGKILL)
            time.sleep(0.3)
        wait_until(lambda: ask(port, "GET", "/readyz")[2].count(b'"ready":2') == 1)
        ended.set()
        for thread in threads:
            thread.join()
        assert found.keys() <= {200, 503} and found[503] <= 10 < found[200]
        assert metric(port, "pid_worker_restarts") == 10


def workers_of(pid: int) -> list[int]:
    """Processes that a server started to work, by what they run."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
            if parent == pid and b"spawn_main" in command:
                found.append(int(stat.parent.name))
    return found
