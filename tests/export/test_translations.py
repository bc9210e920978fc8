"""torch.onnx's table of translations, made once."""

import warnings
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _registration

from pid_export import translations
from pid_export.translations import kept_translations


def graph(scale: float) -> bytes:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x * scale)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Scaled(), (torch.ones(2, 3),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString(deterministic=True)


def test_a_table_is_made_once_and_gives_the_same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    registry = _registration.ONNXRegistry
    make = registry.from_torchlib

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return make(*arguments, **options)

    monkeypatch.setattr(translations, "_made", {})
    monkeypatch.setattr(registry, "from_torchlib", staticmethod(counted))
    plain = graph(2)
    assert len(made) == 1
    for _ in range(2):
        with kept_translations():
            assert graph(2) == plain != graph(3)
    assert len(made) == 2
    graph(2)
    assert len(made) == 3


def test_translations_of_one_trace_are_not_those_of_the_next() -> None:
    with kept_translations():
        first, second = (_registration.ONNXRegistry.from_torchlib() for _ in range(2))
    assert first.functions == second.functions and len(first.functions) > 100
    target, known = next(iter(first.functions.items()))
    known.append(known[0])
    del first.functions[target]
    assert second.functions[target] == known[:-1]


def test_a_torch_without_such_a_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_registration, "ONNXRegistry")
    with kept_translations():
        assert not hasattr(_registration, "ONNXRegistry")
