"""Two reports against each other: what became faster or slower, beyond their noise."""

import math
from typing import Any

from pid_bench.report import Report, Row
from pid_bench.tables import Table, milliseconds


def compare(before: Report, after: Report) -> tuple[list[dict[str, Any]], list[str]]:
    """Cases measured in both, in the order of `before`, and what can not be compared, in words.

    A change has `key` and `reduced` of its case; `before_ms` and `after_ms`; `change`, which is
    after / before - 1; `noise`, how much of it says nothing: half of both spreads (p10 to p90)
    together; the `hardware` of both; and a `verdict`: faster, slower or within noise.
    """
    changes: list[dict[str, Any]] = []
    notes: list[str] = []
    ours, theirs = ({row.case.key: row for row in each.measured()} for each in (before, after))
    for key, row in ours.items():
        other = theirs.get(key)
        if other is None:
            notes.append(f"{key}: only in the first")
        elif row.status != "ok" or other.status != "ok":
            notes.append(f"{key}: {row.status} then {other.status}")
        else:
            changes.append(_change(row, other, (before.hardware(row), after.hardware(other))))
    notes += [f"{key}: only in the second" for key in theirs if key not in ours]
    return changes, notes


def changes_table(changes: list[dict[str, Any]]) -> Table:
    """One line per case."""
    rows = tuple(
        (
            f"{each['key']} ({each['reduced']})" if each["reduced"] else each["key"],
            milliseconds(each["before_ms"]),
            milliseconds(each["after_ms"]),
            f"{each['change']:+.1%}",
            f"{each['noise']:.1%}",
            each["verdict"] + ("" if len(set(each["hardware"])) == 1 else " (other hardware)"),
        )
        for each in changes
    )
    header = ("case", "before ms", "after ms", "change", "noise", "")
    return Table("Changes", header, rows, frozenset((1, 2, 3, 4)))


def _change(row: Row, other: Row, hardware: tuple[str, str]) -> dict[str, Any]:
    then, now = row.measured.median_ms, other.measured.median_ms
    assert then and now
    change, noise = now / then - 1, math.hypot(row.noise, other.noise)
    verdict = "within noise" if abs(change) <= noise else "slower" if change > 0 else "faster"
    return {
        "key": row.case.key,
        "reduced": row.reduced,
        "before_ms": then,
        "after_ms": now,
        "change": change,
        "noise": noise,
        "hardware": hardware,
        "verdict": verdict,
    }
