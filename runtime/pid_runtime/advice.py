"""What to tell a user about a decode that will run, but not as well as it could."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Size = tuple[int, int]
"""Width and height in pixels."""

TRAINED_SIGMA = 0.8
"""Largest noise level the decoders were trained on."""

LARGEST_2K_AREA = 2688 * 1792
"""Up to this many pixels the 2k decoders were trained; the 2kto4k ones are worse there."""

DEMONSTRATED: frozenset[Size] = frozenset({(4096, 4096), (4096, 3072), (3072, 4096)})
"""Sizes beyond their training that the release itself shows 2kto4k decoders at."""


SAME_RATIO = 0.03
"""Aspect ratios this near are the same, by their logarithms: sides are multiples of 64."""


def advice(
    model: Mapping[str, Any], size: Size, largest_sigma: float, *, has_caption: bool
) -> list[str]:
    """Warnings, one line each, about a decode to this size; empty if all is well.

    model: what the manifest says the decoder is; a network of one's own promises nothing.
    largest_sigma: the highest noise level among the latents.
    """
    name = model.get("name", "this decoder")
    lines: list[str] = []
    lines += _about_size(model, name, size)
    if largest_sigma > TRAINED_SIGMA:
        lines.append(
            f"sigma {largest_sigma:g} is beyond {TRAINED_SIGMA}, the highest in training; "
            "denoise the latent further for a faithful image"
        )
    if not has_caption and model.get("captioned") is not False:
        lines.append(
            "no caption was given: the empty embedding (zeros) costs quality; give the prompt's, "
            "made by pid-caption"
        )
    return lines


def _about_size(model: Mapping[str, Any], name: str, size: Size) -> list[str]:
    width, height = size
    lines: list[str] = []
    is_4k = str(model.get("variant")).startswith("2kto4k")
    known = model.get("variants")  # of the space; older bundles do not say
    is_known = isinstance(known, list | tuple)
    if is_4k and width * height <= LARGEST_2K_AREA and (not is_known or "2k" in known):
        which = "the 2k variant" + ("" if is_known else " if this latent space has one")
        lines.append(f"at {width}x{height} a 2kto4k decoder is worse than a 2k one; use {which}")
    trained = [(w, h) for w, h in model.get("trained_sizes", ())]
    if trained and size not in trained:
        near = _nearest(size, trained)
        wanted = f"{near[0]}x{near[1]}{_of_latents(model, near)}"
        if is_4k and size in DEMONSTRATED:
            lines.append(
                f"the release shows {width}x{height}, but training stopped at {wanted}; "
                "prefer that size if the image shows artifacts"
            )
        else:
            lines.append(
                f"{name} was not trained at {width}x{height} and may give green or blocky "
                f"artifacts; the nearest trained size is {wanted}"
            )
    return lines


def _nearest(size: Size, trained: Sequence[Size]) -> Size:
    """The trained size nearest in area among those about as near as any in aspect ratio."""

    def ratio(other: Size) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(other[0] / other[1]))

    def area(other: Size) -> float:
        return abs(math.log(size[0] * size[1]) - math.log(other[0] * other[1]))

    most = min(map(ratio, trained)) + SAME_RATIO
    return min((each for each in trained if ratio(each) <= most), key=area)


def _of_latents(model: Mapping[str, Any], size: Size) -> str:
    """From latents of which pictures such a size comes; nothing where the bundle does not say."""
    scale = model.get("scale")
    if not isinstance(scale, int) or scale < 1:
        return ""
    return f", from the latent of an image of {size[0] // scale}x{size[1] // scale}"
