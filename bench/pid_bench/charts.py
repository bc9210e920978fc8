"""Charts as inline SVG: stacked bars, and lines over logarithmic axes. They need nothing else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#555555")
"""Told apart by colour-blind readers too (Paul Tol's bright scheme)."""

WIDTH, LABELS, ROW = 900, 290, 24
"""Of a chart, of the space left of its axis, and the height of a bar with its gap, in pixels."""

PLOT_HEIGHT, MARGIN = 320, 48

Bar = tuple[str, Mapping[str, float]]
"""A label and its parts."""


def stacked_bars(bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars, each of named parts one after the other."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    longest = max(sum(parts.values()) for _, parts in bars)
    scale = (WIDTH - LABELS - 110) / longest if longest else 0.0
    lines = _legend(colours)
    top = ROW * len(lines) + 10
    for index, (label, parts) in enumerate(bars):
        y, x = top + index * ROW, float(LABELS)
        lines.append(_text(LABELS - 8, y + 15, label, "end"))
        for name, value in parts.items():
            width = value * scale
            title = f"<title>{escape(name)}: {value:.4g} {escape(unit)}</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 5}" '
                f'fill="{colours[name]}">{title}</rect>'
            )
            x += width
        lines.append(_text(x + 6, y + 15, f"{sum(parts.values()):.4g} {unit}"))
    return _svg(lines, top + ROW * len(bars) + 8)


def log_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """Points joined by lines; both axes are logarithmic, and all values above 0."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(series)}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    left, right, bottom = 90, WIDTH - 30, PLOT_HEIGHT
    lines = _legend(colours)
    top = ROW * len(lines) + 10
    to_x, x_marks = _axis(xs, left, right)
    to_y, y_marks = _axis(ys, top + bottom, top)
    for value in y_marks:
        lines.append(_line(left, to_y(value), right, to_y(value)))
        lines.append(_text(left - 6, to_y(value) + 4, f"{value:g}", "end"))
    for value in x_marks:
        lines.append(_line(to_x(value), top, to_x(value), top + bottom))
        lines.append(_text(to_x(value), top + bottom + 18, f"{value:g}", "middle"))
    for name, points in series.items():
        at = [(to_x(x), to_y(y)) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        )
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colours[name]}">'
            f"<title>{escape(name)}: {value:.4g}</title></circle>"
            for (x, y), (_, value) in zip(at, sorted(points), strict=True)
        ]
    lines.append(_text((left + right) / 2, top + bottom + MARGIN - 8, x_label, "middle"))
    lines.append(_text(4, top - 4, y_label))
    return _svg(lines, top + bottom + MARGIN)


def _axis(values: Iterable[float], begin: float, end: float):
    logs = [math.log10(value) for value in values]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    marks = [10.0**power for power in range(low, high + 1)]

    def place(value: float) -> float:
        return begin + (math.log10(value) - low) / (high - low) * (end - begin)

    return place, marks


def _legend(colours: Mapping[str, str]) -> list[str]:
    return [
        f'<g><rect x="8" y="{8 + ROW * index}" width="14" height="14" fill="{colour}"/>'
        f"{_text(28, 20 + ROW * index, name)}</g>"
        for index, (name, colour) in enumerate(colours.items())
    ]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="grid"/>'


def _svg(lines: Iterable[str], height: float) -> str:
    body = "\n".join(lines)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">\n{body}\n</svg>'
