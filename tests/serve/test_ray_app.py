"""`pid-serve --ray`: a real Ray cluster of two nodes on this machine."""

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from pid_runtime.decoder import Decoder
from pid_serve import cli
from ray_nodes import two_nodes
from serving import ask, ask_form, picture, wait_until

LATENT = np.linspace(-1, 1, 192 * 2 * 3, dtype=np.float32).reshape(192, 2, 3)
Refusal = Callable[..., str]


def test_what_ray_does_without(
    nano: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'pid-trt[ray]'" in refusal(cli.main, nano, "--ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for more in (["--workers", 2], ["--device", "cuda:0,cuda:1"]):
        assert "with --ray, but got them" in refusal(cli.main, nano, "--ray", *more)


@pytest.mark.slow
def test_no_request_is_lost_with_a_replica(nano: Path, ray_python: Path) -> None:
    arguments = ["--threads", "1", "--replicas", "2", "--port", "0", "--queue", "64", "--json"]
    with two_nodes(ray_python) as (address, kill):
        command = [ray_python, "-m", "pid_serve.cli", nano, "--ray", address, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                port = int(json.loads(process.stdout.readline())["address"].split(":")[-1])
                check_server(nano, port, lambda: kill("ray::ServeReplica"))
            finally:
                process.terminate()
                assert process.wait(120) == 0


def check_server(nano: Path, port: int, kill: Callable[[], int]) -> None:
    with Decoder.open(nano) as pid:
        wanted = [pid.decode(LATENT[None], seed=s, output="uint8")[0] for s in range(25)]
    found: list[tuple[int, int, bytes]] = []
    begun = threading.Event()

    def ask_on() -> None:
        for seed in range(25):
            path = f"/v1/decode?output=safetensors&seed={seed}"
            status, _, image = ask(port, "POST", path, save({"latent": LATENT}))
            found.append((status, seed, image))
            if len(found) > 40:
                begun.set()

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(120)
    assert kill()
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in found] == [200] * 200
    for _, seed, image in found:
        np.testing.assert_array_equal(load(image)["image"], wanted[seed])
    wait_until(lambda: b'"ready":2' in ask(port, "GET", "/readyz")[2], 60)
    assert ask(port, "POST", "/v1/decode?steps=3", save({"latent": LATENT}))[0] == 422
    assert ask_form(port, picture(16, 16), seed="3")[0] == 200
    events = ask(port, "POST", "/v1/decode", save({"latent": LATENT}), Accept="text/event-stream")[
        2
    ]
    assert events.count(b"event: step") == 4 and events.count(b"event: image") == 1
