"""The weights file: safetensors like any other, and hashed while it is written."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pid_export.weights_file import ALIGNMENT, Slot, WeightsWriter

SLOTS = {
    "table.modulation": Slot(torch.float32, (2, 3)),
    "image.0.qk.weight": Slot(torch.bfloat16, (5, 4)),
    "image.0.alpha": Slot(torch.float32, (1,)),
    "update.velocity.bias": Slot(torch.float16, (3,)),
}


def values_of(slot: Slot) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(slot.shape).numel()).reshape(slot.shape)


def test_is_read_by_safetensors_and_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    digests: dict[str, bytes] = {}
    with WeightsWriter(path, SLOTS, {"format": "pid-bundle"}) as writer:
        for name, slot in SLOTS.items():
            values = values_of(slot)
            if values.ndim == 2:  # transposed weights do not come contiguous
                values = values.T.contiguous().T
            digests[name] = writer.write(name, values)
    content = path.read_bytes()
    assert writer.size == len(content)
    assert writer.sha256() == hashlib.sha256(content).hexdigest()
    assert writer.data_offset % ALIGNMENT == 0
    tensors = load_file(path)
    assert set(tensors) == set(SLOTS)
    for name, slot in SLOTS.items():
        expected = values_of(slot).to(slot.dtype)
        assert tensors[name].dtype == slot.dtype
        assert torch.equal(tensors[name], expected)
        begin = writer.offsets[name]
        raw = content[begin : begin + slot.bytes]
        assert raw == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert digests[name] == hashlib.sha256(raw).digest()


@pytest.mark.parametrize(
    ("name", "shape"), [("image.0.qk.weight", (5, 4)), ("table.modulation", (3, 2))]
)
def test_another_order_or_shape_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    with (
        WeightsWriter(tmp_path / "weights.safetensors", SLOTS, {}) as writer,
        pytest.raises(ValueError, match=r"expected tensor table\.modulation of shape \(2, 3\)"),
    ):
        writer.write(name, torch.zeros(shape))
