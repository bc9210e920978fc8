"""Reports: written, read, added to, compared and shown."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pid_bench.cases import Case
from pid_bench.cli import main
from pid_bench.compare import compare
from pid_bench.errors import BenchInputError
from pid_bench.images import check_images, sample_file
from pid_bench.render import to_html_page, to_markdown_page, write_all
from pid_bench.report import (
    Counted,
    Environment,
    Measured,
    Rates,
    Report,
    Row,
    StageRow,
    read_report,
    write_report,
)
from pid_bench.reported import reported_rows
from places import ROOT

HERE = Environment("a CPU, 2 of 2 cores", "Linux", "", {"torch": "2"}, "abc", {"fp32": 0.1}, 20.0)


def row(pipeline: str = "pid", backend: str = "eager", **changes: Any) -> Row:
    """A measured row; changes: of its members, or of those of its case and its figures."""
    times = changes.pop("times", (100.0, 90.0, 110.0))
    is_pid = pipeline == "pid"
    case = Case(
        pipeline=pipeline,
        backend=backend,
        space="flux",
        variant="2k" if is_pid else "",
        width=256,
        height=256,
        precision="fp32",
        device="cpu",
        threads=2,
        steps=4 if is_pid else 0,
        depth=1,
        weights="random",
    )
    made = Row(
        kind="measured",
        case=case,
        environment="e0",
        input_size=(64, 64),
        counted=Counted(tflop=0.005, bytes_moved=10**9, weight_bytes=10**9),
        measured=Measured(times, peak_rss_bytes=2 * 10**9),
        stages=(StageRow("step", 4, 1, 1, 10, 0.005, 80.0, 79.0, 81.0),),
    )
    for part in (made.case, made.counted, made.measured):
        names = {field.name for field in fields(part)} & set(changes)
        part_changes = {name: changes.pop(name) for name in names}
        changes[part.__class__.__name__.lower()] = replace(part, **part_changes)
    return replace(made, **changes)


def report(*rows: Row) -> Report:
    return Report({"e0": HERE}, rows)


def test_round_trip(tmp_path: Path) -> None:
    made = report(row(), row(backend="onnxruntime", times=(50.0, 51.0)), *reported_rows())
    write_all(tmp_path / "new", made)
    assert read_report(tmp_path / "new") == made
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda raw: raw.update(format_version=1), "format version 2, but got 1"),
        (lambda raw: raw.update(format="other"), "expected pid-bench-report"),
        (lambda raw: raw["rows"][0]["measured"].update(user_ms="fast"), "user_ms"),
        (lambda raw: raw["rows"][0].update(kind="dreamt"), "kind measured or counted"),
        (lambda raw: raw["rows"][0].update(environment="e9"), "environment"),
        (lambda raw: raw["rows"][0]["measured"].update(rounds_ms=[]), "times of a measured row"),
        (lambda raw: raw["rows"][0]["case"].pop("pipeline"), "pipeline"),
        (lambda raw: raw["rows"][0]["case"].update(backend="later"), "a backend of this version"),
        (lambda raw: raw["rows"][0]["case"].update(precision="fp9"), "precision of fp32"),
    ],
)
def test_refuses_other_reports(tmp_path: Path, edit: Any, says: str) -> None:
    path = tmp_path / "report.json"
    write_report(path, report(row()))
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(BenchInputError, match=re.escape(says)) as error:
        read_report(path)
    assert "\n" not in str(error.value)


def test_members_of_later_versions_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, report(row()))
    raw = json.loads(path.read_text())
    raw["rows"][0]["more"] = raw["more"] = 1
    path.write_text(json.dumps(raw))
    assert read_report(path) == report(row())


def rates(made: Report) -> list[Rates]:
    return [made.rates(row) for row in made.rows]


def test_derived_values() -> None:
    made = report(
        row(), row(backend="onnxruntime", times=(50.0,)), row("vae+rrdbnet", times=(25.0,))
    )
    eager, ours, cascade = rates(made)
    assert eager.tflop_per_s == pytest.approx(0.05)
    assert eager.share_of_matmul == pytest.approx(0.5)
    assert eager.share_of_copy == pytest.approx(0.5)
    assert [each.ratio_to_pid for each in (eager, ours, cascade)] == [2.0, 1.0, 0.5]
    shown = made.shown(made.rows[0])
    assert shown["derived"] == {
        "steps": 4,
        "cfg": 1,
        "tiles": 1,
        "median_ms": 100.0,
        "p10_ms": 92.0,
        "p90_ms": 108.0,
        "min_ms": 90.0,
        "tflop_per_s": eager.tflop_per_s,
        "share_of_matmul": eager.share_of_matmul,
        "share_of_copy": eager.share_of_copy,
        "ratio_to_pid": 2.0,
        "agrees": None,
    }


def test_part_of_a_network_is_compared_with_itself_only() -> None:
    part = row(reduced="4 of 14 patch blocks", depth=4, backend="compile", times=(40.0,))
    eager, same, cascade = rates(report(row(), part, row("vae+rrdbnet", times=(25.0,))))
    assert (eager.ratio_to_pid, same.ratio_to_pid, cascade.ratio_to_pid) == (1.0, 1.0, 0.25)
    assert rates(report(part, row("vae+rrdbnet")))[1].ratio_to_pid is None


def test_published_figures_are_not_mixed_with_measured_ones() -> None:
    here = row(input_size=(512, 512), width=2048, height=2048, device="cuda", times=(10.0,))
    made = report(here, *reported_rows())
    published = {each.case.pipeline: each for each in made.rows if each.kind == "reported"}
    assert published["PiD"].measured.median_ms == 211.2
    assert published["VAE + Real-ESRGAN"].measured.median_ms == 62.2
    assert rates(made)[0].ratio_to_pid == 1
    text = to_markdown_page(report(here, *reported_rows()))
    _, _, section = text.partition("## Published by the paper, not measured here")
    assert "1237.5" in section and "1237.5" not in text.partition("## Published")[0]


def test_merge_keeps_both_machines_and_replaces_equal_cases() -> None:
    there = replace(HERE, hardware="another CPU")
    other = Report({"e0": there}, (row(times=(7.0,)),))
    both = report(row()).merged(other)
    assert [each.measured.median_ms for each in both.rows] == [100.0, 7.0]
    assert [both.hardware(each) for each in both.rows] == [HERE.hardware, "another CPU"]
    again = both.merged(report(row(times=(9.0,))))
    assert [each.measured.median_ms for each in again.rows] == [9.0, 7.0]
    assert len(again.environments) == 2


def test_merge_command(tmp_path: Path, run_command: Any, refusal: Any) -> None:
    for name, backend in (("a", "eager"), ("b", "torch")):
        write_all(tmp_path / name, report(row(backend=backend)))
    arguments = ("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", "--json")
    code, out, _ = run_command(main, *arguments)
    assert (code, json.loads(out)["rows"]) == (0, 2)
    assert len(read_report(tmp_path / "c").rows) == 2
    assert "cannot read" in refusal(main, "merge", tmp_path / "none", "-o", tmp_path / "d")


def test_compare(tmp_path: Path, run_command: Any) -> None:
    before = report(row(), row(backend="torch"), row(backend="compile"))
    after = report(
        row(times=(101.0, 91.0, 111.0)),
        row(backend="torch", times=(50.0, 51.0)),
        row(backend="public"),
    )
    changes, notes = compare(before, after)
    assert [(each["key"], each["verdict"]) for each in changes] == [
        (row().case.key, "within noise"),
        (row(backend="torch").case.key, "faster"),
    ]
    keys = [row(backend=backend).case.key for backend in ("compile", "public")]
    assert notes == [f"{keys[0]}: only in the first", f"{keys[1]}: only in the second"]
    assert compare(after, before)[0][1]["verdict"] == "slower"
    for name, each in (("a", before), ("b", after)):
        write_report(tmp_path / name / "report.json", each)
    code, out, _ = run_command(main, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "-49.5%" in out and "within noise" in out


def test_compare_refuses_reports_without_a_common_case(tmp_path: Path, refusal: Any) -> None:
    write_report(tmp_path / "a.json", report(row()))
    write_report(tmp_path / "b.json", report(row(backend="torch")))
    says = refusal(main, "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "measured in both" in says


def test_failures_are_rows() -> None:
    failed = row(status="oom", message="out of memory", times=())
    broken = row(backend="torch", status="error", message="no <kernel>", times=())
    page = to_markdown_page(report(failed, broken))
    assert "out of memory" in page and "no <kernel>" in page
    assert "no &lt;kernel&gt;" in to_html_page(report(failed, broken))


def test_html_has_charts_and_needs_nothing_else() -> None:
    counted = [
        row(kind="counted", width=side, height=side, tflop=side / 1e3) for side in (1024, 2048)
    ]
    engines = dict.fromkeys((f"{p}_bytes" for p in ("weights", "buffers", "scratch")), 10**9)
    engines |= {"arena_bytes": 2 * 10**9, "peak_bytes": 3 * 10**9}
    tensorrt = row(backend="tensorrt", engine_memory=engines, bucket="2k")
    page = to_html_page(report(row(), tensorrt, *counted))
    titles = re.findall(r"<h2>([^<]*)</h2>\n<svg", page)
    assert [title.partition(":")[0] for title in titles] == [
        "Latency by stage",
        "Memory",
        "Device memory of engines by bucket",
        "Cost against resolution",
    ]
    assert "http" not in page and "<script" not in page and "nan" not in page.lower()


def test_images_are_compared(tmp_path: Path) -> None:
    pixels = np.zeros((3, 4, 4), np.float32)
    made = report(row(), row(backend="torch"), row(backend="onnxruntime"), row("vae+lanczos"))
    for each, offset in zip(made.rows, (0.0, 5e-5, 2e-4), strict=False):
        np.save(sample_file(tmp_path, each.case), pixels + np.float32(offset))
    rows = check_images(made, tmp_path).rows
    assert [each.agrees for each in rows] == [None, True, False, None]
    assert rows[2].measured.rms_error == pytest.approx(2e-4, rel=1e-3)
    assert "DIFFERS" in to_markdown_page(check_images(made, tmp_path))


def test_every_member_is_documented() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8").partition("## report.json")[2]
    named = set(re.findall(r"`([a-z_0-9]+)`", page))
    for kind in (Report, Environment, Row, Case, Counted, Measured, StageRow):
        assert {field.name for field in fields(kind)} <= named
