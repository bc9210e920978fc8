"""Charts as SVG: stacked bars, and lines over logarithmic axes; the same data, the same file."""

import importlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pid_bench.errors import BenchInputError

DASHES = ("-", "--", ":", "-.")
"""Of lines, when there are more than colours."""

LEGEND_CHARACTERS = 110
"""What fits beside each other above a chart."""

WIDTH, ROW = 9.0, 0.26
"""Of a chart, and the height of a bar or of a line of a legend with its gap, in inches."""

INK = "#222222"
"""Of text and axes; in a page, that of the page."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pid",  # names inside of the file do not change from run to run
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#888888",
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}

OTHER = "other"
"""The part that comes last, wherever it is named."""

Bar = tuple[str, Mapping[str, float]]
"""A label and its parts."""

Points = Sequence[tuple[float, float]]


def stacked_bars(bars: Sequence[Bar], axis: str, shown: Callable[[float], str]) -> str:
    """Horizontal bars, each of named parts one after the other; in total what `shown` says of it.

    axis: what the values are, with their unit.
    """
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    names.sort(key=lambda name: name == OTHER)
    longest = max(sum(parts.values()) for _, parts in bars)

    def draw(axes: Any) -> None:
        begins = [0.0] * len(bars)
        for index, name in enumerate(names):
            values = [parts.get(name, 0.0) for _, parts in bars]
            colour = colours()[index % len(colours())]
            axes.barh(range(len(bars)), values, 0.78, left=begins, label=name, color=colour)
            begins = [begin + value for begin, value in zip(begins, values, strict=True)]
        for index, total in enumerate(begins):
            axes.annotate(
                shown(total), (total, index), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * longest or 1)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.grid(axis="x")
        _legend(axes, names)

    return in_page(draw, ROW * (len(bars) + 2.6) + _legend_height(names))


def log_lines(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Points joined by lines; both axes are logarithmic, and all values above 0."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(series.items()):
            turn, colour = divmod(index, len(colours()))
            style = {"color": colours()[colour], "linestyle": DASHES[turn % len(DASHES)]}
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name, **style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(subs=(1, 2, 5))
            axis.set_major_formatter("{x:,.10g}")
            axis.set_minor_formatter("")
        axes.minorticks_off()
        axes.grid()
        _legend(axes, list(series))

    return in_page(draw, 3.4 + _legend_height(list(series)))


def to_svg(draw: Callable[[Any], None], height: float, background: str = "white") -> str:
    """A chart as an SVG file. draw: gets a matplotlib `Axes`; height: in inches.

    Raises `BenchInputError` where matplotlib is not installed.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        raise BenchInputError(
            f"expected matplotlib, which draws the charts, but got: {error}; "
            "pip install 'pid-trt[bench]'"
        ) from None
    figures: Any = importlib.import_module("matplotlib.figure")
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure((WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", facecolor=background, metadata=nothing)
    return file.getvalue()


def in_page(draw: Callable[[Any], None], height: float) -> str:
    """A chart as an element of an HTML page, in whose colour it writes; see `to_svg`."""
    svg = to_svg(draw, height, "none")
    svg = re.sub(
        r' xmlns(:xlink)?="[^"]*"| (width|height)="[0-9.]+pt"', "", svg[svg.index("<svg") :]
    )
    return re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")


def colours() -> list[Any]:
    """Twenty that differ, the strong ones first: more than a report has stages."""
    table = importlib.import_module("matplotlib").colormaps["tab20"].colors
    return [*table[::2], *table[1::2]]


def _legend(axes: Any, names: Sequence[str]) -> None:
    """What the colours mean, above the plot."""
    axes.figure.legend(loc="outside upper left", ncols=_legend_columns(names), frameon=False)


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(4, LEGEND_CHARACTERS // (max(map(len, names)) + 6)))


def _legend_height(names: Sequence[str]) -> float:
    """In inches."""
    return 0.2 + 0.8 * ROW * math.ceil(len(names) / _legend_columns(names))
