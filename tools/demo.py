"""The main job on a photograph, as `make demo` runs it: export, build engines, decode, compare.

A photograph that the `nano` decoder was not trained on is reduced to a quarter of its size, made
into a latent, as it is and with noise, and decoded on the CPU to its full size again. Leaves
everything in demo/; sheet.png shows a piece of what came of it between the same photograph, merely
enlarged, and the original.
"""

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from quality import psnr, resized, ssim
from skimage.data import astronaut

from pid_engines import cli as build_cli
from pid_export import cli as export_cli
from pid_pipelines import upscale_cli
from pid_runtime.command.images import save_image, side_by_side

Pixels = NDArray[np.uint8]
Command = tuple[str, Callable[[Sequence[str]], int], list[str]]

SCALE = 4
SIGMAS = (0.0, 0.4)
PIECE = (slice(0, 192), slice(160, 352))
"""Rows and columns of the photograph that the sheet shows."""
ZOOM = 2
"""Pixels of the sheet per pixel of the piece."""


def main(folder: Path = Path("demo"), weights: Sequence[str] = ()) -> int:
    """Run the demo in `folder`; returns the first exit code of a command that is not 0.

    weights: options of pid-export that say other weights than those that ship.
    """
    folder.mkdir(exist_ok=True)
    original = np.asarray(astronaut())
    photo = resized(original, original.shape[0] // SCALE, original.shape[1] // SCALE)
    save_image(folder / "photo.png", photo)
    for name, command, arguments in _commands(folder, weights):
        sys.stderr.write(f"\n$ {name} {' '.join(arguments)}\n")
        begin = time.monotonic()
        if code := command(arguments):
            return code
        sys.stderr.write(f"{time.monotonic() - begin:.1f} s\n")
    rows = [_row(folder / "pictures", sigma, original) for sigma in SIGMAS]
    save_image(folder / "sheet.png", np.concatenate(rows))
    sys.stdout.write(f"{folder / 'sheet.png'}: a piece of all of them, side by side\n")
    return 0


def _row(pictures: Path, sigma: float, original: Pixels) -> Pixels:
    """One noise level's pieces, side by side; says how near whole images come to the original."""
    decoded, native = (
        np.asarray(Image.open(pictures / f"photo-sigma{sigma:g}{ending}.png"))
        for ending in ("", "-vae")
    )
    height, width = original.shape[:2]
    given = "input" if sigma == 0 else f"input with noise, sigma {sigma:g}"
    enlarged = resized(native, height, width, Image.Resampling.LANCZOS)
    row: list[tuple[str, Pixels]] = []
    for name, image in ((f"{given}, enlarged by Lanczos", enlarged), ("PiD, 4 steps", decoded)):
        decibels = f"{psnr(original, image):.2f} dB"
        sys.stdout.write(f"{name}: PSNR {decibels}, SSIM {ssim(original, image):.4f}\n")
        row.append((f"{name}: {decibels}", _piece(image)))
    return side_by_side([*row, ("original", _piece(original))])


def _piece(image: Pixels) -> Pixels:
    return image[PIECE].repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


def _commands(folder: Path, weights: Sequence[str]) -> list[Command]:
    """What a user would type."""
    bundle, engines = folder / "nano", folder / "nano-bf16"
    for old in (bundle, engines):
        shutil.rmtree(old, ignore_errors=True)
    export = ["--space", "nano", *weights, "--buckets", "preview=1024"]
    photo, pictures = str(folder / "photo.png"), str(folder / "pictures")
    sigmas = ",".join(f"{sigma:g}" for sigma in SIGMAS)
    commands: list[Command] = [
        ("pid-export", export_cli.main, [*export, "-o", str(bundle)]),
        (
            "pid-upscale",
            upscale_cli.main,
            [str(bundle), photo, "--sigma", sigmas, "--baseline", "--overwrite", "-o", pictures],
        ),
    ]
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        export += ["--precision", "bf16"]
        commands += [
            ("pid-export", export_cli.main, [*export, "-o", str(engines)]),
            ("pid-build", build_cli.main, [str(engines)]),
        ]
    return commands


if __name__ == "__main__":
    sys.exit(main())
