"""Weights made from a seed: what the golden files were computed with, and `--random-weights`."""

import math
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The float32 values of one state-dict entry, the same on every machine.

    `name` is the entry's name without a `net.` prefix. Outputs of a network with these weights
    are of order 1.
    """
    generator = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = np.asarray(generator.standard_normal(shape), dtype=np.float32)
    if name.endswith("log_alpha"):
        value = math.log(5.0) + 0.1 * z
    elif len(shape) == 1:
        # Norm gains lie around 1; every bias lies around 0.
        value = (1.0 if name.endswith("weight") else 0.0) + 0.1 * z
    elif name == "y_pos_embedding":
        value = 0.5 * z
    else:
        value = z / math.sqrt(math.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


class RandomWeights(Mapping[str, torch.Tensor]):
    """A state dict of `random_tensor` values, float32 on the CPU.

    Nothing is kept: every access computes its tensor anew, so a full-size network costs no more
    memory than its largest entry.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.shapes = shapes
        self.seed = seed

    def __getitem__(self, name: str) -> torch.Tensor:
        values = random_tensor(name, self.shapes[name], self.seed)
        return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
