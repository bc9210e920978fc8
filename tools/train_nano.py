"""Trains the `nano` decoder that ships with pid-trt.

    python tools/train_nano.py --folder nano-training        # fetches, trains, resumes, exports
    python tools/train_nano.py --folder nano-training --minutes 5    # stops early; again: goes on

Everything follows from the seed and the number of iterations: a run that was stopped goes on as if
it had not been. Writes FOLDER/log.jsonl as it goes and FOLDER/nano.safetensors at the end, which is
what `pid_ref/nano/` ships. Uses a GPU if there is one.

How. The decoder is a student: at each of its times it meets its own earlier guess under new noise,
never the truth. So training decodes: a pool of crops moves along the sampler's times, one per
iteration, each with the guess the network just made, and every iteration learns from one time of
each crop. The loss is the mean logarithm of each image's squared error, which is PSNR.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano_photos import Pixels, draw_leaves, load_photos
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pid_ref.network import PidNet, patchify
from pid_ref.registry import NANO_CONFIG, NANO_STD
from pid_ref.sampler import timesteps
from pid_runtime.block_dct import encode
from pid_runtime.codec import from_uint8

EMPTY_CAPTION = (NANO_CONFIG.text_max_length, NANO_CONFIG.text_dim)
"""Shape of the zeros that stand for no caption; see `Decoder.empty_caption`."""

LATENT_PIXELS = NANO_CONFIG.size_multiple
"""Output pixels per latent pixel, along each axis."""

SHAPES = (
    ((6, 6), 8, 6),
    ((8, 8), 4, 3),
    ((12, 12), 2, 1),
    ((4, 20), 4, 1),
    ((20, 4), 4, 1),
    ((2, 40), 4, 1),
    ((40, 2), 4, 1),
    ((16, 16), 1, 1),
)
"""Latent height and width of a crop, how many of them in the pool, and how often it is trained."""

SCHEDULES = ((4, 0.8), (2, 0.12), (1, 0.08))
"""Steps of a decode, and their share among the crops."""

ITERATIONS = 5000
WARM_UP = 200
PEAK_RATE = 2e-4
EMA = 0.998
MAX_SIGMA = 0.8
CLEAN_SHARE = 0.5
"""Of the crops, how many have sigma 0."""

FIT_CROPS = 400
"""How many of 256 x 256 pixels the linear decoder is fitted to that training starts from."""


@dataclass
class Pool:
    """Crops of one shape on their way through the sampler's times."""

    image: Tensor
    """The truth, `[B, 3, H, W]` in [-1, 1]."""
    latent: Tensor
    """`[B, 16, h, w]` at noise level `sigma`."""
    sigma: Tensor
    """`[B]`."""
    guess: Tensor
    """What the network last made of it, `[B, 3, H, W]`."""
    steps: Tensor
    """`[B]`, steps of its decode."""
    step: Tensor
    """`[B]`, the next one to take; equal to `steps` when the crop is done."""


def main() -> int:
    """Train, or go on training; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the nano decoder.")
    parser.add_argument("--folder", type=Path, required=True, help="photographs, log, checkpoint")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--measure-std", action="store_true", help="print NANO_STD and stop")
    args = parser.parse_args()
    _keep_memory()
    photos = list(load_photos(args.folder / "photos", held_out=False).values())
    if args.measure_std:
        sys.stdout.write(f"{measure_std(photos)}\n")
        return 0
    pictures = in_sizes([*photos, *draw_leaves(8, 512, seed=0)])
    train(pictures, args.folder, args.iterations, args.seed, 60 * args.minutes)
    return 0


def _keep_memory() -> None:
    """Start again with a malloc that does not give large blocks back: half the time on a CPU."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if any(name not in os.environ for name in wanted):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


# Pictures


def in_sizes(pictures: Iterable[Pixels]) -> list[Pixels]:
    """Each picture in several sizes."""
    sizes: list[Pixels] = []
    for picture in pictures:
        for reduction in (1.0, 0.7, 0.5, 0.35):
            height, width = (round(side * reduction) for side in picture.shape[:2])
            if min(height, width) >= 8 * LATENT_PIXELS:
                image = Image.fromarray(picture)
                sizes.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    return sizes


