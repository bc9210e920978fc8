"""Charts of reports."""

import re
import subprocess
import sys

import pytest

from pid_bench.charts import log_lines, stacked_bars
from pid_bench.errors import BenchInputError

BARS = [("pid, eager", {"step": 80.0, "other": 20.0}), ("pid, torch", {"prologue": 5.0})]


def bars() -> str:
    return stacked_bars(BARS, "median, ms", lambda total: f"{total:.0f} ms")


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_bars_say_what_they_are() -> None:
    found = texts(bars())
    assert {"pid, eager", "pid, torch", "100 ms", "5 ms", "median, ms"} <= set(found)
    assert [text for text in found if text in ("step", "prologue", "other")] == [
        *("step", "prologue", "other")  # what is left comes last
    ]


def test_many_parts_look_different() -> None:
    parts = {f"stage {index}": 1.0 for index in range(13)}
    svg = stacked_bars([("all", parts)], "ms", str)
    assert len(set(re.findall("fill: (#[0-9a-f]{6})", svg))) >= len(parts)


def test_a_long_legend_leaves_room() -> None:
    """Names that do not fit beside each other stand below each other, and the chart grows."""
    tall, low = (
        float(re.findall(r'viewBox="0 0 [0-9.]+ ([0-9.]+)"', svg)[0])
        for svg in (
            log_lines({f"{name} {number}": [(1.0, 2.0)] for number in range(6)}, "x", "y")
            for name in ("a pipeline with a very long name", "pid")
        )
    )
    assert tall > low


def test_lines_have_labelled_axes() -> None:
    svg = log_lines({"pid": [(4.2, 100.0), (1.0, 20.0)]}, "output, megapixels", "median, ms")
    assert {"pid", "output, megapixels", "median, ms", "50", "2"} <= set(texts(svg))


def test_charts_of_next_to_nothing() -> None:
    assert "median, ms" in texts(stacked_bars([("pid", {"step": 0.0})], "median, ms", str))
    assert "median, ms" in texts(log_lines({"pid": [(1.0, 20.0)]}, "megapixels", "median, ms"))


def test_the_same_data_give_the_same_file_in_another_process() -> None:
    code = f"import runpy, sys; sys.stdout.write(runpy.run_path({__file__!r})['bars']())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == bars()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchInputError, match=r"pip install 'pid-trt\[bench\]'$"):
        bars()


def test_matplotlib_is_loaded_for_a_chart_only() -> None:
    code = "import sys, pid_bench.render; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
