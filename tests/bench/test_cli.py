"""`pid-bench` from end to end on a small network, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.engines import add_engines
from pid_bench import cases, runner
from pid_bench.cases import Case
from pid_bench.cli import main
from pid_bench.contenders import Materials
from pid_bench.counting import counted_row, engine_memory
from pid_bench.images import sampled
from pid_bench.measure import Clock
from pid_bench.report import Row, read_report
from pid_bench.runner import Job, start_worker, status_of
from pid_bench.selection import buckets_for, network_in, parse_sizes
from pid_bench.worker import failure
from pid_engines.child import ChildError
from pid_ref.config import PidConfig
from pid_runtime.bundle.folder import read_manifest
from places import ROOT
from small_network import DIMENSIONS

QUICK = ("--device", "cpu", "--threads", "1", "--cascades", "none", "--repeats", "2")

SMALL = {**DIMENSIONS, "pixel_depth": 2}
"""A network that is exported in seconds; most of its stages are those of the golden files."""

CEILINGS = {"matmul_tflop_per_s": 0.1, "copy_gb_per_s": 10.0}


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Measuring what this machine reaches takes seconds: one test does it."""
    if "ceilings" not in request.node.name:
        monkeypatch.setattr(runner, "measure_ceilings", lambda *_: CEILINGS)


def case_of(bundle: Path, backend: str, **changes: Any) -> Case:
    network = network_in(read_manifest(bundle, verify=False))
    case = Case(
        pipeline="pid",
        backend=backend,
        space=network.space,
        variant=network.variant,
        width=64,
        height=64,
        precision="fp32",
        device="cpu",
        threads=1,
        steps=4,
        depth=network.config.patch_depth,
        weights="random",
    )
    return replace(case, **changes)


def test_end_to_end(golden_bundle: Path, tmp_path: Path, run_command: Any) -> None:
    folder = tmp_path / "report"
    arguments = (*QUICK, "--bundle", golden_bundle, "--size", "64x64", "-o", folder)
    backends = ("--backends", "eager,onnxruntime")
    code, out, err = run_command(main, *arguments, *backends, "--json")
    assert code == 0, err
    report = read_report(folder)
    rows = report.measured()
    assert [row["key"] for row in json.loads(out)["rows"]] == [row.case.key for row in rows]
    assert [(row.case.pipeline, row.case.backend, row.status) for row in rows] == [
        ("pid", "eager", "ok"),
        ("pid", "onnxruntime", "ok"),
    ]
    for row, shown in zip(rows, json.loads(out)["rows"], strict=True):
        measured, rates = row.measured, report.rates(row)
        assert len(measured.rounds_ms) == 2 and measured.timer == "wall" and measured.user_ms
        assert measured.median_ms and row.counted.tflop
        assert rates.share_of_matmul and rates.ratio_to_pid
        assert (measured.peak_rss_bytes or 0) > 10**8
        assert all(stage.median_ms is not None for stage in row.stages)
        assert sum(stage.median_ms or 0 for stage in row.stages) < 1.05 * measured.median_ms
        assert shown["derived"]["median_ms"] == measured.median_ms
        assert shown["derived"]["ratio_to_pid"] == rates.ratio_to_pid
    assert rows[1].agrees and (rows[1].measured.rms_error or 0) < 1e-4
    assert {row.kind for row in report.rows} == {"measured", "counted", "reported"}
    page = (folder / "report.md").read_text("utf-8")
    assert "Published by the paper" in page and "pid, onnxruntime" in page
    left = {path.name for path in folder.iterdir()}
    assert left == {"report.json", "report.md", "report.html", "images", ".lock"}

    # Adding to it runs only what is not there.
    started: list[str] = []
    code, out, err = run_command(main, *arguments, "--backends", "eager,torch,onnxruntime")
    started = [line for line in err.splitlines() if line.startswith("pid, ")]
    assert code == 0 and "2 of 3 cases are in the report already" in err
    assert len(started) == 1 and started[0].startswith("pid, torch, 64x64 px: ")
    again = read_report(folder).measured()
    assert [row.case.backend for row in again] == ["eager", "onnxruntime", "torch"]
    assert again[0].measured.rounds_ms == rows[0].measured.rounds_ms and again[2].agrees


