"""Advice about sizes; test_decode_cli.py has the rest, as the command prints it."""

import pytest

from pid_export.bundle import _model
from pid_ref.registry import find_checkpoint
from pid_runtime.advice import advice


@pytest.mark.parametrize(
    ("space", "variant", "width", "height", "words"),
    [
        ("flux", "2k", 2048, 2048, []),
        ("flux", "2k", 1536, 2688, []),
        ("flux", "2k", 3072, 3072, [["not trained at 3072x3072", "artifacts", "nearest"]]),
        ("flux", "2k", 2048, 2000, [["2048x2000", "nearest trained size is 2048x2048"]]),
        ("flux", "2kto4k", 3072, 3072, []),
        ("flux", "2kto4k", 2048, 2048, [["2048x2048", "use the 2k variant"]]),
        ("flux", "2kto4k", 2688, 1536, [["2688x1536", "use the 2k variant"]]),
        ("sdxl", "2kto4k", 2048, 2048, []),
        (
            "sdxl",
            "2kto4k",
            4864,
            4864,
            [
                [
                    "not trained at 4864x4864",
                    "size is 3584x3584, from the latent of an image of 896x",
                ]
            ],
        ),
        ("flux", "2k", 1792, 1344, [["nearest trained size is 2304x1728", "image of 576x432"]]),
        ("siglip", "2k", 1792, 1792, [["size is 2048x2048, from the latent of an image of 256x"]]),
        ("flux", "2k", 4096, 512, [["size is 2688x1536,"]]),
        ("flux", "2kto4k", 2304, 2304, []),
        ("flux", "2kto4k", 4096, 4096, [["the release shows 4096x4096", "3584x3584"]]),
        ("flux", "2kto4k", 3072, 4096, [["the release shows 3072x4096", "2816x3840"]]),
        ("flux", "2k", 4096, 4096, [["not trained at 4096x4096"]]),
        ("flux", "2kto4k", 512, 512, [["use the 2k variant"], ["not trained at 512x512"]]),
        ("flux", "2kto4k", 3840, 3840, [["not trained at 3840x3840", "3584x3584"]]),
        ("nano", "any", 64, 64, []),
        ("nano", "any", 4096, 96, []),
    ],
)
def test_sizes_of_the_released_checkpoints(
    space: str, variant: str, width: int, height: int, words: list[list[str]]
) -> None:
    checkpoint = find_checkpoint(space, variant)
    found = advice(
        _model(checkpoint.config, checkpoint, {}), (width, height), 0.0, has_caption=True
    )
    assert len(found) == len(words), found
    for line, needed in zip(found, words, strict=True):
        assert "\n" not in line
        assert [word for word in needed if word not in line] == []


def test_an_older_bundle_does_not_say_what_its_space_has() -> None:
    model = {"variant": "2kto4k", "trained_sizes": [[96, 64]]}
    worse, size = advice(model, (64, 64), 0.0, has_caption=True)
    assert worse.endswith("use the 2k variant if this latent space has one")
    assert size.endswith("the nearest trained size is 96x64")
