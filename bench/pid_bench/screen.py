"""What is shown while cases run: a table on a terminal, otherwise a line per case."""

import logging
import sys
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from pid_bench.report import Row
from pid_bench.tables import Table, milliseconds, network, pixels

_log = logging.getLogger(__name__)


class Screen:
    """A context manager; nothing is drawn when stderr is no terminal, or `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.total = 0
        """Cases that are going to run."""
        self._done = 0
        drawn = sys.stderr.isatty() and not quiet
        self._live = Live(console=Console(stderr=True), refresh_per_second=4) if drawn else None
        self._table: list[Any] = []

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def status(self, text: str) -> None:
        """Say what is done now."""
        if self._live is not None:
            line = Text(f"{self._done} of {self.total} cases; {text}", style="dim")
            self._live.update(Group(*self._table, line))

    def show(self, table: Table, row: Row) -> None:
        """Show the rows so far, of which `row` is new."""
        self._done += 1
        if self._live is None:
            took = f"{milliseconds(row.measured.median_ms)} ms"
            result = took if row.status == "ok" else row.message
            _log.info("%s, %s px: %s", network(row), pixels(row.case.size), result)
            return
        drawn = RichTable(box=box.SIMPLE)
        for index, title in enumerate(table.header):
            drawn.add_column(title, justify="right" if index in table.numbers else "left")
        for cells in table.rows:
            drawn.add_row(*cells)
        self._table = [drawn]
        self.status("")
