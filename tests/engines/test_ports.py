"""Ports of a network are compared with those of the manifest."""

from typing import Any

from pid_engines.ports import port_difference
from pid_runtime.bundle.manifest import Graph, Port


def test_ports_are_compared() -> None:
    shape = ("B", "L", 8)
    graph = Graph(
        "a.onnx", "", {}, {"x": Port("bfloat16", shape)}, {"y": Port("float32", shape)}, 0, ""
    )
    same: dict[str, Any] = {
        "inputs": {"x": ("bfloat16", [-1, -1, 8])},
        "outputs": {"y": ("float32", [1, -1, 8])},
    }
    assert port_difference(graph, same) is None
    for kind, ports in (
        ("inputs", {"x": ("float16", [-1, -1, 8])}),
        ("inputs", {"x": ("bfloat16", [-1, 64, 8])}),
        ("inputs", {"x": ("bfloat16", [-1, -1, -1])}),
        ("inputs", {"x": ("bfloat16", [-1, -1])}),
        ("inputs", {"x": ("bfloat16", [2, -1, 8])}),
        ("inputs", {}),
        ("outputs", {"z": ("float32", [1, -1, 8])}),
        ("outputs", {**same["outputs"], "more": ("float32", [1])}),
    ):
        assert port_difference(graph, {**same, kind: ports}) is not None, ports
