"""Draws the log of a training run of the `nano` decoder.

python tools/plot_nano_log.py bench/results/nano-training.jsonl docs/nano-training.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pid_bench.charts import to_svg
from pid_runtime.bundle.files import write_whole

SERIES = {"clean": "clean latents", "noisy": "noisy latents, sigma 0 to 0.8"}
"""What is drawn: the log's name, and what it is."""

COLOURS = ("#4477aa", "#ee6677")
"""Of the series; told apart by colour-blind readers too."""

WINDOW = 5
"""Entries of the log that are averaged: each is over a few hundred crops only."""


def main() -> int:
    """Read a log, write an SVG file; returns the exit code."""
    log, picture = (Path(name) for name in sys.argv[1:])
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    write_whole(picture, to_svg(lambda axes: draw(axes, entries), 3.4))
    return 0


def draw(axes: Any, entries: list[dict[str, Any]]) -> None:
    """PSNR of the crops over the iterations, in a matplotlib `Axes`."""
    for (name, words), colour in zip(SERIES.items(), COLOURS, strict=True):
        points = [(e["iteration"], e["psnr"][name]) for e in entries if name in e["psnr"]]
        values = np.convolve([y for _, y in points], np.ones(WINDOW) / WINDOW, "valid")
        at = [x for x, _ in points][WINDOW // 2 : WINDOW // 2 + len(values)]
        axes.plot(at, values, color=colour, label=words)
    axes.set_xlabel("iteration")
    axes.set_ylabel("PSNR of training crops, dB")
    axes.set_xlim(0)
    axes.grid()
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
