"""The load case: what it measures of a server, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pid_bench import load
from serving import running

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


def test_triton_gets_the_protocol_of_kserve() -> None:
    latent = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    server = load._Server("http://127.0.0.1:8001", latent, "nano")
    path, body, headers = server.request(7)
    length = int(headers["Inference-Header-Content-Length"])
    first, second = json.loads(body[:length])["inputs"]
    assert path == "/v2/models/nano/infer" and server.address == ("127.0.0.1", 8001)
    assert (first["name"], first["shape"], second["shape"]) == ("latent", [1, 3, 2, 2], [1, 1])
    sizes = [each["parameters"]["binary_data_size"] for each in (first, second)]
    assert sizes == [48, 8] and len(body) == length + 56
    assert body[length:] == latent.tobytes() + (7).to_bytes(8, "little")


def test_a_server_beside_a_bare_decoder(
    golden_bundle: Path, run_command: RunCommand, refusal: Refusal
) -> None:
    with running(golden_bundle, "--threads", 1) as (port, _):
        given = [golden_bundle, "--url", f"http://127.0.0.1:{port}", "--latent", "3x2"]
        few = ["--requests", 12, "--clients", "1,3", "--threads", 1]
        code, out, err = run_command(load.main, *given, *few, "--json")
        assert (code, err) == (0, "")
        rows = json.loads(out)["rows"]
        assert [(row["of"], row["clients"]) for row in rows] == [
            ("bare decoder", 1),
            ("server", 1),
            ("server", 3),
        ]
        for row in rows:
            assert 0 < row["p50"] <= row["p99"] and row["per_second"] > 0
        assert rows[1]["memory_bytes"] > 2**20
        assert "change --requests" in refusal(load.main, *given, "--requests", 2)
    with running(golden_bundle, "--threads", 1, "--max-result", 1) as (port, _):
        given[2] = f"http://127.0.0.1:{port}"
        assert "expected 200 of the server, but got 413" in refusal(load.main, *given, *few)