def crop(rng: np.random.Generator, pictures: list[Pixels], height: int, width: int) -> Tensor:
    """A random piece `[3, height, width]` in [-1, 1], turned, mirrored and recoloured."""
    shares = np.sqrt([picture.shape[0] * picture.shape[1] for picture in pictures])
    picture = pictures[int(rng.choice(len(pictures), p=shares / shares.sum()))]
    if rng.random() < 0.5:
        picture = picture.transpose(1, 0, 2)
    below, right = max(0, height - picture.shape[0]), max(0, width - picture.shape[1])
    picture = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="symmetric")
    top = int(rng.integers(picture.shape[0] - height + 1))
    left = int(rng.integers(picture.shape[1] - width + 1))
    piece = picture[top : top + height, left : left + width].astype(np.float32) / 255
    piece = piece[:: int(rng.choice((1, -1))), :: int(rng.choice((1, -1)))]
    if rng.random() < 0.3:
        piece = piece[..., rng.permutation(3)]
    if rng.random() < 0.2:
        piece = 1 - piece
    gamma, gain = np.exp(rng.uniform(-0.25, 0.25)), rng.uniform(0.75, 1.0)
    piece = gain * piece**gamma + rng.uniform(0, 1 - gain)
    return torch.from_numpy(np.ascontiguousarray(piece.transpose(2, 0, 1))) * 2 - 1


