"""An export in fp8: an exact one is decoded for its scales, and what comes of it is looked at."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pid_export.bundle import ExportOptions
from pid_export.calibrate import (
    Cost,
    calibrate,
    check_clipped,
    clipped_shares,
    most_clipped,
    sensitivity,
)
from pid_export.calibration import Calibration, read_calibration, rounded_of
from pid_export.calibration_inputs import MADE_UP, read_inputs, synthetic_inputs
from pid_export.program import build_program
from pid_ref.config import PidConfig
from pid_runtime.bundle.files import check_new, folder_beside
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.command.decode_jobs import Inputs

_log = logging.getLogger(__name__)

Export = Callable[..., Manifest]
"""`export_bundle`, but for what is the same for all of an export's bundles."""


@dataclass(frozen=True)
class Rounding:
    """What is asked for."""

    precision: str
    calibration: Path | None
    """A file of pid-calibrate, or latents, or photographs; None for made-up latents."""
    keep: tuple[str, ...] | None = None
    """Graphs that are not rounded; None for those that the calibration names."""
    sensitivity: bool = False


@dataclass(frozen=True)
class Rounded:
    """What came of it."""

    manifest: Manifest
    calibration: Calibration
    clipped: Mapping[str, float] | None
    """By place, the share that was too large; None where there is nothing to decode."""
    costs: list[Cost] | None
    """Of each graph alone, if asked for."""

    @property
    def result(self) -> dict[str, Any]:
        """For --json."""
        found: dict[str, Any] = {"calibrated_on": self.calibration.inputs}
        if self.clipped is not None:
            found["most_clipped"] = most_clipped(self.clipped)[1]
        if self.costs is not None:
            found["sensitivity"] = [
                {"graph": cost.graph, "rms": cost.rms, "psnr": cost.psnr} for cost in self.costs
            ]
        return found

    @property
    def text(self) -> str:
        """For people."""
        lines = [f"calibrated on {self.calibration.inputs}"]
        if self.clipped is not None:
            lines[0] += f", {most_clipped(self.clipped)[1]:.4%} of one place too large"
        if self.costs is not None:
            rows = [["rounded alone", "rms", "PSNR"]]
            rows += [[c.graph, f"{c.rms:.5f}", f"{c.psnr:.1f} dB"] for c in self.costs]
            lines.append(console.aligned(rows))
        return "\n".join(lines)


def export_fp8(
    output: Path,
    config: PidConfig,
    source: Mapping[str, Tensor],
    options: ExportOptions,
    rounding: Rounding,
    export: Export,
    *,
    quiet: bool = False,
) -> Rounded:
    """Write a bundle in fp8 to the new folder `output`, whole or not at all.

    options: of the exact bundle that the scales are measured on, which is removed again. Raises
    `ExportInputError` when too many numbers are beyond the scales, and `NotFiniteError` for NaN.
    """
    path = rounding.calibration
    known = read_calibration(path) if path is not None and path.suffix == ".json" else None
    # Found out now, and not when minutes have gone into calibrating.
    rounded_of(None, build_program(config, options.precision, None), rounding.keep or ())
    with folder_beside(output) as folder:
        exact, inputs, found = folder / "exact", list[Inputs](), known
        if known is None or rounding.sensitivity:
            with console.progress("Exporting what to calibrate on", 1.0, quiet=quiet) as advance:
                manifest = export(exact, config, source, options, advance=advance)
            if known is not None or path is None:
                inputs, described = synthetic_inputs(manifest), MADE_UP
            else:
                inputs, described = read_inputs(manifest, path)
            if known is None:
                if path is None:
                    _log.warning(
                        "calibrated on made-up latents; real ones are better: --calibration DIR, "
                        "with latents of your generator and their captions"
                    )
                with console.progress("Calibrating", 1.0, quiet=quiet) as advance:
                    found = calibrate(exact, inputs, described=described, advance=advance)
        assert found is not None
        keep = found.keep if rounding.keep is None else rounding.keep
        rounded = replace(options, precision=rounding.precision, calibration=found, keep=keep)
        with console.progress("Exporting", 1.0, quiet=quiet) as advance:
            manifest = export(folder / "fp8", config, source, rounded, advance=advance)
        clipped = costs = None
        if known is None:
            with console.progress("Checking the scales", 1.0, quiet=quiet) as advance:
                clipped = clipped_shares(folder / "fp8", inputs, advance)
            check_clipped(clipped)
        if rounding.sensitivity:
            with console.progress("Rounding each graph alone", 1.0, quiet=quiet) as advance:
                costs = sensitivity(exact, found, inputs[:1], advance)
        check_new(output)
        (folder / "fp8").rename(output)
    return Rounded(manifest, found, clipped, costs)
