"""`--ray`: what is done of it without a cluster, and `pid-decode` on one of two nodes."""

import json
import logging
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pid_runtime.command import spread
from pid_runtime.command.decode_cli import main
from pid_runtime.command.spread import Actor, Kept, Outcome, Room, Save, complete, plan_room
from pid_runtime.decoder import Decoder
from pid_runtime.errors import NotFiniteError, PidRuntimeError
from ray_nodes import run_on_cluster

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
PIXELS = np.zeros((4, 4, 3), np.uint8)


class Labour:
    """Work that fails as often as an item says, with what it says."""

    opened: list[str]
    """What happened, of all of them."""

    def __init__(self) -> None:
        self.opened.append("open")

    def make(self, item: dict[str, Any], save: Save) -> int:
        logging.getLogger("pid_runtime").info("a note")
        save(Path(f"{item['name']}.png"), PIXELS, None)
        if item["errors"]:
            raise item["errors"].pop(0)
        return len(item["name"])

    def close(self) -> None:
        self.opened.append("close")


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Actor:
    monkeypatch.chdir(tmp_path)
    Labour.opened = []
    return Actor(Labour, str(tmp_path))


def test_an_item_that_fails_is_tried_once_more(actor: Actor) -> None:
    bad, bug = PidRuntimeError("expected luck"), KeyError("x")
    fine = actor.outcome(3, {"name": "one", "errors": []})
    assert (fine.index, fine.made, fine.reason) == (3, 3, None)
    assert fine.notes == ((logging.INFO, "a note"),)
    assert list(fine.files) == [Path("one.png")] and fine.files[Path("one.png")][:4] == b"\x89PNG"
    assert actor.outcome(0, {"name": "a", "errors": [bad]}).made == 1
    assert Labour.opened == ["open"]
    # What is no bad input may have spoilt what is open.
    assert actor.outcome(0, {"name": "a", "errors": [bug]}).made == 1
    assert Labour.opened == ["open", "close", "open"]
    assert actor.outcome(0, {"name": "a", "errors": [MemoryError()]}).made == 1
    assert Labour.opened == ["open", "close"] * 2 + ["open"]
    failed = actor.outcome(1, {"name": "a", "errors": [bad, bad, bad]})
    assert (failed.made, failed.reason, dict(failed.files)) == (None, "expected luck", {})
    assert actor.outcome(1, {"name": "a", "errors": [bug, bug]}).reason == "KeyError: 'x'"
    assert logging.getLogger().handlers  # those of before


def test_a_machine_without_the_folder(tmp_path: Path) -> None:
    reason = Actor(Labour, str(tmp_path / "none")).outcome(0, {}).reason
    assert reason is not None and "on every machine of the cluster, but got: No such file" in reason


def test_nothing_is_lost_and_nothing_comes_twice() -> None:
    came = [Outcome(2, "c"), Outcome(0, "a"), Outcome(2, "again")]
    found = list(complete(came, 4))
    assert [(each.index, each.made) for each in found] == [(2, "c"), (0, "a"), (1, None), (3, None)]
    assert "every actor that took it died" in str(found[2].reason)


def test_kept_parts_are_opened_once_and_others_each_time() -> None:
    events: list[str] = []

    class Part:
        def __enter__(self) -> str:
            events.append("open")
            return "part"

        def __exit__(self, *_: object) -> None:
            events.append("close")

    for keeps, wanted in ((True, ["open", "close"]), (False, ["open", "close"] * 2)):
        events.clear()
        kept = Kept(keeps=keeps)
        for _ in range(2):
            with kept.part("one", Part) as part:
                assert part == "part"
        kept.close()
        assert events == wanted


def test_room() -> None:
    two = [(8, 0), (4, 0)]
    assert plan_room(two, None, None, on_gpu=False) == Room(2, 3, 0)
    assert plan_room(two, 4, None, on_gpu=False) == Room(4, 1, 0)
    assert plan_room(two, 6, 2, on_gpu=False) == Room(6, 2, 0)
    assert plan_room([(1, 0)], None, None, on_gpu=False) == Room(1, 1, 0)
    assert plan_room([(8, 4), (8, 2)], None, None, on_gpu=True) == Room(6, 1, 1)
    assert plan_room([(8, 4)], 2, None, on_gpu=True) == Room(2, 1, 1)
    for nodes, actors, threads, on_gpu, message in (
        (two, 7, 2, False, "expected room for 7 actors of 2 processors in the Ray cluster, but it"),
        (two, None, 16, False, "has room for 0; give other --actors and --threads"),
        (two, None, None, True, "expected 1 GPUs in the Ray cluster, but it has 0; give fewer "),
        ([(8, 4)], 5, None, True, "expected 5 GPUs in the Ray cluster, but it has 4"),
    ):
        with pytest.raises(PidRuntimeError, match=message):
            plan_room(nodes, actors, threads, on_gpu=on_gpu)


