"""RRDBNet: the generator of ESRGAN (arXiv 1809.00219), in the size Real-ESRGAN x4 is released in.

Residual-in-residual dense blocks at the low resolution, then two nearest-neighbour doublings, each
followed by a convolution. No normalisation anywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
"""Of every leaky ReLU, below zero."""

RESIDUAL_SCALE = 0.2
"""What a block's output is multiplied with before it is added to its input."""


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the input and what all before it made."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.ModuleList(_conv(features + i * growth, growth) for i in range(4))
        self.merge = _conv(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        dense = x
        for conv in self.grow:
            dense = torch.cat([dense, F.leaky_relu(conv(dense), SLOPE)], dim=1)
        return x + RESIDUAL_SCALE * self.merge(dense)


class ResidualBlock(nn.Module):
    """Three dense blocks with a residual connection around them."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(features, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.dense(x)


class RRDBNet(nn.Module):
    """Images `[B, 3, H, W]` to images `[B, 3, 4 H, 4 W]`, both about [0, 1]."""

    BLOCKS = 23

    def __init__(self, blocks: int = BLOCKS, features: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.first = _conv(3, features)
        self.blocks = nn.Sequential(*(ResidualBlock(features, growth) for _ in range(blocks)))
        self.trunk = _conv(features, features)
        self.doublings = nn.ModuleList(_conv(features, features) for _ in range(2))
        self.high = _conv(features, features)
        self.last = _conv(features, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        x = x + self.trunk(self.blocks(x))
        for conv in self.doublings:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), SLOPE)
        return self.last(F.leaky_relu(self.high(x), SLOPE))
