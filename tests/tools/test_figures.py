"""Figures in the documentation are those of the files they cite."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from figures import END, main, pages, with_figures

from pid_bench.errors import BenchInputError
from places import ROOT

NETWORKS = {"2kto4k-v1": "v1", "2kto4k": "v1.5"}


def engine_rows() -> list[list[str]]:
    """Rows of the table of engine memory, from the record of the builds."""
    record: dict[str, Any] = json.loads((ROOT / "bench/results/engines-rtx.json").read_text())
    rows: list[list[str]] = []
    for run in record["runs"]:
        for bucket, memory in run["result"]["buckets"].items():
            parts = ("weights_bytes", "buffers_bytes", "scratch_bytes", "arena_bytes")
            peak = run["result"]["peak_device_bytes"][bucket]
            assert peak == memory["weights_bytes"] + memory["arena_bytes"]
            rows.append(
                [
                    NETWORKS[run["variant"]],
                    run["plan"],
                    f"`{bucket}`",
                    *(f"{memory[part] / 1e9:.2f}" for part in parts),
                    f"**{peak / 1e9:.2f} GB**",
                ]
            )
    return rows


def test_engine_memory() -> None:
    text = (ROOT / "docs/memory.md").read_text("utf-8")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| v1", line)
    ]
    assert table == engine_rows()


def test_engine_memory_in_the_page_of_tensorrt() -> None:
    text = (ROOT / "docs/tensorrt.md").read_text("utf-8")
    for network, plan, bucket, *_, peak in engine_rows():
        if bucket in ("`2k`", "`4k`") and network == "v1":
            assert f"| {plan} | {bucket} | {peak.strip('*')} |" in text


def test_engines_fit_the_memory_that_was_promised() -> None:
    """5.5 GB at 4096 x 4096 and 3.2 GB at 2688 x 1792 for v1, and 5 % more for v1.5."""
    for network, _, bucket, *_, peak in engine_rows():
        most = {"`2k`": 3.2, "`4k`": 5.5}.get(bucket)
        if most is not None:
            allowance = 1.05 if network == "v1.5" else 1
            assert float(peak.strip("* GB")) <= most * allowance


def test_marked_tables_are_those_of_the_measurements() -> None:
    marked = {page.name for page in pages(ROOT) if END in page.read_text("utf-8")}
    assert {"README.md", "memory.md"} <= marked
    for page in pages(ROOT):
        text = page.read_text("utf-8")
        assert with_figures(text, ROOT) == text, f"{page}: run python tools/figures.py"


def test_an_altered_figure_is_found_and_mended(tmp_path: Path, run_command: Any) -> None:
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    text = (ROOT / "docs/tensorrt.md").read_text("utf-8")
    page = tmp_path / "README.md"
    page.write_text(text.replace("| fast | `2k` | 2.90 GB |", "| fast | `2k` | 1.90 GB |"))
    arguments = ("--root", tmp_path)
    code, out, _ = run_command(main, *arguments, "--check")
    assert (code, page.read_text("utf-8") == text) == (1, False) and "README.md" in out
    assert run_command(main, *arguments)[0] == 0
    assert page.read_text("utf-8") == text
    assert run_command(main, *arguments, "--check")[0] == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"<!-- figures: nothing -->\n{END}", "'nothing'"),
        ("<!-- figures: engine-memory -->\n| a |", "has none"),
    ],
)
def test_wrong_markers(text: str, says: str) -> None:
    with pytest.raises(BenchInputError, match=says):
        with_figures(text, ROOT)
