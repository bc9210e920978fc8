"""`pid-serve`: a real server on loopback, and requests of every kind to it."""

import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from safetensors.numpy import load, save

from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.registry import NANO
from pid_ref.weights import RandomWeights
from pid_runtime.decoder import Bundle, Decoder
from pid_serve import cli
from pid_serve.app import Limits, make_app
from pid_serve.workers import Workers

LATENT = np.linspace(-1, 1, 16 * 2 * 3, dtype=np.float32).reshape(16, 2, 3)
RunCommand = Callable[..., tuple[int, str, str]]
Answer = tuple[int, Mapping[str, str], bytes]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights and fewer blocks, which are exported sooner."""
    path = tmp_path_factory.mktemp("bundle") / "nano"
    config = replace(NANO.config, patch_depth=1, pixel_depth=1)
    weights = RandomWeights(state_shapes(config), 3)
    options = ExportOptions(precision="fp32", buckets=(("tiny", 64),))
    checkpoint = replace(NANO, config=config)
    source = {"random_seed": 3}
    export_bundle(path, config, weights, options, checkpoint=checkpoint, weights=source)
    return path


@contextlib.contextmanager
def serving(models: Mapping[str, Workers], *options: Any) -> Generator[int]:
    """Serve in a thread; gives the port."""
    server = uvicorn.Server(
        uvicorn.Config(make_app(models, *options), port=0, log_config=None, access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(golden_bundle: Path, nano: Path) -> Iterator[int]:
    models = {
        "golden": Workers(Bundle.open(golden_bundle)),
        "nano": Workers(Bundle.open(nano)),
    }
    with serving(models, Limits(2**20, 128 * 128)) as port:
        yield port


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def ask_form(port: int, image: bytes, **fields: str) -> Answer:
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(b'name="image"; filename="a"\r\n\r\n' + image)
    head = b"--sep\r\nContent-Disposition: form-data; "
    body = b"".join(head + part + b"\r\n" for part in parts) + b"--sep--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=sep"}
    return ask(port, "POST", "/v1/upscale", body, **kind)


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_decodes_as_a_decoder_does(port: int, golden_bundle: Path) -> None:
    with Decoder.open(golden_bundle) as pid:
        wanted = pid.decode(LATENT[None], sigma=0.2, seed=7, steps=2, output="uint8")[0]
        clean = pid.decode(LATENT[None], output="uint8")[0]
    assert (wanted != clean).any()
    asked = "/v1/decode?seed=7&steps=2"
    for body, more in (
        ({"latent": LATENT}, "&sigma=0.2"),
        ({"latent": LATENT[None], "sigma": np.array(0.2, np.float32)}, ""),
    ):
        status, headers, image = ask(port, "POST", asked + more, save(body))
        assert (status, headers["content-type"]) == (200, "image/png")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), wanted)
    raw = ask(port, "POST", "/v1/decode?output=safetensors", save({"latent": LATENT}))[2]
    np.testing.assert_array_equal(load(raw)["image"], clean)


def test_enlarges_as_a_decoder_does(port: int, nano: Path) -> None:
    sent = picture(16, 16)
    with Decoder.open(nano) as pid:
        latent = pid.encode(Image.open(io.BytesIO(sent)), sigma=0.1, seed=3)
        wanted = pid.decode(latent, sigma=0.1, seed=3, output="uint8")[0]
    status, _, image = ask_form(port, sent, model="nano", sigma="0.1", seed="3")
    assert status == 200
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), wanted)
    webp = ask_form(port, sent, model="nano", output="webp")[1]
    assert webp["content-type"] == "image/webp"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("sigma=1.5", "sigma"),
        ("sigma=nan", "sigma"),
        ("seed=-1", "seed"),
        ("seed=18446744073709551616", "seed"),
        ("steps=many", "steps"),
        ("output=gif", "output"),
        ("colour=red", "colour"),
        ("model=absent", "model"),
        ("steps=3", "body"),
    ],
)
def test_wrong_settings_are_named(port: int, query: str, field: str) -> None:
    status, _, body = ask(port, "POST", f"/v1/decode?{query}", save({"latent": LATENT}))
    assert status == 422 and field in json.loads(body)["detail"][0]["loc"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80\x04}.",
        b"PK\x03\x04" + bytes(40),
        b"\xff" * 8,
        save({"other": LATENT}),
        save({"latent": LATENT, "more": LATENT}),
        save({"latent": LATENT[:3]}),
        save({"latent": LATENT * np.nan}),
        save({"latent": LATENT.astype(np.int32)}),
        save({"latent": np.stack([LATENT] * 2)}),
        save({"latent": LATENT, "caption": LATENT}),
        save({"latent": LATENT, "sigma": np.array(7.0, np.float32)}),
    ],
)
def test_bodies_that_are_no_latents(port: int, body: bytes) -> None:
    status, _, answer = ask(port, "POST", "/v1/decode", body)
    assert status == 422 and b"Traceback" not in answer and b"/" not in answer


def test_pictures_that_are_none_or_too_large(port: int) -> None:
    assert ask_form(port, b"no picture", model="nano")[0] == 422
    assert ask_form(port, picture(64, 64)[:-60], model="nano")[0] == 422
    assert ask_form(port, picture(200, 200), model="nano")[0] == 413
    assert ask_form(port, picture(16, 16), model="golden")[0] == 422  # it has no codec
    assert ask_form(port, picture(16, 16), model="nano", colour="red")[0] == 422


def test_bodies_that_are_too_long(port: int) -> None:
    status, _, answer = ask(port, "POST", "/v1/decode", bytes(2**20 + 1))
    assert status == 413 and b"1048576" in answer
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 411")


def test_altered_bodies_are_refused_or_decoded(port: int) -> None:
    draw, good = random.Random(17), save({"latent": LATENT})
    statuses: set[int] = set()
    for _ in range(200):
        body = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            body[draw.randrange(80)] = draw.randrange(256)
        statuses.add(ask(port, "POST", "/v1/decode", bytes(body))[0])
    assert 422 in statuses and statuses <= {200, 422}


def test_says_how_it_is(port: int) -> None:
    assert ask(port, "GET", "/healthz")[0] == ask(port, "GET", "/readyz")[0] == 200
    models = json.loads(ask(port, "GET", "/v1/models")[2])["models"]
    assert [(model["name"], model["upscales"]) for model in models] == [
        ("golden", False),
        ("nano", True),
    ]
    assert ask(port, "POST", "/v1/decode", save({"latent": LATENT}))[0] == 200
    text = ask(port, "GET", "/metrics")[2].decode()
    assert 'pid_requests_total{path="/v1/decode",status="200"}' in text
    assert 'pid_seconds_count{stage="decode"}' in text and 'pid_queue{model="nano"} 0.0' in text
    assert "/v1/upscale" in json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]


def test_a_full_queue_a_time_limit_and_clients_that_leave(golden_bundle: Path) -> None:
    workers = Workers(Bundle.open(golden_bundle), queue_size=1)
    begun, go_on = threading.Event(), threading.Event()

    def block(*_: object) -> bytes:
        begun.set()
        go_on.wait(10)
        return b""

    def wait_for_queue(count: int) -> None:
        end = time.monotonic() + 20
        while workers.waiting != count:
            assert time.monotonic() < end
            time.sleep(0.01)

    with serving({"golden": workers}, Limits(seconds=0.3)) as port:
        workers.submit(block)
        assert begun.wait(20)
        body = save({"latent": LATENT})
        assert ask(port, "POST", "/v1/decode", body)[0] == 504
        assert workers.waiting == 1  # given up, and not yet taken out
        status, headers, _ = ask(port, "POST", "/v1/decode", body)
        assert (status, headers["retry-after"]) == (429, "1")
        go_on.set()
        wait_for_queue(0)
        assert ask(port, "POST", "/v1/decode", body)[0] == 200
        text = ask(port, "GET", "/metrics")[2].decode()
        assert 'pid_seconds_count{stage="decode"} 1.0' in text  # what was given up was not decoded
    assert not workers.is_alive()

    workers = Workers(Bundle.open(golden_bundle), queue_size=1)
    begun.clear()
    go_on.clear()
    with serving({"golden": workers}) as port:
        workers.submit(block)
        assert begun.wait(20)
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_for_queue(1)
        end = time.monotonic() + 20
        while b'status="499"' not in ask(port, "GET", "/metrics")[2]:
            assert time.monotonic() < end
            time.sleep(0.02)
        go_on.set()
        assert ask(port, "POST", "/v1/decode", body)[0] in (200, 429)


def test_tokens(golden_bundle: Path) -> None:
    with serving({"golden": Workers(Bundle.open(golden_bundle))}, Limits(), "secret") as port:
        assert ask(port, "GET", "/healthz")[0] == 200
        assert ask(port, "GET", "/v1/models")[0] == 401
        assert ask(port, "GET", "/v1/models", Authorization="Bearer secreu")[0] == 401
        assert ask(port, "GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert ask(port, "POST", "/v1/decode", save({"latent": LATENT}))[0] == 401


def test_the_command_answers_what_was_asked_before_it_ends(golden_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pid_serve.cli", str(golden_bundle), "--port", str(port)]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["address"].endswith(f":{port}")
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                assert ask(port, "GET", "/readyz")[0] == 200
                break
            assert time.monotonic() < end
            time.sleep(0.05)
        latent = np.zeros((16, 12, 12), np.float32)
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                ask(port, "POST", "/v1/decode", save({"latent": latent}))[0]
            )
        )
        asking.start()
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
        asking.join()
        assert answers == [200]


def test_what_the_command_refuses(golden_bundle: Path, run_command: RunCommand) -> None:
    for given, message in (
        ([str(golden_bundle), str(golden_bundle)], "expected bundles of different names"),
        ([str(golden_bundle), "--timeout", "0"], "expected a timeout above 0"),
        (["absent"], "absent"),
    ):
        code, out, err = run_command(cli.main, *given)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
