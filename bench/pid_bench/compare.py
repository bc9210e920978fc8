"""Two reports against each other: what became faster or slower, beyond their noise."""

import math
from dataclasses import dataclass

from pid_bench.report import Report, Row
from pid_bench.tables import Table, milliseconds


@dataclass(frozen=True)
class Change:
    """One case in both reports."""

    key: str
    before_ms: float
    after_ms: float
    change: float
    """after / before - 1."""
    noise: float
    """How much of a change says nothing: half of both spreads (p10 to p90), together."""
    reduced: str
    """How the network was made smaller; empty when it was not."""
    hardware: tuple[str, str]
    """What each ran on; times of different hardware are no change of the code."""

    @property
    def verdict(self) -> str:
        """faster, slower, or within noise."""
        if abs(self.change) <= self.noise:
            return "within noise"
        return "slower" if self.change > 0 else "faster"


def compare(before: Report, after: Report) -> tuple[list[Change], list[str]]:
    """Cases measured in both, in the order of `before`, and what can not be compared, in words."""
    changes: list[Change] = []
    notes: list[str] = []
    ours, theirs = ({row.case.key: row for row in each.measured()} for each in (before, after))
    for key, row in ours.items():
        other = theirs.get(key)
        if other is None:
            notes.append(f"{key}: only in the first")
        elif row.status != "ok" or other.status != "ok":
            notes.append(f"{key}: {row.status} then {other.status}")
        else:
            changes.append(_change(before, row, after, other))
    notes += [f"{key}: only in the second" for key in theirs if key not in ours]
    return changes, notes


def changes_table(changes: list[Change]) -> Table:
    """One line per case."""
    rows = tuple(
        (
            f"{each.key} ({each.reduced})" if each.reduced else each.key,
            milliseconds(each.before_ms),
            milliseconds(each.after_ms),
            f"{100 * each.change:+.1f} %",
            f"{100 * each.noise:.1f} %",
            each.verdict + ("" if len(set(each.hardware)) == 1 else " (other hardware)"),
        )
        for each in changes
    )
    return Table("Changes", ("case", "before ms", "after ms", "change", "noise", ""), rows)


def _change(before: Report, row: Row, after: Report, other: Row) -> Change:
    then, now = row.whole.median_ms, other.whole.median_ms
    assert then and now
    return Change(
        key=row.case.key,
        before_ms=then,
        after_ms=now,
        change=now / then - 1,
        noise=math.hypot(row.noise, other.noise),
        reduced=row.reduced,
        hardware=(before.hardware(row), after.hardware(other)),
    )
