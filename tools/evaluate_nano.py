"""Judges a `nano` decoder on the photographs it was not trained on, with the reference in PyTorch.

    python tools/evaluate_nano.py --folder nano-training -o nano.json --sheet photos.jpg

Every photograph is cut to multiples of 32 pixels and reduced 4x (Pillow, bicubic); that is what is
encoded. Decoding must give the photograph back. The rivals are what the native decoder makes of the
same latent, noisy or not, enlarged 4x by Pillow's bicubic and Lanczos filters; without noise that
is the reduced photograph itself. PSNR and SSIM over RGB, 8 bits; grid as of `quality.grid`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano_photos import Pixels, load_photos
from numpy.typing import NDArray
from PIL import Image
from quality import grid, psnr, resized, ssim

from pid_bench.hardware import cpu_name
from pid_ref.checkpoint import read_checkpoint
from pid_ref.network import PidNet
from pid_ref.registry import NANO, NANO_CONFIG, NANO_STD
from pid_ref.sampler import sample
from pid_runtime.bundle.files import file_sha256
from pid_runtime.command.images import save_image, side_by_side, to_uint8
from pid_runtime.decoder import Decoder
from pid_runtime.nano.block_dct import decode, encode
from pid_runtime.nano.codec import from_uint8
from pid_runtime.noise import image_noise

SCALE, MULTIPLE, PATCH = NANO_CONFIG.scale, NANO_CONFIG.size_multiple, NANO_CONFIG.patch_size
SIGMAS = (0.0, 0.2, 0.4, 0.6)
STEPS = (1, 2, 4)
RIVALS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
SHOWN_SIGMAS = (0.0, 0.4)
"""Of the sheet, which has the decode in most steps only."""


def main() -> int:
    """Print what was found, photograph by photograph; returns the exit code."""
    parser = argparse.ArgumentParser(description="Judge a nano decoder.")
    parser.add_argument("--folder", type=Path, required=True, help="where the photographs are kept")
    parser.add_argument("--weights", type=Path, default=NANO.file)
    parser.add_argument(
        "--bundle", type=Path, help="judge this bundle, by torch, instead of the reference"
    )
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("-o", "--output", type=Path, help="also write a JSON file")
    parser.add_argument("--sheet", type=Path, help="also write pieces of all images, side by side")
    args = parser.parse_args()
    decode_one = _reference(args.weights) if args.bundle is None else _bundle(args.bundle)
    rows: list[dict[str, Any]] = []
    sheet: list[Pixels] = []
    for name, photo in load_photos(args.folder / "photos", held_out=True).items():
        for sigma in args.sigmas:
            images = decodes(decode_one, photo, sigma, args.steps)
            original = images.pop("original")
            for label, image in images.items():
                found = {"psnr_db": psnr(original, image), "ssim": ssim(original, image)}
                found |= {f"grid_{side}": grid(image, side) for side in (PATCH, MULTIPLE)}
                rounded = {what: round(value, 4) for what, value in found.items()}
                row = {"photo": name, "sigma": sigma, "decoder": label, **rounded}
                rows.append(row)
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
            if sigma in SHOWN_SIGMAS:
                best = list(images)[-1]
                shown = {"Lanczos": images["Lanczos"], best: images[best], "original": original}
                tiles = [
                    (f"{label}, sigma {sigma:g}", middle(image)) for label, image in shown.items()
                ]
                sheet.append(side_by_side(tiles))
    if args.sheet:
        save_image(args.sheet, np.concatenate(sheet))
    if args.output:
        names = ("torch", "numpy", "pillow", "scikit-image")
        record = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": cpu_name(),
            "versions": {name: version(name) for name in names},
            "bundle": str(args.bundle) if args.bundle else None,
            "weights_sha256": file_sha256(args.weights),
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


Decode = Callable[[NDArray[np.float32], float, list[NDArray[np.float32]]], NDArray[np.float32]]
"""An image `[1, 3, H, W]` of a latent, its noise level, and as much noise as there are steps."""


def _reference(weights: Path) -> Decode:
    net = PidNet(NANO_CONFIG).eval()
    net.load_state_dict(dict(read_checkpoint(weights, NANO_CONFIG)))
    caption = torch.zeros(1, NANO_CONFIG.text_max_length, NANO_CONFIG.text_dim)

    def one(
        latent: NDArray[np.float32], sigma: float, noise: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        first, *others = map(torch.from_numpy, noise)
        at = torch.tensor([sigma])
        return sample(
            net, torch.from_numpy(latent), caption, at, first, others, steps=len(noise)
        ).numpy()

    return one


def _bundle(path: Path) -> Decode:
    decoder = Decoder.open(path, "torch")

    def one(
        latent: NDArray[np.float32], sigma: float, noise: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        first, *others = noise
        return decoder.decode(latent, sigma=sigma, noise=first, step_noise=others, steps=len(noise))

    return one


def decodes(decode_one: Decode, photo: Pixels, sigma: float, steps: list[int]) -> dict[str, Pixels]:
    """What the native decoder and the network make of a photograph's latent at one noise level."""
    height, width = (side // MULTIPLE * MULTIPLE for side in photo.shape[:2])
    photo = photo[:height, :width]
    small = resized(photo, height // SCALE, width // SCALE)
    latent = encode(from_uint8(small)[None], NANO_STD)
    noise = np.random.default_rng(0).standard_normal(latent.shape)
    latent = np.asarray((1 - sigma) * latent + sigma * noise, np.float32)
    native = to_uint8(decode(latent, NANO_STD))[0]
    images = {"original": photo}
    for label, by in RIVALS.items():
        images[label] = resized(native, height, width, by)
    for count in steps:
        draws = [image_noise(0, k, height, width, PATCH)[None] for k in range(count)]
        image = decode_one(latent, sigma, draws)
        images[f"PiD, {count} step{'s' * (count > 1)}"] = to_uint8(image)[0]
    return images


def middle(image: Pixels) -> Pixels:
    """The 256 x 256 pixels in the middle of an image."""
    top, left = ((side - 256) // 2 for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + 256, left : left + 256])


if __name__ == "__main__":
    sys.exit(main())