def save_latents(folder: Path, files: int) -> Path:
    folder.mkdir()
    for index in range(files):
        random = np.random.default_rng(index)
        latent = 0.5 * random.standard_normal((2, 16, 2, 3), np.float32)
        save_file({"latent": latent}, folder / f"{index}.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_this_process(
    arguments: Namespace,
    work: Callable[[Namespace], Any],
    items: Sequence[Any],
    ready: Callable[[], object],
) -> Generator[Outcome, None, None]:
    """In place of a cluster: an actor here, which takes the last item first."""
    ready()
    actor = Actor(lambda: work(arguments), str(Path.cwd()))
    for index in reversed(range(len(items))):
        yield actor.outcome(index, items[index])
    actor.close()


def test_a_latent_that_fails_is_reported_and_made_when_it_can_be(
    golden_bundle: Path, run_command: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "_by_ray", in_this_process)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    given = (
        golden_bundle,
        "--latents",
        save_latents(tmp_path / "latents", 2),
        "--threads",
        1,
        "--json",
    )
    alone, out, real = tmp_path / "alone", tmp_path / "out", Decoder.run
    sheets = [("--sheet", tmp_path / name) for name in ("alone.png", "ray.png")]
    code, text, _ = run_command(main, *given, "-o", alone, *sheets[0])
    without = json.loads(text)
    assert code == 0 and without["failed"] == []

    def fail(decoder: Decoder, request: Any, *args: Any, **options: Any) -> Any:
        if request.seeds[0] == 1:
            raise NotFiniteError("expected numbers, but got NaN")
        return real(decoder, request, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "run", fail)
        code, text, err = run_command(main, *given, "-o", out, "--ray")
    result = json.loads(text)
    reason = f"{tmp_path}/latents/0.safetensors: expected numbers, but got NaN"
    assert code == 1 and f"error: {out}/0-1.png: {reason}\n" in err
    assert [(each["index"], each["reason"]) for each in result["failed"]][1:] == [(1, reason)]
    assert [Path(each["image"]).name for each in result["images"]] == ["0-0.png", "1-0.png"]
    code, text, _ = run_command(main, *given, "-o", out, "--ray", "--skip-existing")
    result = json.loads(text)
    assert code == 0 and result["skipped"] == 2
    assert [Path(each["image"]).name for each in result["images"]] == ["0-1.png", "1-1.png"]
    assert contents(out) == contents(alone)
    assert run_command(main, *given, "-o", out, "--ray", "--overwrite", *sheets[1])[0] == 0
    assert (tmp_path / "ray.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_bad_input(
    golden_bundle: Path, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        golden_bundle,
        "--latents",
        save_latents(tmp_path / "latents", 1),
        "-o",
        tmp_path / "out",
    )
    assert "expected --ray with --actors" in refusal(main, *given, "--actors", 2)
    assert "from 1 to 4096, but got '0'" in refusal(main, *given, "--ray", "--actors", 0)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install 'pid-trt[ray]'" in refusal(main, *given, "--ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    errors = SimpleNamespace(RayError=type("RayError", (Exception,), {}))
    fake = SimpleNamespace(shutdown=lambda: None, exceptions=errors)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = refusal(main, *given, "--ray", f"127.0.0.1:{port}")
    assert f"expected a Ray cluster at 127.0.0.1:{port}, but got: " in line
    assert "Connection refused; ray status says more" in line and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_latent_is_lost_with_an_actor(
    golden_bundle: Path, ray_python: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    given = (
        golden_bundle,
        "--latents",
        save_latents(tmp_path / "latents", 20),
        "--threads",
        1,
        "--json",
    )
    code, text, err = run_command(main, *given, "-o", alone)
    assert code == 0, err
    wanted = json.loads(text)
    code, text, err = run_on_cluster(
        ray_python, "pid_decode", *given, "-o", out, images=out, kill_after=3
    )
    assert code == 0 and err.startswith("warning: 40 of 40 images have no caption"), err
    assert err.count("\n") == 1
    result = json.loads(text)
    for images in (result["images"], wanted["images"]):
        for image in images:
            image["seconds"], image["image"] = 0, Path(image["image"]).name
    assert result == wanted and len(result["images"]) == 40
    assert contents(out) == contents(alone)
