"""Attentions are found in graphs, and their keys are counted."""

from pathlib import Path

import onnx

from pid_engines.attentions import find_attentions, overflows


def test_keys_are_counted() -> None:
    assert not overflows([{"Q": (1, 9, 9), "S": (1, 65_504, 65_504)}, {}])
    assert overflows([{"S": (1, 9, 9)}, {"Q": (1, 9, 9), "S": (1, 9, 65_505)}])


def test_attentions_are_found(bf16_bundle: Path) -> None:
    found = {
        path.stem: len(find_attentions(onnx.load(path, load_external_data=False)))
        for path in bf16_bundle.glob("*.onnx")
        if "contrib" not in path.name
    }
    assert {name for name, count in found.items() if count} == {"attention", "pixel_attention"}
    assert set(found.values()) == {0, 1}
