"""Where the training of `nano` starts: a small network on pixels, written into the large one.

A token of `nano` holds 4x4 pixels of the small photograph. The convolutions of its latent branch
mix whole tokens, so each pixel of a token has weights of its own, and learns on its own. The sketch
has the same convolutions and residual blocks, but on pixels: one set of weights for all. It learns
in minutes what the large network would take hours for. `place` then writes it into the latent
branch.

The branch's blocks begin with norms over a quarter of the channels each, over the whole picture.
They would give the faint texture of one picture the strength of another's, so in the
branch a constant in each quarter, which dwarfs the rest, fixes what they divide by, and the sketch
subtracts means only. A token's quarter is three features of its 16 pixels, then that constant.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano_crops import reduce
from numpy.typing import NDArray
from torch import Tensor, nn

from pid_ref.registry import NANO_CONFIG, NANO_STD
from pid_runtime.nano import block_dct

BLOCK, SCALE = block_dct.BLOCK, NANO_CONFIG.scale
PIXELS = BLOCK**2
"""Of a token, in the small photograph."""
GROUPS = 4
"""Of channels that are normed together."""
GROUP = NANO_CONFIG.latent_hidden // GROUPS
FEATURES = GROUPS * (GROUP // PIXELS)
"""Of a pixel."""
CHANNELS = torch.arange(NANO_CONFIG.latent_hidden).unflatten(0, (GROUPS, GROUP))
OWN = CHANNELS[:, : FEATURES // GROUPS * PIXELS].flatten()
"""Channels of the features, feature by feature and pixel by pixel."""
CONSTANTS = CHANNELS[:, -1]
CONSTANT = 256.0
FIT_CROPS = 200
"""About how many crops those predictions are fitted to."""
PEAK_RATE, WARM_UP, BATCH, EMA = 4e-3, 200, 16, 0.998


class TokenConv(nn.Module):
    """A convolution of pixels whose border is that of a convolution of tokens.

    Outside the picture lies a copy of the token at its edge, so the pixel beyond an edge is the
    first or last of that token.
    """

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv: Any = nn.Conv2d(inputs, outputs, size)
        self.reach = size // 2

    def forward(self, x: Tensor) -> Tensor:
        reach = self.reach
        for axis in (2, 3):
            first = x.narrow(axis, BLOCK - reach, reach)
            last = x.narrow(axis, x.shape[axis] - BLOCK, reach)
            x = torch.cat([first, x, last], dim=axis)
        return self.conv(x)


class Residual(nn.Module):
    """As the latent branch's residual block, of whose norms the means are left."""

    def __init__(self) -> None:
        super().__init__()
        self.convs: Any = nn.ModuleList(TokenConv(FEATURES, FEATURES, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.silu(_centred(y)))
        return x + y


def _centred(x: Tensor) -> Tensor:
    """What a norm leaves of `[B, FEATURES, H, W]` where a constant is the `GROUP`th of a group."""
    mean = x.unflatten(1, (GROUPS, -1)).mean((2, 3, 4)).repeat_interleave(FEATURES // GROUPS, 1)
    return x - (GROUP - 1) / GROUP * mean[..., None, None]


class Sketch(nn.Module):
    """Small photographs `[B, 3, H, W]` in [-1, 1] to pictures `[B, 3, 4 H, 4 W]`.

    Starts near the best linear prediction of a pixel's 4x4 from the 5x5 around it, through
    `FEATURES` numbers: silu(z) - silu(-z) = z.
    """

    def __init__(self, small: Tensor, images: Tensor) -> None:
        super().__init__()
        self.first = TokenConv(3, FEATURES, 3)
        self.second = TokenConv(FEATURES, FEATURES, 5)
        count = NANO_CONFIG.latent_res_blocks
        self.blocks: Any = nn.ModuleList(Residual() for _ in range(count))
        self.out: Any = nn.Conv2d(FEATURES, 3 * SCALE**2, 1)
        taps, offset, patches = _linear(small, images)
        with torch.no_grad():
            first, second = self.first.conv, self.second.conv
            first.weight[:6] = 0
            first.bias[:6] = 0
            for colour in range(3):
                for unit, sign in ((2 * colour, 1.0), (2 * colour + 1, -1.0)):
                    first.weight[unit, colour, 1, 1] = sign
                    second.weight[:, unit] = sign * taps[:, colour]
            second.bias.copy_(offset)
            self.out.weight[:, :, 0, 0] = patches
            self.out.bias.zero_()
            for block in self.blocks:
                block.convs[1].conv.weight.mul_(0.1)
                block.convs[1].conv.bias.zero_()

    def features(self, small: Tensor) -> Tensor:
        """`[B, FEATURES, H, W]`: what each pixel's part of the picture is a linear image of."""
        x = self.second(F.silu(self.first(small)))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, small: Tensor) -> Tensor:
        return F.pixel_shuffle(self.out(self.features(small)), SCALE)


def _linear(small: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares through the numbers that matter most.

    Returns how they are made, `[FEATURES, 3, 5, 5]` and `[FEATURES]`, and the part of the picture
    that each stands for, `[48, FEATURES]` in the order of `F.pixel_shuffle`.
    """
    windows = F.unfold(F.pad(small, (2, 2, 2, 2), mode="replicate"), 5)
    x = windows.transpose(1, 2).flatten(0, 1).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    y = F.pixel_unshuffle(images, SCALE).flatten(2).transpose(1, 2).flatten(0, 1).double()
    moments = x.T @ x + 1e-5 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(moments, x.T @ y)
    root = torch.linalg.cholesky(moments).T / math.sqrt(len(x))
    _, spread, vectors = torch.linalg.svd(root @ weights, full_matrices=False)
    spread, vectors = spread[:FEATURES], vectors[:FEATURES].T
    made = weights @ vectors / spread  # each number of unit size
    taps = made[:-1].T.reshape(FEATURES, 3, 5, 5)
    return taps.float(), made[-1].float(), (vectors * spread).float()


def train_sketch(crops: NDArray[np.uint8], seed: int, iterations: int) -> Sketch:
    """A sketch that learnt from crops `[N, 3, H, W]`, uint8; the average of its late weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 0))
    images = images_of(crops[:: max(1, len(crops) // FIT_CROPS)])
    sketch = Sketch(torch.from_numpy(reduce(images)), images)
    average = {name: value.clone() for name, value in sketch.state_dict().items()}
    optimizer = torch.optim.Adam(sketch.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98))
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * share_of_rate(iteration, iterations)
        images = images_of(crops[np.sort(rng.choice(len(crops), min(BATCH, len(crops)), False))])
        error = (sketch(torch.from_numpy(reduce(images))) - images).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        torch.nn.utils.clip_grad_norm_(sketch.parameters(), 1.0)
        optimizer.step()
        follow(average, sketch, iteration, EMA)
        if (iteration + 1) % 200 == 0:
            decibels = 10 * math.log10(4 / float(error.detach()))
            sys.stderr.write(f"sketch: {iteration + 1} of {iterations}, {decibels:.2f} dB\n")
    sketch.load_state_dict(average)
    return sketch


def share_of_rate(iteration: int, iterations: int) -> float:
    """Of the peak: warm-up, then a cosine down to nothing."""
    warm = min(1.0, (iteration + 1) / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def follow(average: Mapping[str, Tensor], net: nn.Module, iteration: int, decay: float) -> None:
    """Take a network's weights into their average, sooner at first."""
    decay = min(decay, (iteration + 1) / (iteration + 10))
    for name, value in net.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def images_of(crops: NDArray[np.uint8]) -> Tensor:
    """8-bit crops `[B, 3, H, W]` as images in [-1, 1]."""
    return torch.tensor(crops).float() / 127.5 - 1


@torch.no_grad()
def place(sketch: Sketch, small: Tensor, net: Any) -> tuple[Tensor, Tensor]:
    """Write a sketch into a `nano` network's latent branch and its `pit_head`.

    small: photographs `[B, 3, H, W]`, to find which combinations of a token's channels matter most:
    it hands on fewer numbers. Returns what those stand for, `[P * P, 3, numbers]`, and the picture
    of none, `[P * P, 3]`.
    """
    head, (first, _, second, *blocks) = net.lq_proj.pit_head, net.lq_proj.latent_proj
    weight = _by_token(sketch.first.conv.weight)
    _set(first, torch.einsum("opyx,kp->okyx", weight, _pixels_of_latent()), sketch.first, 0)
    _set(second, _of_all_channels(sketch.second), sketch.second, CONSTANT)
    for block, own in zip(sketch.blocks, blocks, strict=True):
        ends = -CONSTANT if own is blocks[-1] else 0  # added to the constant that is there
        for conv, index, constant in zip(block.convs, (0, 3), (CONSTANT, ends), strict=True):
            _pass(own.block[index])
            _set(own.block[index + 2], _of_all_channels(conv), conv, constant)
    out = sketch.out.weight[:, :, 0, 0].reshape(3, SCALE, SCALE, FEATURES)
    patches = torch.zeros(BLOCK, SCALE, BLOCK, SCALE, 3, FEATURES, BLOCK, BLOCK)
    for y, x in np.ndindex(BLOCK, BLOCK):
        patches[y, :, x, :, :, :, y, x] = out.permute(1, 2, 0, 3)
    patches = patches.reshape(-1, len(OWN))
    features = F.pixel_unshuffle(sketch.features(small), BLOCK)
    pictures = features.flatten(2).transpose(1, 2).flatten(0, 1) @ patches.T
    spread, vectors = torch.linalg.eigh((pictures.T @ pictures / len(pictures)).double())
    numbers = len(head.weight) - 1
    sizes, vectors = spread[-numbers:].clamp_min(1e-12).sqrt(), vectors[:, -numbers:]
    head.weight.zero_()
    head.bias.zero_()
    head.weight[:numbers, OWN] = ((vectors / sizes).T @ patches.double()).float()  # of unit size
    bias = sketch.out.bias.reshape(3, SCALE, SCALE).permute(1, 2, 0).repeat(BLOCK, BLOCK, 1)
    return (vectors * sizes).float().reshape(-1, 3, numbers), bias.reshape(-1, 3)


def _of_all_channels(conv: TokenConv) -> Tensor:
    weight = torch.zeros(len(OWN), NANO_CONFIG.latent_hidden, 3, 3)
    weight[:, OWN] = _by_token(conv.conv.weight)
    return weight


def _set(own: Any, weight: Tensor, conv: TokenConv, constant: float) -> None:
    """Let a convolution of tokens make what one of pixels makes, and the constants."""
    own.weight.zero_()
    own.weight[OWN] = weight
    own.bias[OWN] = conv.conv.bias.repeat_interleave(PIXELS)
    own.bias[CONSTANTS] = constant


def _pass(norm: Any) -> None:
    """Let a norm only centre what it gets, and drop the constants that make it do so."""
    share = 1 / GROUP
    norm.weight.fill_(CONSTANT * math.sqrt(share * (1 - share)))
    norm.bias.fill_(CONSTANT * share)
    norm.weight[CONSTANTS] = 0
    norm.bias[CONSTANTS] = 0


def _by_token(weight: Tensor) -> Tensor:
    """A convolution's weight on pixels `[o, i, k, k]` as one on tokens `[16 o, 16 i, 3, 3]`."""
    outputs, inputs, size, _ = weight.shape
    found = torch.zeros(outputs, BLOCK, BLOCK, inputs, BLOCK, BLOCK, 3, 3)
    for y, x, row, column in np.ndindex(BLOCK, BLOCK, size, size):
        down, from_y = divmod(y + row - size // 2, BLOCK)
        right, from_x = divmod(x + column - size // 2, BLOCK)
        found[:, y, x, :, from_y, from_x, down + 1, right + 1] = weight[:, :, row, column]
    return found.reshape(outputs * PIXELS, inputs * PIXELS, 3, 3)


def _pixels_of_latent() -> Tensor:
    """What each coefficient adds to a token's pixels, `[48, 3 * 4 * 4]`."""
    latent = np.zeros((len(block_dct.BASIS), block_dct.CHANNELS, 1, 1), np.float32)
    for k in range(len(latent)):
        latent[k, block_dct.PACKED**2 * k] = 1
    pixels = block_dct.decode(latent, NANO_STD)[:, :, :BLOCK, :BLOCK]
    return torch.from_numpy(pixels.reshape(len(latent), -1))