@pytest.mark.slow
def test_continues_after_it_was_killed(
    golden_bundle: Path, tmp_path: Path, run_command: Any
) -> None:
    folder = tmp_path / "report"
    arguments = (*QUICK, "--bundle", str(golden_bundle), "-o", str(folder), "--size", "64x64,96x64")
    arguments += ("--backends", "onnxruntime")
    code = (
        "import sys; from pid_bench import runner; from pid_bench.cli import main;"
        f"runner.measure_ceilings = lambda *_: {CEILINGS}; sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)
    end = time.monotonic() + 300
    while not measured(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = measured(folder)
    assert len(first) == 1
    code, _, err = run_command(main, *arguments)
    assert code == 0 and "1 of 2 cases are in the report already" in err
    both = measured(folder)
    assert both[0] == first[0]
    assert [row.case.size for row in both] == [(64, 64), (96, 64)]
    assert not list(folder.glob(".work-*"))


def measured(folder: Path) -> list[Row]:
    """Rows with times of a report that may not be there yet; it can be read at any moment."""
    if not (folder / "report.json").exists():
        return []
    return read_report(folder).measured()


@pytest.mark.slow
def test_a_bundle_is_exported_for_the_run(tmp_path: Path, run_command: Any) -> None:
    config = tmp_path / "small.json"
    config.write_text(json.dumps(SMALL))
    folder = tmp_path / "report"
    arguments = ("--config", config, "--depth", "1", "--size", "64x64", "-o", folder)
    code, out, err = run_command(main, *QUICK, *arguments, "--backends", "eager,torch")
    assert code == 0, err
    eager, ours = measured(folder)
    assert ours.measured.build_seconds and ours.agrees and ours.reduced == "1 of 2 patch blocks"
    assert eager.measured.build_seconds is None
    page = (folder / "report.md").read_text("utf-8")
    for shown in (out, page.partition("## Counted")[0]):
        lines = [line for line in shown.splitlines() if re.match(r"(\| )?pid[ ,]", line)]
        assert lines and all("1 of 2 patch blocks" in line for line in lines)
        assert "Only 1 of 2 patch blocks" in shown
    assert eager.case.key.endswith("depth1/steps4/threads1/random")


@pytest.mark.slow
def test_ceilings_are_measured() -> None:
    found = runner.measure_ceilings("fp32", "cpu", 1)
    assert found["matmul_tflop_per_s"] > 1e-3 and found["copy_gb_per_s"] > 0.1


def test_a_failing_case_is_a_row(golden_bundle: Path, tmp_path: Path) -> None:
    case = case_of(golden_bundle, "onnxruntime")
    network = network_in(read_manifest(golden_bundle, verify=False))
    job = Job(counted_row(case, network), Materials({}, bundle=str(tmp_path / "none")))
    rows: list[Row] = []
    runner.run_jobs([job], 1, "e0", tmp_path, rows.append)
    (row,) = rows
    assert (row.status, row.kind, row.environment) == ("error", "measured", "e0")
    assert "expected a bundle" in row.message and "\n" not in row.message


def test_a_killed_case_was_short_of_memory() -> None:
    with start_worker(1) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ChildError, match="out of memory") as error:
            worker.ask({"round": True})
    assert status_of(error.value) == "oom"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (ValueError("a\nb"), "error"),
    ],
)
def test_what_went_wrong(error: Exception, status: str) -> None:
    found = failure(error)
    assert found["status"] == status and found["error"] and "\n" not in found["error"]


def test_dry_run_counts_the_released_network(run_command: Any) -> None:
    """45.12 TFLOP a step at 2048 x 2048 and 486.5 at 4096 x 4096, counted elsewhere."""
    code, out, _ = run_command(main, "--dry-run", "--cascades", "none", "--json")
    rows = {(r["case"]["backend"], r["case"]["width"]): r for r in json.loads(out)["rows"]}
    assert code == 0 and len(rows) == 4
    for side, tflop in ((2048, 45.12), (4096, 486.5)):
        step = next(s for s in rows["eager", side]["stages"] if s["name"] == "step")
        assert step["tflop"] / step["steps"] == pytest.approx(tflop, rel=0.005)
        assert rows["torch", side]["counted"]["tflop"] < rows["eager", side]["counted"]["tflop"]
    assert rows["eager", 2048]["counted"]["parameters"] == pytest.approx(1362e6, rel=1e-3)


def test_a_step_in_tiles_is_less_than_half_the_work(run_command: Any) -> None:
    arguments = ("--dry-run", "--cascades", "none", "--size", "4096x4096", "--tile", "2176x2176")
    code, out, err = run_command(main, *arguments, "--json")
    assert code == 0, err
    rows = {(r["case"]["backend"], len(r["case"]["tile"])): r for r in json.loads(out)["rows"]}
    assert set(rows) == {("eager", 0), ("torch", 0), ("torch", 2)}
    whole, tiled = (
        next(s for s in rows["torch", sides]["stages"] if s["name"] == "step") for sides in (0, 2)
    )
    assert (tiled["steps"], tiled["tiles"], whole["tiles"]) == (4, 4, 1)
    assert tiled["tflop"] <= 0.46 * whole["tflop"]
    assert rows["torch", 2]["case"]["overlap"] == 256


