"""What torch is spared while it traces."""

import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental import sym_node
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.fx.passes import type_promotion

from pid_export import tracing as module
from pid_export.tracing import tracing


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    module._shortcuts.cache_clear()
    yield
    module._shortcuts.cache_clear()


def graph_of(module: torch.nn.Module, *inputs: torch.Tensor) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where it comes from
    return model.SerializeToString(deterministic=True)


def graph(scale: float) -> bytes:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x * scale)

    return graph_of(Scaled(), torch.ones(2, 3))


def test_a_table_is_made_once_and_gives_the_same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    registry = _registration.ONNXRegistry
    make = registry.from_torchlib

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return make(*arguments, **options)

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(counted))
    plain = graph(2)
    assert len(made) == 1
    for _ in range(2):
        with tracing():
            assert graph(2) == plain != graph(3)
    assert len(made) == 2
    graph(2)
    assert len(made) == 3


class Mixed(torch.nn.Module):
    """What is of several types, and of more digits than it comes with."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        wide = n * 0.5 + x.float() / n
        return torch.where(n > 1, torch.sqrt(n) + wide, torch.nn.functional.gelu(x * 3 + n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_converted_as_before(dtype: torch.dtype) -> None:
    inputs = torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=torch.int64)
    plain = graph_of(Mixed(), *inputs)
    assert b"Cast" in plain
    with tracing():
        assert graph_of(Mixed(), *inputs) == plain


def test_nodes_are_run_where_it_cannot_be_told_which_are_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreter = type_promotion._TypePromotionInterpreter
    monkeypatch.delattr(interpreter, "_run_node_and_set_meta")
    with tracing():
        assert type_promotion._TypePromotionInterpreter is interpreter


def test_translations_of_one_trace_are_not_those_of_the_next() -> None:
    with tracing():
        first, second = (_registration.ONNXRegistry.from_torchlib() for _ in range(2))
    assert first.functions == second.functions and len(first.functions) > 100
    target, known = next(iter(first.functions.items()))
    known.append(known[0])
    del first.functions[target]
    assert second.functions[target] == known[:-1]


def values() -> list[Any]:
    found: list[Any] = []
    for place in module._SHORTCUTS:
        name, _, path = place.partition(":")
        found.append(functools.reduce(getattr, path.split("."), importlib.import_module(name)))
    return found


def test_all_is_as_before_afterwards() -> None:
    before = values()
    for _ in range(2):
        with tracing():
            assert all(one != other for one, other in zip(values(), before, strict=True))
        assert values() == before
    with pytest.raises(ValueError, match="of a trace"), tracing():
        raise ValueError("of a trace")
    assert values() == before


def test_what_was_to_be_logged_is_logged() -> None:
    sym_node.sym_node_log.setLevel(logging.DEBUG)
    try:
        said = sym_node.sym_node_log.debug
        with tracing():
            assert sym_node.sym_node_log.debug == said
    finally:
        sym_node.sym_node_log.setLevel(logging.NOTSET)


def test_a_torch_without_such_a_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = graph(2)
    monkeypatch.delattr(_registration, "ONNXRegistry")
    with tracing():
        assert not hasattr(_registration, "ONNXRegistry")
    monkeypatch.undo()
    assert graph(2) == plain
