"""How far bf16 and fp8 are from float32, on the networks of golden files.

    python tools/precision.py tests/golden/*.safetensors -o bench/results/precision.json

Every network is exported in each precision, for fp8 calibrated on the file's own input, and decodes
that input with the file's noise by torch on the CPU. Root mean squares over the image, in [-1, 1].
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from pid_bench.hardware import cpu_name
from pid_export import bundle as exporter
from pid_export.calibrate import calibrate
from pid_export.golden import Golden, decode_golden, export_golden, read_golden
from pid_export.graphs import GraphExporter
from pid_runtime.command.decode_jobs import Inputs
from pid_runtime.decoder import Decoder

ROUNDED = ("bf16", "fp8", "fp8-fp32")


def main() -> int:
    """Print a row for each file; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare precisions on golden files.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="also write a JSON file")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for path in args.files:
        rows.append({"file": path.name, **errors(read_golden(path))})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    if args.output:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": cpu_name(),
            "versions": {name: version(name) for name in ("torch", "numpy")},
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def errors(golden: Golden) -> dict[str, float]:
    """The image's own RMS, and how far each precision is from float32."""
    given = golden.inputs
    one = [Inputs(given.latent[:1], given.caption[:1], None, given.sigma[:1])]
    with (
        tempfile.TemporaryDirectory() as folder,
        # torch decodes by the manifest: graphs, which take minutes to trace, are left empty.
        patch.object(GraphExporter, "export", return_value=b""),
        patch.object(exporter, "check_graph"),
    ):
        exact = Path(folder) / "fp32"
        export_golden(golden, exact)
        calibration = calibrate(exact, one, described="the file's input")
        wanted = decode(golden, exact)
        found = {"rms": rms(wanted)}
        for precision in ROUNDED:
            bundle = Path(folder) / precision
            chosen = calibration if precision != "bf16" else None
            export_golden(golden, bundle, precision=precision, calibration=chosen)
            found[precision] = rms(decode(golden, bundle) - wanted)
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def decode(golden: Golden, bundle: Path) -> NDArray[np.float32]:
    """Decode a golden file's input, by torch."""
    with Decoder.open(bundle, "torch") as decoder:
        return decode_golden(golden, decoder)


def rms(values: NDArray[np.float32]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


if __name__ == "__main__":
    sys.exit(main())