@pytest.mark.slow
def test_tiles_are_measured_beside_the_whole(
    golden_bundle: Path, tmp_path: Path, run_command: Any
) -> None:
    tiles = ("--size", "160x96", "--tile", "96x96", "--overlap", "32", "--backends", "torch")
    given = (*QUICK, "--bundle", golden_bundle, *tiles, "-o", tmp_path / "report")
    code, out, err = run_command(main, *given)
    assert code == 0, err
    whole, tiled = measured(tmp_path / "report")
    assert (whole.case.tile, tiled.case.tile, tiled.status) == ((), (96, 96), "ok")
    assert tiled.case.key == f"{whole.case.key}/tile96x96-32"
    assert tiled.measured.rms_error is None  # it is another picture
    assert "to 160x96 in 96x96" in out and "pid, torch, tiles 96x96" in err


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (["--tile", "100x96"], "--tile and --overlap in multiples of 32 pixels, but got 100x96"),
        (["--tile", "big"], "expected a size such as 512x512, but got 'big'"),
        (["--overlap", "32"], "expected --tile with --overlap"),
        (["--tile", "4096x64"], "a --tile no larger than the size, 2048x2048, but got 4096x64"),
        (["--tile", "512x512", "--overlap", "256"], "below half of the tile, 512x512, but got 256"),
    ],
)
def test_tiles_that_cannot_be_are_refused(refusal: Any, tile: list[str], message: str) -> None:
    assert message in refusal(main, "--dry-run", "--size", "2048x2048", *tile)


def test_dry_run_shows_the_record_of_the_build(edit_bundle: Any, run_command: Any) -> None:
    bundle = edit_bundle()
    add_engines(bundle, "rtx-1", peak_device_bytes=123 * 10**7)
    arguments = ("--dry-run", "--cascades", "none", "--bundle", bundle, "--size", "64x64")
    code, out, err = run_command(main, *arguments)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("pid, tensorrt-rtx"))
    assert "1.23 GB (tiny)" in line
    manifest = read_manifest(bundle, verify=False)
    assert engine_memory(manifest, "tensorrt", 16) == ("", {})
    assert engine_memory(manifest, "tensorrt-rtx", 10**6) == ("", {})


def test_a_dry_run_is_written_where_it_was_asked(
    golden_bundle: Path, tmp_path: Path, run_command: Any
) -> None:
    folder = tmp_path / "plan"
    arguments = ("--dry-run", "--bundle", golden_bundle, "--size", "64x64", "-o", folder)
    code, out, err = run_command(main, *arguments)
    assert code == 0 and "no cascades: expected a network of a latent space" in err
    assert out.splitlines()[-1] == str(folder / "report.html")
    rows = read_report(folder).rows
    assert [(row.kind, row.case.backend) for row in rows] == [
        ("counted", "eager"),
        ("counted", "torch"),
    ]
    page = (folder / "report.md").read_text("utf-8")
    assert "Nothing was run" in page and "pid, torch" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--backends", "cuda"), "expected --backends of eager, compile, public, torch"),
        (("--cascades", "vae+magic"), "expected --cascades of vae+lanczos, vae+rrdbnet"),
        (("--size", "8192x4096"), "at most 65536 tokens"),
        (("--size", "1000x1000"), "992x992 is near"),
        (("--size", "2048"), "expected a size such as 512x512, but got '2048'"),
        (("--size", "0x64"), "but got 0x64; 32x64 is near"),
        (("--precision", "int4"), "--precision of fp32, fp16, bf16"),
        (
            ("--precision", "fp32", "--backends", "public", "--cascades", "none"),
            "no backend exists in this precision",
        ),
        (("--space", "flax"), "expected a latent space"),
        (("--variant", "8k"), "expected a variant"),
        (("--steps", "3"), "1, 2 or 4 steps"),
        (("--depth", "15"), "at most 14 patch blocks"),
        (("--depth", "0"), "--depth of at least 1"),
        (("--threads", "0"), "--threads of at least 1"),
        (("--device", "tpu"), "--device cpu or cuda"),
        (
            ("--space", "dinov2", "--variant", "2k", "--cascades", "all"),
            "whose autoencoder diffusers has",
        ),
        (("--config", "none.json"), "file of network dimensions"),
        (("--bundle", "none"), "expected a bundle"),
        (("--checkpoint", "a", "--depth", "1"), "--checkpoint or --depth"),
    ],
)
def test_refusals(refusal: Any, arguments: tuple[str, ...], says: str) -> None:
    assert says in refusal(main, "--dry-run", *arguments)


