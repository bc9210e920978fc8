"""Sizes of the trainings, and warnings about others."""

import pytest

from pid_ref.registry import find_checkpoint
from pid_ref.trained_sizes import size_warnings, trained_sizes


def test_trained_sizes() -> None:
    two = trained_sizes(find_checkpoint("flux", "2k"))
    assert set(two) == {
        (2048, 2048), (2304, 1728), (1728, 2304), (2688, 1536), (1536, 2688), (2688, 1792),
        (1792, 2688),
    }  # fmt: skip
    four = trained_sizes(find_checkpoint("flux", "2kto4k"))
    assert {(2304, 2304), (3072, 3072), (3584, 3584), (4096, 2816), (2176, 4096)} < set(four)
    assert set(two) < set(four)
    assert max(max(size) for size in four) == 4096
    assert (4096, 4096) not in four and (3840, 3840) not in four
    assert all((h, w) in four and w % 64 == h % 64 == 0 for w, h in four)
    # siglip's latent pixel is 128 output pixels: sizes it cannot have are not listed.
    assert (2304, 1728) not in trained_sizes(find_checkpoint("siglip", "2k"))


@pytest.mark.parametrize(
    ("space", "variant", "width", "height", "words"),
    [
        ("flux", "2k", 2048, 2048, []),
        ("flux", "2k", 1536, 2688, []),
        ("flux", "2k", 3072, 3072, [["not trained at 3072x3072", "artifacts", "nearest"]]),
        ("flux", "2k", 2048, 2000, [["2048x2000", "nearest trained size is 2048x2048"]]),
        ("flux", "2kto4k", 3072, 3072, []),
        ("flux", "2kto4k", 2048, 2048, [["2048x2048", "use variant 2k"]]),
        ("flux", "2kto4k", 2688, 1536, [["2688x1536", "use variant 2k"]]),
        ("sdxl", "2kto4k", 2048, 2048, [["larger size"]]),
        ("flux", "2kto4k", 2304, 2304, []),
        ("flux", "2kto4k", 4096, 4096, [["the release shows 4096x4096", "3584x3584"]]),
        ("flux", "2kto4k", 3072, 4096, [["the release shows 3072x4096", "2816x4096"]]),
        ("flux", "2k", 4096, 4096, [["not trained at 4096x4096"]]),
        ("flux", "2kto4k", 512, 512, [["use variant 2k"], ["not trained at 512x512"]]),
        ("flux", "2kto4k", 3840, 3840, [["not trained at 3840x3840", "3584x3584"]]),
        ("nano", "any", 64, 64, []),
        ("nano", "any", 4096, 96, []),
    ],
)
def test_size_warnings(
    space: str, variant: str, width: int, height: int, words: list[list[str]]
) -> None:
    found = size_warnings(find_checkpoint(space, variant), height=height, width=width)
    assert len(found) == len(words), found
    for line, needed in zip(found, words, strict=True):
        assert "\n" not in line
        assert [word for word in needed if word not in line] == []
