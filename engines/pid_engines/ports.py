"""Whether a network the builder has parsed has the ports of the manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from pid_runtime.bundle.manifest import Graph
from pid_runtime.bundle.sizes import Shape

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
}
"""The manifest's names of dtypes."""


def network_ports(network: Any) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Names, dtypes and shapes of a network's inputs and outputs."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        kind: {
            each.name: (_DTYPES.get(each.dtype.name, str(each.dtype.name)), list(each.shape))
            for each in tensors
        }
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }


def port_difference(
    graph: Graph, found: Mapping[str, Mapping[str, tuple[str, Sequence[int]]]]
) -> str | None:
    """How a network's ports differ from the manifest's; None if they are the same.

    found: of the network, by "inputs" and "outputs": dtype and shape by name, -1 for a size that
    is not fixed. Every symbol of the manifest must be one, and nothing else; B may be 1.
    """
    for kind, ports in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if list(found[kind]) != list(ports):
            return f"expected {kind} {', '.join(ports)}, but got {', '.join(found[kind])}"
        for name, port in ports.items():
            dtype, shape = found[kind][name]
            if dtype != port.dtype or not _same_shape(port.shape, shape):
                wanted = f"{port.dtype} {list(port.shape)}".replace("'", "")
                return f"expected {name} as {wanted}, but got {dtype} {list(shape)}"
    return None


def _same_shape(shape: Shape, found: Sequence[int]) -> bool:
    return len(shape) == len(found) and all(
        got == (-1 if isinstance(size, str) else size) or (size == "B" and got == 1)
        for size, got in zip(shape, found, strict=True)
    )