def reduce(images: Tensor) -> NDArray[np.float32]:
    """The photographs an encoder would have been given: `[B, 3, H/4, W/4]`, in 8-bit steps."""
    small = F.interpolate(
        images, scale_factor=1 / NANO_CONFIG.scale, mode="bicubic", antialias=True
    )
    return np.asarray(((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1)


def measure_std(photos: Iterable[Pixels]) -> tuple[float, ...]:
    """Root mean square of every latent channel over whole photographs, to three digits."""
    squares: list[NDArray[np.float64]] = []
    for photo in photos:
        height, width = (side // LATENT_PIXELS * LATENT_PIXELS for side in photo.shape[:2])
        image = torch.from_numpy(from_uint8(photo[None, :height, :width]))
        latent = encode(reduce(image), np.ones(NANO_CONFIG.latent_channels))
        squares.append((latent.astype(np.float64) ** 2).mean((0, 2, 3)))
    return tuple(float(f"{value:.3g}") for value in np.sqrt(np.mean(squares, axis=0)))


# Training


def new_network(seed: int, pictures: list[Pixels]) -> PidNet:
    """A network that starts as the best linear decoder, at every time of the student.

    Learning that from nothing takes longer than all the rest, so it is put in:

    - The latent branch gathers 3x3 latent pixels, through units in pairs: silu(z) - silu(-z) = z.
      `fit` says which combinations of them predict a patch best. `pit_head` hands them to the
      tokens, and the pixel block's shift turns each into its picture.
    - The velocity is x / t - picture / t. One number of the token is 1 / t - 1, and gates multiply
      by it. In the pixel block's MLP, too, units come in pairs: gelu(z) - gelu(-z) = z.
    - The last layers are norms, which are no straight way for x or the picture; they become one
      when a constant that dwarfs both lies in another channel of each pixel.
    - Everything else starts at zero but for what feeds it.
    """
    torch.manual_seed(seed)
    net = PidNet(NANO_CONFIG)
    size, d, gain, constant = NANO_CONFIG.hidden_size, NANO_CONFIG.pixel_hidden_size, 64.0, 1024.0
    rms = constant / math.sqrt(d)
    taps, offset, patches = (torch.from_numpy(each) for each in fit(pictures, size - 1))
    (pixel_block,) = net.pixel_blocks
    zero = [net.s_embedder.proj, pixel_block.expand_from_attn, net.t_embedder.mlp[2]]
    zero += [pixel_block.adaLN_modulation[0], net.pixel_embedder.proj, net.final_layer.linear]
    for block in net.patch_blocks:
        zero += [block.attn.proj_x, block.mlp_x.w2]
    branch = net.lq_proj
    zero += [branch.pit_head, *branch.output_heads]
    zero += [branch.latent_proj[index].block[5] for index in range(3, len(branch.latent_proj))]
    with torch.no_grad():
        for layer in zero:
            for parameter in layer.parameters():
                parameter.zero_()
        channels = len(NANO_STD)
        first, second = branch.latent_proj[0], branch.latent_proj[2]
        first.weight[: 2 * channels] = 0
        first.bias[: 2 * channels] = 0
        second.weight[: size - 1] = 0
        for channel in range(channels):
            first.weight[2 * channel, channel, 1, 1] = 1
            first.weight[2 * channel + 1, channel, 1, 1] = -1
            second.weight[: size - 1, 2 * channel] = taps[:, channel]
            second.weight[: size - 1, 2 * channel + 1] = -taps[:, channel]
        second.bias[: size - 1] = offset
        branch.pit_head.weight[: size - 1, : size - 1] = torch.eye(size - 1)
        net.pit_lq_gate.content_proj.weight.zero_()
        net.pit_lq_gate.content_proj.bias.fill_(5.0)

        net.t_embedder.mlp[2].weight[-1] = time_features(net)

        modulation = pixel_block.adaLN_modulation[0]
        weight, bias = modulation.weight.view(-1, 6, d, size), modulation.bias.view(-1, 6, d)
        weight[:, 3, 3:6, : size - 1] = patches  # the MLP's shift: the picture
        bias[:, 2] = 4.0  # the attention's gate
        bias[:, 5, 3:] = 1.0  # the MLP's gate: 1 / t for the picture, 1 / t - 1 for x
        weight[:, 5, :6, -1] = 1.0
        net.pixel_embedder.proj.weight[:3] = gain * torch.eye(3)
        net.pixel_embedder.proj.bias[-1] = constant
        net.final_layer.linear.weight[:, :3] = rms / gain * torch.eye(3)
        net.final_layer.linear.weight[:, 3:6] = -rms / gain * torch.eye(3)
        mlp = pixel_block.mlp
        mlp.fc2.weight.mul_(0.1)
        for channel in range(6):
            pair = slice(2 * channel, 2 * channel + 2)
            unit = rms / gain if channel < 3 else 1.0
            mlp.fc1.weight[pair] = 0
            mlp.fc1.bias[pair] = 0
            mlp.fc1.weight[pair, channel] = unit * torch.tensor([1.0, -1.0])
            mlp.fc2.weight[:, pair] = 0
            mlp.fc2.weight[channel, pair] = gain * torch.tensor([1.0, -1.0])
    return net


def fit(
    pictures: list[Pixels], rank: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The best linear prediction of a patch from 3x3 latent pixels, through `rank` numbers.

    Returns how each number is made, `[rank, 16, 3, 3]` and `[rank]`, and the patch it stands for,
    `[P * P, 3, rank]`. Least squares over random clean crops, then the numbers that matter most.
    """
    rng = np.random.default_rng(1)
    rows: list[NDArray[np.float64]] = []
    targets: list[NDArray[np.float32]] = []
    for _ in range(FIT_CROPS):
        image = crop(rng, pictures, 8 * LATENT_PIXELS, 8 * LATENT_PIXELS)[None]
        latent = np.pad(encode(reduce(image), NANO_STD)[0], ((0, 0), (1, 1), (1, 1)), mode="edge")
        windows = sliding_window_view(latent, (3, 3), (1, 2))  # (C, h, w, 3, 3)
        windows = windows.transpose(1, 2, 0, 3, 4).reshape(64, -1)
        rows.append(np.concatenate([windows, np.ones((64, 1))], axis=1).astype(np.float64))
        targets.append(patchify(image, NANO_CONFIG.patch_size)[0].flatten(1).numpy())
    x, y = np.concatenate(rows), np.concatenate(targets)
    regular = 1e-3 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + regular, x.T @ y)
    predicted = x @ weights
    values, vectors = np.linalg.eigh(predicted.T @ predicted / len(x))
    spread, vectors = np.sqrt(values[-rank:]), vectors[:, -rank:]
    made = weights @ vectors / spread  # (145, rank), each number of unit size
    taps = made[:-1].T.reshape(rank, len(NANO_STD), 3, 3)
    patches = (vectors * spread).reshape(NANO_CONFIG.patch_pixels, 3, rank)
    return taps.astype(np.float32), made[-1].astype(np.float32), patches.astype(np.float32)


def time_features(net: PidNet) -> Tensor:
    """The timestep network's last row: silu of its output is 1 / t - 1 at the student's times."""
    times = sorted({t for steps, _ in SCHEDULES for t in timesteps(steps) if t > 0})
    embedder = net.t_embedder
    hidden: list[Tensor] = []
    hook = embedder.mlp[2].register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    embedder(1000 * torch.tensor(times))
    hook.remove()
    wanted = [_silu_inverse(1 / t - 1) for t in times]
    return torch.linalg.pinv(hidden[0]) @ torch.tensor(wanted)


def _silu_inverse(value: float) -> float:
    """The y >= 0 with y / (1 + exp(-y)) = value, by bisection."""
    low, high = 0.0, 2 * value + 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / (1 + math.exp(-middle)) < value else (low, middle)
    return low


def fill(
    pool: Pool | None,
    rng: np.random.Generator,
    pictures: list[Pixels],
    shape: tuple[int, int],
    count: int,
) -> Pool:
    """Put new crops where crops are done."""
    h, w = shape
    if pool is None:
        image = torch.zeros(count, 3, h * LATENT_PIXELS, w * LATENT_PIXELS)
        nothing = torch.zeros(count)
        pool = Pool(
            image,
            torch.zeros(count, NANO_CONFIG.latent_channels, h, w),
            nothing.clone(),
            image.clone(),
            nothing.long(),
            nothing.long(),
        )
    for index in torch.nonzero(pool.step >= pool.steps).flatten().tolist():
        image = crop(rng, pictures, h * LATENT_PIXELS, w * LATENT_PIXELS)
        sigma = 0.0 if rng.random() < CLEAN_SHARE else rng.uniform(0, MAX_SIGMA)
        latent = encode(reduce(image[None]), NANO_STD)[0]
        noisy = (1 - sigma) * latent + sigma * rng.standard_normal(latent.shape)
        steps, shares = zip(*SCHEDULES, strict=True)
        pool.image[index] = image
        pool.latent[index] = torch.from_numpy(noisy)
        pool.sigma[index] = sigma
        pool.guess[index] = 0
        pool.steps[index] = int(rng.choice(steps, p=shares))
        pool.step[index] = 0
    return pool


def loss_of(net: PidNet, pool: Pool, noise: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move every crop of a pool one step on; returns the loss and each image's squared error."""
    times = {steps: timesteps(steps) for steps, _ in SCHEDULES}
    pairs = zip(pool.steps.tolist(), pool.step.tolist(), strict=True)
    t = torch.tensor([times[steps][step] for steps, step in pairs])
    at = t[:, None, None, None]
    first = (pool.step == 0)[:, None, None, None]
    x = torch.where(first, noise, (1 - at) * pool.guess + at * noise)
    caption = torch.zeros(len(t), *EMPTY_CAPTION, device=device)
    x, at = x.to(device), at.to(device)
    v = net(x, 1000 * t.to(device), caption, pool.latent.to(device), pool.sigma.to(device))
    clean = x - at * v
    error = (clean - pool.image.to(device)).square().mean((1, 2, 3))
    pool.guess = clean.detach().cpu()
    pool.step += 1
    return (error + 1e-4).log().mean(), error.detach().cpu()


def rate(iteration: int, iterations: int) -> float:
    """Warm-up, then a cosine down to nothing."""
    warm = min(1.0, (iteration + 1) / WARM_UP)
    return PEAK_RATE * warm * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def train(pictures: list[Pixels], folder: Path, iterations: int, seed: int, seconds: float) -> None:
    """Train to the end, or for so many seconds, from where the folder's checkpoint stands."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    resumes = checkpoint.exists()
    net = (PidNet(NANO_CONFIG) if resumes else new_network(seed, pictures)).to(device)
    average = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    pools: dict[tuple[int, int], Pool] = {}
    start, spent = 0, 0.0
    if resumes:
        saved = torch.load(checkpoint, weights_only=True)
        start, spent = saved["iteration"], saved["seconds"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average = {name: value.to(device) for name, value in saved["average"].items()}
        pools = {shape: Pool(**pool) for shape, pool in saved["pools"].items()}
    shapes, shares = [each[:2] for each in SHAPES], np.array([each[2] for each in SHAPES])
    begin = time.monotonic()
    errors: dict[str, list[float]] = {}
    for iteration in range(start, iterations):
        rng = np.random.default_rng((seed, iteration))
        shape, count = shapes[int(rng.choice(len(shapes), p=shares / shares.sum()))]
        pool = pools[shape] = fill(pools.get(shape), rng, pictures, shape, count)
        noise = torch.from_numpy(rng.standard_normal(pool.image.shape, np.float32))
        labels = [
            f"{steps}/{step + 1}" + ("" if sigma == 0 else " noisy")
            for steps, step, sigma in zip(
                pool.steps.tolist(), pool.step.tolist(), pool.sigma.tolist(), strict=True
            )
        ]
        for group in optimizer.param_groups:
            group["lr"] = rate(iteration, iterations)
        loss, error = loss_of(net, pool, noise, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (iteration + 1) / (iteration + 10))
        for name, value in net.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        for label, value in zip(labels, error.tolist(), strict=True):
            errors.setdefault(label, []).append(10 * math.log10(4 / (value + 1e-12)))
        elapsed = time.monotonic() - begin
        done = iteration + 1 == iterations or elapsed > seconds
        if (iteration + 1) % 50 == 0 or done:
            psnr = {label: round(float(np.mean(of)), 2) for label, of in sorted(errors.items())}
            entry = {"iteration": iteration + 1, "seconds": round(spent + elapsed, 1), "psnr": psnr}
            errors.clear()
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            sys.stderr.write(f"{json.dumps(entry)}\n")
        if (iteration + 1) % 250 == 0 or done:
            _save(
                checkpoint,
                {
                    "iteration": iteration + 1,
                    "seconds": spent + elapsed,
                    "net": net.state_dict(),
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                    "pools": {shape: vars(pool) for shape, pool in pools.items()},
                },
            )
            export(average, folder / "nano.safetensors")
        if done:
            break


def _save(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".part")
    torch.save(dict(content), aside)
    aside.replace(path)


def export(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the averaged weights as bfloat16 safetensors."""
    tensors = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(tensors, path)


if __name__ == "__main__":
    sys.exit(main())
