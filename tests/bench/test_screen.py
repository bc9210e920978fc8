"""What `pid-bench` shows while cases run."""

import io
import logging
import sys

import pytest

from pid_bench.cases import Case
from pid_bench.report import Measured, Row
from pid_bench.screen import Screen
from pid_bench.tables import Table

CASE = Case("pid", "eager", "flux", "2k", 256, 128, "fp32", "cpu", 1, 4, 14, "random")
ROW = Row("measured", CASE, (64, 32), measured=Measured((12.5,)))
FAILED = Row("measured", CASE, (64, 32), status="error", message="no kernel")
TABLE = Table("Decodes", ("pipeline", "median ms"), (("pid", "12.5"),))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("row", "line"), [(ROW, "pid, eager, 256x128 px: 12.5 ms"), (FAILED, "256x128 px: no kernel")]
)
def test_a_line_per_case(row: Row, line: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Screen(quiet=False) as screen:
        screen.status("loading")
        screen.show(TABLE, row)
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(line)


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Screen(quiet=False) as screen:
        screen.total = 3
        screen.show(TABLE, ROW)
        screen.status("loading pid torch")
    shown = terminal.getvalue()
    assert "median ms" in shown and "12.5" in shown
    assert "1 of 3 cases; loading pid torch" in shown


def test_nothing_is_drawn_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Screen(quiet=True) as screen:
        screen.show(TABLE, ROW)
    assert terminal.getvalue() == ""
