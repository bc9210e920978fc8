"""The main job on a photograph, as `make demo` runs it: export, build engines, decode, compare.

A photograph that the `nano` decoder was not trained on is reduced to a quarter of its size, made
into a latent and decoded on the CPU to its full size again. Leaves everything in demo/; sheet.png
shows what came of it beside what went in.
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
from pid_runtime.command.images import save_image, side_by_side, to_uint8
from pid_runtime.decoder import Decoder

Pixels = NDArray[np.uint8]
Command = tuple[str, Callable[[Sequence[str]], int], list[str]]

SCALE = 4


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
    decoded = np.asarray(Image.open(folder / "image.png"))
    native = resized(_native(folder / "nano", photo), *original.shape[:2])
    save_image(folder / "sheet.png", _sheet(photo, native, decoded, original))
    for name, image in (("native + bicubic", native), ("PiD, 4 steps", decoded)):
        sys.stdout.write(
            f"{name}: PSNR {psnr(original, image):.2f} dB, SSIM {ssim(original, image):.4f}\n"
        )
    sys.stdout.write(f"{folder / 'sheet.png'}: all of them side by side\n")
    return 0


def _commands(folder: Path, weights: Sequence[str]) -> list[Command]:
    """What a user would type."""
    bundle, engines = folder / "nano", folder / "nano-bf16"
    for old in (bundle, engines):
        shutil.rmtree(old, ignore_errors=True)
    export = ["--space", "nano", *weights, "--buckets", "preview=1024"]
    photo, image = str(folder / "photo.png"), str(folder / "image.png")
    commands: list[Command] = [
        ("pid-export", export_cli.main, [*export, "-o", str(bundle)]),
        (
            "pid-upscale",
            upscale_cli.main,
            [str(bundle), photo, "--overwrite", "-o", image],
        ),
    ]
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        export += ["--precision", "bf16"]
        commands += [
            ("pid-export", export_cli.main, [*export, "-o", str(engines)]),
            ("pid-build", build_cli.main, [str(engines)]),
        ]
    return commands


def _native(bundle: Path, photo: Pixels) -> Pixels:
    """What the latent shows without PiD, at the photograph's size."""
    with Decoder.open(bundle, verify=False) as pid:
        return to_uint8(pid.native_decode(pid.encode(photo[None])))[0]


def _sheet(photo: Pixels, native: Pixels, decoded: Pixels, original: Pixels) -> Pixels:
    height, width = photo.shape[:2]
    large = photo.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return side_by_side(
        [
            (f"input, {width}x{height}", large),
            (f"native decoder + bicubic, {psnr(original, native):.2f} dB", native),
            (f"PiD, 4 steps, {psnr(original, decoded):.2f} dB", decoded),
            (f"original, {original.shape[1]}x{original.shape[0]}", original),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
