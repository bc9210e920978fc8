"""Images of the same network must be the same: some of their pixels are kept and compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_bench.cases import PID, Case
from pid_bench.report import Report, Row

SAMPLED = 64
"""Rows and columns of pixels, spread over an image, that are kept."""


def sampled(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels on a grid over an image `[1, 3, H, W]`: `[3, at most SAMPLED, at most SAMPLED]`."""
    rows, columns = (
        np.unique(np.linspace(0, side - 1, SAMPLED).astype(int)) for side in image.shape[2:]
    )
    return np.ascontiguousarray(image[0][:, rows][:, :, columns])


def sample_file(folder: Path, case: Case) -> Path:
    """Where the pixels of a case's image are kept."""
    return folder / f"{case.key.replace('/', '_')}.npy"


def check_images(report: Report, folder: Path) -> Report:
    """The report with every measured PiD compared with the first one of the same image."""
    first: dict[Case, Any] = {}
    rows: list[Row] = []
    for row in report.rows:
        file = sample_file(folder, row.case)
        decoded = row.kind == "measured" and row.status == "ok" and row.case.pipeline == PID
        if decoded and file.is_file():
            pixels = np.load(file)
            # Cases that differ in nothing else must come to the same image.
            same = replace(row.case, backend="", device="", threads=0)
            if same in first:
                difference = (pixels - first[same]).astype(np.float64)
                measured = replace(
                    row.measured,
                    rms_error=float(np.sqrt(np.square(difference).mean())),
                    max_abs_error=float(np.abs(difference).max()),
                )
                row = replace(row, measured=measured)
            else:
                first[same] = pixels
        rows.append(row)
    return replace(report, rows=tuple(rows))
