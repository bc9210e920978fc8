"""The sizes the released checkpoints were trained at; without torch."""

import math

from pid_ref.registry import Checkpoint

Size = tuple[int, int]
"""Width and height of an image, in pixels."""

_SIZES_2K: tuple[Size, ...] = ((2048, 2048), (2304, 1728), (2688, 1536), (2688, 1792))
"""Landscape sizes of the 2k training; the transposes belong to it as well."""

_LEVELS_2KTO4K = range(2048, 3840 + 1, 256)
"""Sides in pixels of the squares whose areas the 2kto4k training used."""

_CAPS_2KTO4K: dict[Size, Size] = {
    (1, 1): (3584, 3584),
    (4, 3): (4096, 2816),
    (3, 2): (4096, 2688),
    (16, 9): (4096, 2176),
}
"""Largest width and height by aspect ratio."""

_ALIGN = 64
"""Trained sides are multiples of this many pixels."""


def trained_sizes(checkpoint: Checkpoint) -> tuple[Size, ...]:
    """The (width, height) pairs a checkpoint was trained at, ascending; see `_sizes_2kto4k`.

    Empty for variant "any", which was trained on crops of photographs of any size.
    """
    if checkpoint.variant == "any":
        return ()
    sizes = _SIZES_2K if checkpoint.variant == "2k" else _sizes_2kto4k()
    both = {(w, h) for w, h in sizes if checkpoint.config.latent_size(h, w)}
    return tuple(sorted(both | {(h, w) for w, h in both}))


def _sizes_2kto4k() -> set[Size]:
    """Landscape sizes of the 2kto4k training.

    The rule: each level's area in each aspect ratio, both sides rounded to multiples of 64 and
    then cut at the ratio's caps. The 2k sizes count as well: they are level 2048 rounded by hand.
    """
    sizes = set(_SIZES_2K)
    for (across, down), (most_width, most_height) in _CAPS_2KTO4K.items():
        for level in _LEVELS_2KTO4K:
            width = _ALIGN * round(level * math.sqrt(across / down) / _ALIGN)
            height = _ALIGN * round(level * math.sqrt(down / across) / _ALIGN)
            sizes.add((min(width, most_width), min(height, most_height)))
    return sizes
