"""Sizes of the trainings."""

from pid_ref.registry import find_checkpoint
from pid_ref.trained_sizes import trained_sizes


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