def test_refuses_to_run(tmp_path: Path, refusal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ("-o", tmp_path / "report")
    assert "expected -o FOLDER" in refusal(main)
    says = refusal(main, "--device", "cpu", "--backends", "tensorrt", *output)
    assert "backends that run on cpu" in says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds none" in refusal(main, "--device", "cuda", *output)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    says = refusal(main, "--device", "cpu", "--cascades", "all", *output)
    assert "pip install 'pid-trt[bench]'" in says
    assert not (tmp_path / "report").exists()


def test_scales_are_not_made_up(refusal: Any) -> None:
    says = refusal(main, "--dry-run", "--precision", "fp8", "--device", "cpu")
    assert "expected --bundle with --precision fp8" in says


def test_refuses_a_folder_with_another_report(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"format": "pid-bench-report", "format_version": 99}')
    says = refusal(main, *QUICK, "--backends", "eager", "-o", tmp_path)
    assert "format version 2, but got 99" in says
    assert "99" in path.read_text()


def test_refuses_what_a_bundle_is_not(golden_bundle: Path, tmp_path: Path, refusal: Any) -> None:
    given = (*QUICK, "--bundle", golden_bundle, "-o", tmp_path / "report")
    backends = ("--backends", "torch")
    assert "--precision fp32, which" in refusal(main, *given, *backends, "--precision", "fp16")
    assert "at most 0.262 megapixels" in refusal(main, *given, *backends, "--size", "1024x1024")
    says = refusal(main, *given, *backends, "--cascades", "all")
    assert "but got a custom network; use --cascades none" in says
    assert "--bundle alone" in refusal(main, *given, "--depth", "1")
    dry = ("--dry-run", "--bundle", golden_bundle, "--size", "64x64", "--cascades", "none")
    says = refusal(main, *dry, "--backends", "tensorrt-rtx")
    assert "pid-build" in says and "--flavor tensorrt-rtx" in says
    assert not (tmp_path / "report").exists()


def test_cases_take_turns_while_memory_lasts(golden_bundle: Path) -> None:
    network = network_in(read_manifest(golden_bundle, verify=False))

    def job(size: int, backend: str, **changes: Any) -> Job:
        case = case_of(golden_bundle, backend, width=size, height=size, **changes)
        row = counted_row(case, network)
        row = replace(row, counted=replace(row.counted, weight_bytes=4 * 10**9))
        return Job(row, Materials({}))

    jobs = [job(64, "eager"), job(64, "torch"), job(64, "onnxruntime"), job(128, "eager")]
    assert [len(group) for group in runner.groups(jobs, 100 * 10**9)] == [3, 1]
    assert [len(group) for group in runner.groups(jobs, 14 * 10**9)] == [2, 1, 1]
    assert [len(group) for group in runner.groups(jobs, 0)] == [1, 1, 1, 1]
    jobs = [
        replace(each, row=replace(each.row, case=replace(each.row.case, device="cuda")))
        for each in jobs
    ]
    assert [len(group) for group in runner.groups(jobs, 100 * 10**9)] == [1, 1, 1, 1]


def test_keys_tell_cases_apart(golden_bundle: Path) -> None:
    case = case_of(golden_bundle, "eager")
    changes = (
        {"backend": "torch"},
        {"height": 96},
        {"precision": "bf16"},
        {"device": "cuda", "threads": 0},
        {"threads": 2},
        {"steps": 1},
        {"depth": 1},
        {"weights": "real"},
    )
    keys = {case.key, *(replace(case, **each).key for each in changes)}
    assert len(keys) == 1 + len(changes)


def test_buckets_of_sizes() -> None:
    config = PidConfig()
    sizes = parse_sizes("256x256,512x512,2048x2048,2688x1536,4096x4096", config)
    assert buckets_for(config, sizes) == (("small", 1024), ("2k", 18_816), ("4k", 65_536))


def test_spans_add_up_and_are_read_once() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.span("a"):
            time.sleep(0.01)
    spans = clock.read()
    assert 20 <= spans["a"] < 2000
    assert clock.read() == {}


def test_pixels_are_sampled_over_the_whole_image() -> None:
    image = np.arange(3 * 200 * 40, dtype=np.float32).reshape(1, 3, 200, 40)
    pixels = sampled(image)
    assert pixels.shape == (3, 64, 40)
    assert pixels[0, 0, 0] == image[0, 0, 0, 0] and pixels[2, -1, -1] == image[0, 2, -1, -1]


def test_every_backend_is_documented() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    assert set(cases.BACKENDS) <= set(re.findall(r"`([a-z-]+)`", page))
