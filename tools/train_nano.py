"""Trains the `nano` decoder that ships with pid-trt.

    python tools/train_nano.py --folder nano-training        # fetches, trains, resumes, exports
    python tools/train_nano.py --folder nano-training --minutes 5    # stops early; again: goes on

Everything follows from the seed and the number of iterations: a run that was stopped goes on as if
it had not been. Writes FOLDER/log.jsonl as it goes and FOLDER/nano.safetensors at the end, which is
what `pid_ref/nano/` ships. Uses a GPU if there is one.

How. First a sketch learns, a small network on pixels (tools/nano_sketch.py). The network starts as
that sketch, and decodes it at every time of the sampler: whatever the noise, what it decodes is a
linear picture of the patch half's output (`new_network`). So the patch half and those pictures are
what is trained, and the pixel half never has to run: what is compared with the truth is the
picture. The loss is the squared error, as a share of what is left at that level of noise. At the
end that of the steps from one token to the next is added, or the grid of tokens would be seen, and
black and white may lie beyond what can be shown.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano_crops import LATENT_PIXELS, crops_file, in_sizes, latent_of, reduce
from nano_photos import Pixels, draw_leaves, load_photos
from nano_sketch import Sketch, follow, images_of, place, share_of_rate, train_sketch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pid_ref.network import PidNet, unpatchify
from pid_ref.registry import NANO_CONFIG, NANO_STD
from pid_ref.sampler import timesteps
from pid_runtime.bundle.files import whole_file
from pid_runtime.nano.codec import from_uint8

EMPTY_CAPTION = (NANO_CONFIG.text_max_length, NANO_CONFIG.text_dim)
"""Shape of the zeros that stand for no caption; see `Decoder.empty_caption`."""

CROPS = ((8, 16000, 8), (14, 4000, 3))
"""Side of the crops in latent pixels, how many there are, and how many are learnt from at once."""

STEPS = (1, 2, 4)
"""Of the sampler: its times in so many steps are those the network knows."""


@dataclass(frozen=True)
class Stage:
    """A part of the training; it begins with the average weights of the one before."""

    iterations: int
    peak_rate: float
    borders: float
    """What the squared error of the steps across the borders of tokens counts for, beside that of
    all pixels.
    """
    beyond: float
    """How far beyond black and white what is as good as these is to lie, at least. Images are
    clipped, so nobody sees how far, nor what 16-bit numbers round there. 0: it lies where it does.
    """


STAGES = (Stage(3200, 5e-4, 0, 0), Stage(1000, 2e-4, 2, 0.015))
ITERATIONS = sum(stage.iterations for stage in STAGES)
EMA = 0.999
MAX_SIGMA = 0.8
CLEAN_SHARE = 0.6
"""Of the crops, how many have sigma 0."""
EXTREME = 1 - 2.5 / 127.5
"""What lies beyond is as good as black or white."""
CLEAN_ERROR, NOISE_ERROR = 0.01, 0.08
"""About the squared error that is left at sigma 0, and what each unit of sigma adds."""

SKETCH_ITERATIONS = 3200
FIT_CROPS = 100
"""About how many crops tell which features of the sketch matter most."""


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
    pictures = in_sizes([*photos, *draw_leaves(64, 512, seed=0)])
    train(pictures, args.folder, args.iterations, args.seed, 60 * args.minutes)
    return 0


def _keep_memory() -> None:
    """Start again with a malloc that does not give large blocks back: half the time on a CPU."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if any(name not in os.environ for name in wanted):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def measure_std(photos: Iterable[Pixels]) -> tuple[float, ...]:
    """Root mean square of every coefficient over whole photographs, to three digits."""
    squares: list[NDArray[np.float64]] = []
    for photo in photos:
        height, width = (side // LATENT_PIXELS * LATENT_PIXELS for side in photo.shape[:2])
        image = torch.from_numpy(from_uint8(photo[None, :height, :width]))
        latent = latent_of(image).astype(np.float64)
        squares.append((latent.reshape(len(NANO_STD), -1) ** 2).mean(1) * np.square(NANO_STD))
    return tuple(float(f"{value:.3g}") for value in np.sqrt(np.mean(squares, axis=0)))


# Training


def new_network(seed: int, sketch: Sketch, crops: NDArray[np.uint8]) -> PidNet:
    """A network that starts as a sketch, at every time of the student.

    Learning that from nothing takes longer than all the rest, so it is put in:

    - `place` writes the sketch into the latent branch and `pit_head`, which hands its numbers to
      the tokens. The pixel block's shift turns each into its picture. The gate in front of the
      tokens closes where there is noise: what then comes through the patch blocks is to be learnt.
    - The velocity is x / t - picture / t. One number of the token is 1 / t - 1, and gates multiply
      by it. In the pixel block's MLP, too, units come in pairs: gelu(z) - gelu(-z) = z.
    - The last layers are norms, which are no straight way for x or the picture; they become one
      when a constant that dwarfs both lies in another channel of each pixel.
    - Everything else starts at zero but for what feeds it.
    """
    torch.manual_seed(seed)
    net = _untyped(PidNet(NANO_CONFIG))
    size, d, gain, constant = NANO_CONFIG.hidden_size, NANO_CONFIG.pixel_hidden_size, 256.0, 16384.0
    rms = constant / math.sqrt(d)
    (pixel_block,) = net.pixel_blocks
    zero = [net.s_embedder.proj, pixel_block.expand_from_attn, net.t_embedder.mlp[2]]
    zero += [pixel_block.adaLN_modulation[0], net.pixel_embedder.proj, net.final_layer.linear]
    branch = net.lq_proj
    zero += token_layers(net)
    with torch.no_grad():
        for layer in zero:
            for parameter in layer.parameters():
                parameter.zero_()
        few = images_of(crops[:: max(1, len(crops) // FIT_CROPS)])
        patches, none = place(sketch, torch.from_numpy(reduce(few)), net)
        net.pit_lq_gate.content_proj.weight.zero_()
        net.pit_lq_gate.content_proj.bias.fill_(5.0)
        net.pit_lq_gate.log_alpha.fill_(math.log(20))
        for gate in branch.gate_modules:
            gate.content_proj.weight.zero_()
            gate.content_proj.bias.fill_(2.0)
            gate.log_alpha.fill_(math.log(0.5))
        branch.pit_head.weight.div_(torch.sigmoid(torch.tensor(5.0)))

        modulation = pixel_block.adaLN_modulation[0]
        weight, bias = modulation.weight.view(-1, 6, d, size), modulation.bias.view(-1, 6, d)
        weight[:, 3, 3:6, : size - 1] = patches  # the MLP's shift: the picture
        bias[:, 3, 3:6] = none
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
    tell_time(net)
    return net


def _untyped(net: PidNet) -> Any:
    """The network: torch's lists of modules do not say which modules they hold."""
    return net


@torch.no_grad()
def tell_time(net: PidNet) -> None:
    """Let the patch half be at every time what it is at t = 1, but for the number 1 / t - 1.

    Training knows t = 1 only, and what it makes of other times is not meant.
    """
    parts = _untyped(net)
    embedder, modulation = parts.t_embedder, parts.pixel_blocks[0].adaLN_modulation[0]
    constant = embedder(torch.tensor([1000.0]))[0]
    constant[-1] = 0
    embedder.mlp[2].weight.zero_()
    embedder.mlp[2].weight[-1] = time_features(net)
    embedder.mlp[2].bias.copy_(constant)
    parts.s_embedder.proj.bias[-1] = 0
    for block in parts.patch_blocks:
        block.adaLN_modulation_img[0].weight[:, -1] = 0
        block.adaLN_modulation_txt[0].weight[:, -1] = 0
    modulation.weight.view(NANO_CONFIG.patch_pixels, 6, -1, NANO_CONFIG.hidden_size)[
        :, 3, 3:6, -1
    ] = 0


def token_layers(net: PidNet) -> list[nn.Linear]:
    """The layers whose outputs are added up to a token's condition."""
    parts = _untyped(net)
    layers: list[nn.Linear] = [parts.lq_proj.pit_head, *parts.lq_proj.output_heads]
    for block in parts.patch_blocks:
        layers += [block.attn.proj_x, block.mlp_x.w2]
    return layers


def keep_time(net: PidNet) -> None:
    """Leave the token's number 1 / t - 1 alone while the network learns."""
    kept = torch.ones(NANO_CONFIG.hidden_size)
    kept[-1] = 0
    for layer in token_layers(net):
        for parameter in layer.parameters():
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            mask = kept.to(parameter.device).view(shape)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def picture_of(net: PidNet, latent: Tensor, sigma: Tensor) -> Tensor:
    """What a network whose pixel half is still that of `new_network` decodes: `[B, 3, H, W]`."""
    batch, _, h, w = latent.shape
    height, width = h * LATENT_PIXELS, w * LATENT_PIXELS
    nothing = latent.new_zeros(1).expand(batch, 3, height, width)
    caption = latent.new_zeros(batch, *EMPTY_CAPTION)
    with torch.autocast(latent.device.type, torch.bfloat16, enabled=net.training):
        s = net.condition(nothing, torch.full_like(sigma, 1000.0), caption, latent, sigma)
    modulation = _untyped(net).pixel_blocks[0].adaLN_modulation[0]
    pixels, size = NANO_CONFIG.patch_pixels, NANO_CONFIG.hidden_size
    weight = modulation.weight.view(pixels, 6, -1, size)[:, 3, 3:6]
    bias = modulation.bias.view(pixels, 6, -1)[:, 3, 3:6]
    found = F.linear(s.float(), weight.reshape(-1, size), bias.flatten())
    picture = found.unflatten(-1, (pixels, 3))
    return unpatchify(picture, height, width, NANO_CONFIG.patch_size)


def time_features(net: PidNet) -> Tensor:
    """The timestep network's last row: silu of its output is 1 / t - 1 at the student's times."""
    times = sorted({t for steps in STEPS for t in timesteps(steps) if t > 0})
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


def noisy(rng: np.random.Generator, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of images `[B, 3, H, W]`, with noise or without, and their noise levels `[B]`."""
    latents = latent_of(images)
    clean = rng.random(len(latents)) < CLEAN_SHARE
    sigma = np.where(clean, 0, rng.uniform(0, MAX_SIGMA, len(latents))).astype(np.float32)
    at = sigma[:, None, None, None]
    noise = rng.standard_normal(latents.shape, np.float32)
    return torch.from_numpy((1 - at) * latents + at * noise), torch.from_numpy(sigma)


def error_of(found: Tensor, image: Tensor, beyond: float) -> Tensor:
    """What a picture `[B, 3, H, W]` lacks of an image in [-1, 1]. beyond: as of `Stage`."""
    if not beyond:
        return found - image
    is_extreme = image.abs() > EXTREME
    error = found - torch.where(is_extreme, image.sign() * (1 + beyond), image)
    return error.masked_fill(is_extreme & (error * image > 0), 0)


def border_error(error: Tensor) -> Tensor:
    """Mean square of the step between neighbours of two tokens, `[B]`, of errors `[B, 3, H, W]`."""
    size = NANO_CONFIG.patch_size
    squares: list[Tensor] = []
    for axis in (2, 3):
        first = torch.arange(size, error.shape[axis], size, device=error.device)
        step = error.index_select(axis, first) - error.index_select(axis, first - 1)
        squares.append(step.square().mean((1, 2, 3)))
    return (squares[0] + squares[1]) / 2


def loss_of(error: Tensor, sigma: Tensor) -> Tensor:
    """Mean over images of the squared error `[B]`, as a share of what is left at such noise."""
    return (error / (CLEAN_ERROR + NOISE_ERROR * sigma.to(error.device))).mean()


def learn(
    net: PidNet,
    rng: np.random.Generator,
    crops: Sequence[NDArray[np.uint8]],
    device: torch.device,
    stage: Stage,
) -> tuple[Tensor, dict[str, list[float]]]:
    """Loss of a few crops, and their squared errors by kind of latent."""
    which = int(rng.integers(len(crops)))
    ids = np.sort(rng.choice(len(crops[which]), CROPS[which][2], replace=False))
    image = images_of(crops[which][ids])
    latent, sigma = noisy(rng, image)
    found = picture_of(net, latent.to(device), sigma.to(device))
    difference = error_of(found, image.to(device), stage.beyond)
    error = difference.square().mean((1, 2, 3))
    errors: dict[str, list[float]] = {}
    for level, value in zip(sigma.tolist(), error.tolist(), strict=True):
        errors.setdefault("clean" if level == 0 else "noisy", []).append(value)
    return loss_of(error + stage.borders * border_error(difference), sigma), errors


def parameters(net: PidNet) -> list[dict[str, Any]]:
    """What the sketch has taught learns at a quarter of the rate."""
    parts = _untyped(net)
    fresh = nn.ModuleList([parts.patch_blocks, parts.lq_proj.output_heads])
    new = {id(each) for each in fresh.parameters()}
    taught = [each for each in net.parameters() if id(each) not in new]
    return [
        {"params": list(fresh.parameters()), "share": 1.0},
        {"params": taught, "share": 0.25},
    ]


def train(pictures: list[Pixels], folder: Path, iterations: int, seed: int, seconds: float) -> None:
    """Train to the end, or for so many seconds, from where the folder's checkpoint stands."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    resumes = checkpoint.exists()
    crops = [
        np.load(crops_file(folder, pictures, seed, side, count), mmap_mode="r")
        for side, count, _ in CROPS
    ]
    net = PidNet(NANO_CONFIG)
    if not resumes:
        net = new_network(seed, _sketch(folder, crops[0], seed), crops[0])
    net = net.to(device)
    keep_time(net)
    average, optimizer = _begin(net)
    start, spent = 0, 0.0
    if resumes:
        saved = torch.load(checkpoint, weights_only=True)
        start, spent = saved["iteration"], saved["seconds"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average = {name: value.to(device) for name, value in saved["average"].items()}
    errors: dict[str, list[float]] = {}
    for iteration in range(start, iterations):
        stage, first = stage_of(iteration)
        if iteration == first > 0:
            net.load_state_dict(load_file(folder / "nano.safetensors"))
            average, optimizer = _begin(net)
        rng = np.random.default_rng((seed, iteration))
        share = share_of_rate(iteration - first, stage.iterations)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * stage.peak_rate * share
        loss, found = learn(net, rng, crops, device, stage)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        follow(average, net, iteration - first, EMA)
        for label, values in found.items():
            errors.setdefault(label, []).extend(values)
        elapsed = time.monotonic() - begin
        done = iteration + 1 == iterations or elapsed > seconds
        ends_stage = iteration + 1 == first + stage.iterations
        if (iteration + 1) % 100 == 0 or done:
            psnr = {
                label: round(float(np.mean(10 * np.log10(4 / (np.array(of) + 1e-12)))), 2)
                for label, of in sorted(errors.items())
            }
            entry = {"iteration": iteration + 1, "seconds": round(spent + elapsed, 1), "psnr": psnr}
            errors.clear()
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            sys.stderr.write(f"{json.dumps(entry)}\n")
        if (iteration + 1) % 500 == 0 or done or ends_stage:
            _save(
                checkpoint,
                {
                    "iteration": iteration + 1,
                    "seconds": spent + elapsed,
                    "net": net.state_dict(),
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                },
            )
            export(average, folder / "nano.safetensors")
        if done:
            break


def stage_of(iteration: int) -> tuple[Stage, int]:
    """The stage of an iteration, and its own first one."""
    first = 0
    for stage in STAGES:
        if iteration < first + stage.iterations:
            return stage, first
        first += stage.iterations
    raise ValueError(f"expected an iteration below {first}, but got {iteration}")


def _begin(net: PidNet) -> tuple[dict[str, Tensor], torch.optim.AdamW]:
    """What training keeps beside the weights: their average, and the optimizer."""
    average = {name: value.clone() for name, value in net.state_dict().items()}
    return average, torch.optim.AdamW(parameters(net), betas=(0.9, 0.98), weight_decay=0)


def _sketch(folder: Path, crops: NDArray[np.uint8], seed: int) -> Sketch:
    """The sketch that training starts from; learnt unless it is there."""
    file = folder / "sketch.pt"
    is_there = file.exists()
    sketch = train_sketch(crops, seed, 0 if is_there else SKETCH_ITERATIONS)
    if is_there:
        sketch.load_state_dict(torch.load(file, weights_only=True))
    else:
        _save(file, sketch.state_dict())
    return sketch


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as aside:
        torch.save(dict(content), aside)


def export(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the averaged weights as bfloat16 safetensors."""
    net = PidNet(NANO_CONFIG)
    net.load_state_dict(state)
    tell_time(net)
    weights = net.state_dict().items()
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in weights}, path)


if __name__ == "__main__":
    sys.exit(main())
