"""`pid-serve`: a real server on loopback, and requests of every kind to it."""

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load, save

from fakes.sessions import OpenWords
from pid_runtime.decoder import Decoder
from pid_serve import cli, listening
from pid_serve.app import Limits
from pid_serve.pool import Pool
from pid_serve.sessions import CaptionTask
from serving import Answer, ask, ask_form, metric, picture, pool, running, serving, wait_until

LATENT = np.linspace(-1, 1, 16 * 2 * 3, dtype=np.float32).reshape(16, 2, 3)
RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def port(golden_bundle: Path, nano: Path) -> Iterator[int]:
    models = {"golden": pool(golden_bundle), "nano": pool(nano)}
    with serving(models, Limits(2**20, 128 * 128, result_pixels=2**16)) as port:
        yield port


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
        ("guidance=0.5", "guidance"),
        ("guidance=101", "guidance"),
        ("guidance=nan", "guidance"),
        ("guidance=5", "guidance"),  # without a negative
        ("negative_prompt=fog", "negative_prompt"),  # without guidance
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
        save({"latent": LATENT, "negative": LATENT}),
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
    assert 'pid_seconds_count{stage="work"}' in text and 'pid_queue{model="nano"} 0.0' in text
    assert "/v1/upscale" in json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]


@contextlib.contextmanager
def stopped(pids: list[int]) -> Generator[None]:
    """Processes that do nothing, until the end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def asking(port: int, answers: list[Answer]) -> threading.Thread:
    """A request for a decode, in a thread."""

    def decode() -> None:
        answers.append(ask(port, "POST", "/v1/decode", save({"latent": LATENT})))

    thread = threading.Thread(target=decode)
    thread.start()
    return thread


def test_a_full_queue_and_a_time_limit(golden_bundle: Path) -> None:
    model, body = pool(golden_bundle, queue=1), save({"latent": LATENT})
    with serving({"golden": model}, Limits(seconds=1.0)) as port:
        assert ask(port, "POST", "/v1/decode", body)[0] == 200
        answers: list[Answer] = []
        with stopped(model.pids):
            threads = [asking(port, answers)]
            time.sleep(0.2)  # a worker takes it, or the queue would be full for the next one
            threads.append(asking(port, answers))
            wait_until(lambda: model.waiting == 1)
            status, headers, _ = ask(port, "POST", "/v1/decode", body)
            assert (status, headers["retry-after"]) == (429, "1")
            for thread in threads:
                thread.join()
            assert [answer[0] for answer in answers] == [504, 504]
            assert model.waiting == 0
        assert ask(port, "POST", "/v1/decode", body)[0] == 200
        text = ask(port, "GET", "/metrics")[2].decode()
        assert 'pid_seconds_count{stage="encode"} 2.0' in text  # what was given up was not made
    assert model.ready == 0


def test_a_client_that_leaves_takes_its_task_along(golden_bundle: Path) -> None:
    model, body = pool(golden_bundle), save({"latent": LATENT})
    head = f"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving({"golden": model}) as port, stopped(model.pids):
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for client in clients:  # one is begun, the other waits
            client.sendall(head.encode() + body)
        wait_until(lambda: model.waiting == 1)
        for client in clients:
            client.close()
        wait_until(lambda: model.waiting == 0)
        wait_until(lambda: b'status="499"} 2.0' in ask(port, "GET", "/metrics")[2])


def test_a_worker_that_is_killed_is_started_again(golden_bundle: Path) -> None:
    model = pool(golden_bundle)
    with serving({"golden": model}) as port:
        answers: list[Answer] = []
        with stopped(model.pids):
            threads = [asking(port, answers), asking(port, answers)]
            wait_until(lambda: model.waiting == 1)
            os.kill(model.pids[0], signal.SIGKILL)
            wait_until(lambda: ask(port, "GET", "/readyz")[0] == 503)
            for thread in threads:
                thread.join()
        assert sorted(answer[0] for answer in answers) == [200, 503]
        lost = next(headers for status, headers, _ in answers if status == 503)
        assert lost["retry-after"] == "1"
        assert json.loads(ask(port, "GET", "/readyz")[2])["workers"]["golden"] == {
            "ready": 1,
            "of": 1,
        }
        assert b'pid_worker_restarts{model="golden"} 1.0' in ask(port, "GET", "/metrics")[2]


def test_heads_and_bodies_that_come_too_slowly(
    port: int, golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.3)
    slow = {"golden": pool(golden_bundle)}
    with serving(slow, Limits(upload_seconds=0.3)) as port:
        for begun in (b"", b"GET /healthz HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(begun)
                while client.recv(2**16):
                    pass  # until the server closes
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1")
            answer = b""
            while part := client.recv(2**16):
                answer += part
            assert answer.startswith(b"HTTP/1.1 408") and b"within 0.3 s" in answer
        assert ask(port, "POST", "/v1/decode", save({"latent": LATENT}))[0] == 200


def test_tokens(golden_bundle: Path) -> None:
    with serving({"golden": pool(golden_bundle)}, Limits(), "secret") as port:
        assert ask(port, "GET", "/healthz")[0] == 200
        assert ask(port, "GET", "/v1/models")[0] == 401
        assert ask(port, "GET", "/v1/models", Authorization="Bearer secreu")[0] == 401
        assert ask(port, "GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert ask(port, "POST", "/v1/decode", save({"latent": LATENT}))[0] == 401


def test_the_command_answers_what_was_asked_before_it_ends(golden_bundle: Path) -> None:
    with running(golden_bundle, "--threads", 1) as (port, pid):
        answers: list[Answer] = []
        latent = save({"latent": np.zeros((16, 12, 12), np.float32)})
        asking = threading.Thread(
            target=lambda: answers.append(ask(port, "POST", "/v1/decode", latent))
        )
        asking.start()
        wait_until(lambda: metric(port, "pid_queue") == 0 and asking.is_alive())
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        asking.join()
        assert [answer[0] for answer in answers] == [200]


def tensor(array: NDArray[Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": data}


def ask_json(port: int, path: str, **sent: Any) -> Answer:
    return ask(port, "POST", path, json.dumps(sent).encode(), Content_Type="application/json")


def test_json_is_decoded_as_safetensors_are(port: int) -> None:
    caption = np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, -1)
    with_caption = save({"latent": LATENT, "caption": caption})
    width = json.loads(ask(port, "POST", "/v1/decode", with_caption)[2])
    assert "caption" in str(width)
    asked = {"sigma": 0.2, "seed": 7, "steps": 2, "output": "png"}
    query = "&".join(f"{name}={value}" for name, value in asked.items())
    wanted = ask(port, "POST", f"/v1/decode?{query}", save({"latent": LATENT}))
    for array in (LATENT, LATENT[None]):
        assert ask_json(port, "/v1/decode", latent=tensor(array), **asked)[2] == wanted[2]
    half = ask_json(port, "/v1/decode", latent=tensor(LATENT.astype(np.float16)), **asked)
    assert half[0] == 200 and half[2] != wanted[2]


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({}, "latent"),
        ({"latent": [1, 2]}, "latent"),
        ({"latent": tensor(LATENT), "seed": "7"}, "seed"),
        ({"latent": tensor(LATENT), "sigma": 2}, "sigma"),
        ({"latent": tensor(LATENT), "colour": "red"}, "colour"),
        ({"latent": {**tensor(LATENT), "dtype": "int8"}}, "dtype"),
        ({"latent": {**tensor(LATENT), "data": "#"}}, "latent"),
        ({"latent": {**tensor(LATENT), "data": "AAAA"}}, "latent"),
        ({"latent": {**tensor(LATENT), "shape": [2**24] * 4}}, "latent"),
        ({"latent": tensor(LATENT), "caption": tensor(LATENT)}, "latent"),
        ({"latent": tensor(LATENT), "prompt": "a boat"}, "prompt"),
        ({"latent": tensor(LATENT), "guidance": "5"}, "guidance"),
        ({"latent": tensor(LATENT), "negative": {**tensor(LATENT), "data": "#"}}, "latent"),
        ({"latent": tensor(LATENT), "negative": tensor(LATENT[0])}, "negative"),
        ({"latent": tensor(LATENT), "negative_prompt": 5}, "negative_prompt"),
    ],
)
def test_wrong_json_is_told_by_field(port: int, sent: dict[str, Any], field: str) -> None:
    status, _, body = ask_json(port, "/v1/decode", **sent)
    assert status == 422 and field in json.loads(body)["detail"][0]["loc"]


def test_tiles(port: int, golden_bundle: Path) -> None:
    latent = np.random.default_rng(5).standard_normal((16, 4, 6), np.float32)
    with Decoder.open(golden_bundle) as pid:
        wanted = pid.decode(latent[None], tile=(128, 96), overlap=32, output="uint8")[0]
        assert (wanted != pid.decode(latent[None], output="uint8")[0]).any()
    asked = "/v1/decode?output=safetensors&tile=128x96&overlap=32"
    found = ask(port, "POST", asked, save({"latent": latent}))[2]
    np.testing.assert_array_equal(load(found)["image"], wanted)
    for query, field in (("tile=9", "tile"), ("overlap=8", "body"), ("tile=8x8", "body")):
        status, _, body = ask(port, "POST", f"/v1/decode?{query}", save({"latent": latent}))
        assert status == 422 and field in json.loads(body)["detail"][0]["loc"]
    many = save({"latent": np.zeros((16, 16, 16), np.float32)})
    status, _, body = ask(port, "POST", "/v1/decode?tile=auto", many)
    assert status == 413 and b"at most 65536 pixels, but got 512x512" in body


def test_json_with_a_query_or_that_is_none(port: int) -> None:
    for path, body in (("/v1/decode?seed=1", b"{}"), ("/v1/decode", b"{"), ("/v1/captions", b"{")):
        assert ask(port, "POST", path, body, Content_Type="application/json")[0] == 422


def events(answer: bytes) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for block in answer.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_events_tell_the_steps(port: int) -> None:
    body, query = save({"latent": LATENT}), "/v1/decode?seed=7"
    image = ask(port, "POST", query, body)[2]
    wanted = {"media_type": "image/png", "data": base64.b64encode(image).decode()}
    for more, has_preview in (("", False), ("&preview=true", True)):
        status, headers, answer = ask(port, "POST", query + more, body, Accept="text/event-stream")
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        *steps, last = events(answer)
        assert [(name, data["step"], data["steps"]) for name, data in steps] == [
            ("step", step, 4) for step in range(1, 5)
        ]
        assert [data["preview"] is not None for _, data in steps] == [has_preview] * 4
        assert last == ("image", wanted)
    # After the last step the state is the image.
    kind, _, data = steps[-1][1]["preview"].partition(",")
    assert kind == "data:image/jpeg;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")  # JPEG halves colours
    whole = Image.open(io.BytesIO(image)).convert("L").resize(seen.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(seen, float) - np.asarray(whole, float)).mean() < 12
    refused = ask(port, "POST", "/v1/decode", b"none", Accept="text/event-stream")[2]
    assert [(name, data["status"]) for name, data in events(refused)] == [("error", 422)]


def test_a_batch_gives_the_pixels_of_each(golden_bundle: Path) -> None:
    model = pool(golden_bundle, batch=4)
    with serving({"golden": model}) as port:
        alone = [
            ask(port, "POST", f"/v1/decode?seed={seed}", save({"latent": LATENT}))[2]
            for seed in range(5)
        ]
        found: dict[int, bytes] = {}

        def decode(seed: int) -> None:
            body = save({"latent": LATENT})
            found[seed] = ask(port, "POST", f"/v1/decode?seed={seed}", body)[2]

        threads = [threading.Thread(target=decode, args=[seed]) for seed in range(5)]
        with stopped(model.pids):
            threads[0].start()  # is begun alone
            begun = b'pid_seconds_count{stage="wait"} 6.0'
            wait_until(lambda: begun in ask(port, "GET", "/metrics")[2])
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: model.waiting == 4)
        for thread in threads:
            thread.join()
    assert len(set(alone)) == 5 and [found[seed] for seed in range(5)] == alone


def test_prompts_are_encoded_by_a_captioner(golden_bundle: Path, nano: Path) -> None:
    with Decoder.open(golden_bundle) as pid:
        width, length = pid.manifest.network["text_dim"], pid.manifest.network["text_max_length"]
        encoder = OpenWords(width)
        caption = encoder().run([CaptionTask(("a boat",), length)], print)[0]
        wanted = pid.decode(LATENT[None], caption, output="uint8")[0]
        assert (wanted != pid.decode(LATENT[None], output="uint8")[0]).any()
    models = {"golden": pool(golden_bundle), "nano": pool(nano)}
    captions = Pool[CaptionTask, Any]([encoder])
    with serving(models, captions=captions) as port:
        asked = {"latent": tensor(LATENT), "prompt": "a boat", "output": "safetensors"}
        for answer in (
            ask_json(port, "/v1/decode", **asked),
            ask(
                port,
                "POST",
                "/v1/decode?prompt=a%20boat&output=safetensors",
                save({"latent": LATENT}),
            ),
        ):
            np.testing.assert_array_equal(load(answer[2])["image"], wanted)
        status, _, body = ask_json(port, "/v1/captions", prompts=["a boat", "a house"])
        assert status == 200 and load(body)["caption"].shape == (2, length, width)
        np.testing.assert_array_equal(load(body)["caption"][:1], caption)
        both = {**asked, "caption": tensor(caption[0])}
        assert ask_json(port, "/v1/decode", **both)[0] == 422
        refused = ask_json(port, "/v1/captions", prompts=["a boat"], model="nano")
        assert refused[0] == 422 and b"without captions" in refused[2]


def test_guidance_of_undistilled_bundles(undistilled_nano: Path, distilled: Path) -> None:
    sent, options = picture(16, 16), {"guidance": 3, "steps": 2}
    latent = np.linspace(-1, 1, 192 * 2 * 3, dtype=np.float32).reshape(192, 2, 3)
    with Decoder.open(undistilled_nano) as pid:
        width, length = pid.manifest.network["text_dim"], pid.manifest.network["text_max_length"]
        encoder = OpenWords(width)
        texts = ("a boat", "fog", "")
        boat, fog, nothing = encoder().run([CaptionTask(texts, length)], print)[0][:, None]

        def wanted(given: NDArray[np.float32], **more: Any) -> NDArray[np.uint8]:
            return pid.decode(given, boat, **options, **more, output="uint8")[0]

        guided = wanted(latent[None], negative=fog)
        assert (guided != wanted(latent[None], negative=boat)).any()
        empty = wanted(latent[None], negative=nothing)
        assert (guided != empty).any()
        photo = pid.encode(Image.open(io.BytesIO(sent)))
        larger = {"fog": wanted(photo, negative=fog), "": wanted(photo, negative=nothing)}
    models = {"free": pool(undistilled_nano), "student": pool(distilled)}
    captions = Pool[CaptionTask, Any]([encoder])
    query = "/v1/decode?guidance=3&steps=2&output=safetensors"
    with serving(models, captions=captions) as port:
        assert json.loads(ask(port, "GET", "/v1/models")[2])["models"][0]["guidance"] == 5
        both = {"latent": latent, "caption": boat, "negative": fog[0]}
        asked = {"latent": tensor(latent), "output": "safetensors", **options}
        for status, _, body in (
            ask(port, "POST", query, save(both)),
            ask(
                port,
                "POST",
                f"{query}&prompt=a%20boat&negative_prompt=fog",
                save({"latent": latent}),
            ),
            ask_json(port, "/v1/decode", **asked, caption=tensor(boat[0]), negative=tensor(fog[0])),
            ask_json(port, "/v1/decode", **asked, prompt="a boat", negative_prompt="fog"),
        ):
            assert status == 200, body
            np.testing.assert_array_equal(load(body)["image"], guided)
        path = f"{query}&prompt=a%20boat&negative_prompt="
        image = load(ask(port, "POST", path, save({"latent": latent}))[2])["image"]
        np.testing.assert_array_equal(image, empty)
        for negative, image in larger.items():
            form = {"guidance": "3", "steps": "2", "prompt": "a boat", "negative_prompt": negative}
            status, _, body = ask_form(port, sent, **form)
            assert status == 200, body
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), image)
        alone = save({"latent": latent})
        assert ask(port, "POST", "/v1/decode?guidance=1&steps=2", alone)[0] == 200
        for path, given, field, message in (
            ("", alone, "guidance", "expected a negative caption for guidance 5, but got none"),
            ("?negative_prompt=fog", save(both), "negative_prompt", "but got both; drop one"),
            ("", save({**both, "negative": fog[:, 1:]}), "body", "a negative of as many tokens"),
            ("", save({**both, "negative": fog * 1e7}), "body", "expected negative values of at m"),
            (
                "?model=student&guidance=5",
                alone,
                "guidance",
                "learned at its distillation, but got",
            ),
            ("?model=student", save(both), "negative", "distillation, but got a negative caption"),
        ):
            status, _, body = ask(port, "POST", f"/v1/decode{path}", given)
            (detail,) = json.loads(body)["detail"]
            assert status == 422 and detail["loc"] == [field] and message in detail["msg"]
        status, _, body = ask_form(port, sent)
        assert status == 422 and json.loads(body)["detail"][0]["loc"] == ["guidance"]


def test_the_page_of_the_api_loads_nothing_from_elsewhere(port: int) -> None:
    page = ask(port, "GET", "/docs")[2].decode()
    found = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(found) >= 3 and all(link.startswith("/") for link in found)
    assert all(ask(port, "GET", link)[0] == 200 for link in found)


def test_what_the_command_refuses(golden_bundle: Path, run_command: RunCommand) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for given, message in (
        ([golden_bundle, golden_bundle], "expected bundles of different names"),
        ([golden_bundle, "--timeout", "0"], "change --timeout"),
        ([golden_bundle, "--upload-timeout", "nan"], "change --upload-timeout"),
        ([golden_bundle, "--port", port], f"expected to listen at 127.0.0.1 port {port}, but got"),
        ([golden_bundle, "--host", "no.such.host.invalid"], "change --host"),
        ([golden_bundle, "--port", "0", "--device", "absent"], "absent"),
        (["absent", "--port", "0"], "absent"),
    ):
        code, out, err = run_command(cli.main, *given)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    taken.close()
