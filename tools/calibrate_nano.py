"""Calibrates `nano` for fp8 on the photographs it learnt from.

    python tools/calibrate_nano.py --folder nano-training

To be run when the weights have changed. Writes `pid_ref/nano/nano.calibration.json`, which
`pid-export --space nano --precision fp8` reads.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from nano_photos import load_photos
from PIL import Image

from pid_export.calibrate_cli import main as pid_calibrate
from pid_export.cli import main as pid_export
from pid_ref.registry import NANO_CONFIG

KEEP = ("--keep", "update")
"""That graph makes the picture straight of what tokens tell their pixels."""


def main() -> int:
    """Calibrate; returns the exit code."""
    parser = argparse.ArgumentParser(description="Calibrate the nano decoder for fp8.")
    parser.add_argument("--folder", type=Path, required=True, help="of tools/train_nano.py")
    args = parser.parse_args()
    output = Path(__file__).parents[1] / "pid_ref" / "nano" / "nano.calibration.json"
    with tempfile.TemporaryDirectory() as temporary:
        bundle, small = Path(temporary) / "nano", Path(temporary) / "photographs"
        small.mkdir()
        photos = load_photos(args.folder / "photos", held_out=False)
        for index, photo in enumerate(photos.values()):
            image = Image.fromarray(photo)
            size = (image.width // NANO_CONFIG.scale, image.height // NANO_CONFIG.scale)
            image.resize(size, Image.Resampling.BICUBIC).save(small / f"{index}.png")
        return pid_export(["--space", "nano", "--buckets", "2k", "-o", str(bundle)]) or (
            pid_calibrate([str(bundle), "--latents", str(small), *KEEP, "-o", str(output)])
        )


if __name__ == "__main__":
    sys.exit(main())
