"""What a report comes to, in plain sentences: what was fastest, by how much, and on what."""

import math
from dataclasses import replace

from pid_bench.report import Report, Row
from pid_bench.tables import milliseconds, pixels


def summary(report: Report) -> list[str]:
    """A paragraph for all rows that may be set against each other, in the report's order."""
    contests: dict[tuple[object, ...], list[Row]] = {}
    for row in report.measured():
        contests.setdefault(_contest(row), []).append(row)
    if not contests:
        return ["Nothing was run: work, parameters and bytes are counted from the graphs."]
    return [_paragraph(report.hardware(rows[0]), rows) for rows in contests.values()]


def _contest(row: Row) -> tuple[object, ...]:
    """Equal for rows that are compared: part of a network is never set against other pipelines."""
    case = replace(row.case, backend="", weights="")
    if not row.reduced:
        case = replace(case, pipeline="", variant="", steps=0, depth=0)
    return row.environment, row.input_size, case


def _paragraph(hardware: str, rows: list[Row]) -> str:
    case, names = rows[0].case, _names(rows)
    timed = [(row.measured.median_ms or math.inf, i) for i, row in enumerate(rows)]
    done = [(time, i) for time, i in sorted(timed) if rows[i].status == "ok"]
    failed = [name for name, row in zip(names, rows, strict=True) if row.status != "ok"]
    said = [f"On {hardware}, from a latent to {pixels(case.size)} px in {case.precision}:"]
    for place, (time, i) in enumerate(done):
        text = f"{names[i]} took {milliseconds(time)} ms"
        if place == 0 and len(done) > 1:
            said.append(f"fastest was {names[i]} with {milliseconds(time)} ms;")
            continue
        if place == 0:
            text += ", and there is nothing to compare it with"
        else:
            best, fastest = done[0]
            close = time / best - 1 <= math.hypot(rows[i].noise, rows[fastest].noise)
            text += f", {time / best:.3g} times as long"
            text += " (no more than the noise)" if close else ""
        said.append(text + ("." if place == len(done) - 1 else ";"))
    if failed:
        said.append(f"No time of {', '.join(failed)}: the note says why.")
    said.append(
        f"Only {rows[0].reduced} ran: a whole decode takes longer."
        if rows[0].reduced
        else "The networks are whole, and times are medians."
    )
    if len({row.case.pipeline for row in rows}) > 1:
        said.append("Times say nothing of how good the images are.")
    weights = {row.case.weights for row in rows}
    if "random" in weights:
        which = "The weights" if len(weights) == 1 else "Some weights"
        said.append(f"{which} are random, which changes the image but not the time.")
    return " ".join(said)


def _names(rows: list[Row]) -> list[str]:
    """Pipelines and backends; where that does not tell rows apart, with what does."""
    short = [f"{row.case.pipeline} ({row.case.backend})" for row in rows]
    return [
        f"{name[:-1]}, {row.case.variant}, {row.case.steps} steps, {row.case.weights} weights)"
        if short.count(name) > 1
        else name
        for name, row in zip(short, rows, strict=True)
    ]
