"""The load case: what it measures of a server, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

from pid_bench import load
from serving import running

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


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
