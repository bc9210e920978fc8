"""Draws the log of a training run of the `nano` decoder.

python tools/plot_nano_log.py bench/results/nano-training.jsonl docs/nano-training.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SERIES = {
    "clean": ("clean latents", "#4477aa"),
    "noisy": ("noisy latents, sigma 0 to 0.8", "#ee6677"),
}
"""What is drawn: the log's name, what it is, and its colour."""

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 340, 60, 50, 40
WINDOW = 5
"""Entries of the log that are averaged: each is over a few hundred crops only."""


def main() -> int:
    """Read a log, write an SVG file; returns the exit code."""
    log, picture = (Path(name) for name in sys.argv[1:])
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    picture.write_text(draw(entries))
    return 0


def draw(entries: list[dict[str, Any]]) -> str:
    """PSNR of the crops over the iterations."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in SERIES:
        points = [(e["iteration"], e["psnr"][name]) for e in entries if name in e["psnr"]]
        values = np.convolve([y for _, y in points], np.ones(WINDOW) / WINDOW, "valid")
        at = [x for x, _ in points][WINDOW // 2 : WINDOW // 2 + len(values)]
        lines[name] = list(zip(at, values.tolist(), strict=True))
    last = max(x for points in lines.values() for x, _ in points)
    low = np.floor(min(y for points in lines.values() for _, y in points))
    high = np.ceil(max(y for points in lines.values() for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 20) * x / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    body: list[str] = []
    for y in range(int(low), int(high) + 1):
        _, height = place(0, y)
        body.append(
            f'<line x1="{LEFT}" y1="{height:.1f}" x2="{WIDTH - 20}" y2="{height:.1f}" '
            'stroke="#dddddd"/>'
        )
        body.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{y}</text>')
    for x in range(0, int(last) + 1, 2500):
        across, _ = place(x, low)
        body.append(f'<text x="{across:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{x}</text>')
    for row, (name, (words, colour)) in enumerate(SERIES.items()):
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in lines[name])
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body.append(f'<text x="{LEFT}" y="{20 + 18 * row}" fill="{colour}">{words}</text>')
    body.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle">iteration</text>')
    body.append(
        f'<text x="{WIDTH - 20}" y="20" text-anchor="end">PSNR of training crops, dB</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
