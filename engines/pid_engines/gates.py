"""What an engine must be: its ports, its attention, and what the builder reports about it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx

from pid_runtime.bundle.manifest import Graph
from pid_runtime.bundle.sizes import Shape

LARGEST_FP16_KEYS = 65_504
"""Most keys of an attention in float16: a sum of as many ones is the largest float16 number."""


@dataclass(frozen=True)
class Attention:
    """An attention of a graph, by the names of its nodes."""

    softmax: str
    products: tuple[str, str]
    """Queries with keys, and weights with values."""


@dataclass(frozen=True)
class Report:
    """What the builder says about an engine."""

    weights_bytes: int
    """Device memory that lasts: weights, and what kernels keep."""
    scratch_bytes: tuple[int, ...]
    """Device memory of an execution, per optimisation profile."""
    attentions_fused: int
    """Attentions that are one kernel in every profile."""


def find_attentions(model: onnx.ModelProto) -> list[Attention]:
    """The attentions of a graph: every softmax of a product that is multiplied again."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found: list[Attention] = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        before = _product_before(node, makers)
        after = _product_after(node, model)
        if before is not None and after is not None:
            found.append(Attention(node.name, (before.name, after.name)))
    return found


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


def overflows(profiles: Sequence[Mapping[str, Sequence[int]]]) -> bool:
    """Whether an attention of this graph may see more keys than it can add up in float16.

    Any of the graph's sizes may be that of the keys, so the largest counts.
    """
    keys = max((max(sizes) for profile in profiles for sizes in profile.values()), default=1)
    return keys > LARGEST_FP16_KEYS


def read_report(log: str, attentions: Sequence[Attention], profiles: int) -> Report | str:
    """What the builder's verbose log says of an engine, or what is missing in it.

    The log has a number of bytes for each profile in turn. The kernels are listed in lines
    "Name: .., LayerType: .., TacticName: .., Metadata: [ONNX Layer: NODE]..", each with the nodes
    that it computes: an attention is fused if each profile has a kernel of an attention's tactic
    that computes its softmax and both products, and no other kernel computes its softmax.
    """
    scratch = tuple(map(int, re.findall(r"Total Activation Memory: (\d+) bytes", log)))
    weights = re.findall(r"Total Weights Memory: (\d+) bytes", log)
    kept = map(int, re.findall(r"Total Device Persistent Memory: (\d+) bytes", log))
    if len(scratch) != profiles or len(weights) != 1:
        return (
            f"expected the builder to report the memory of {profiles} profiles and of the weights, "
            f"but got {len(scratch)} and {len(weights)} numbers"
        )
    kernels = [
        ("mha" in tactic, set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", nodes)))
        for tactic, nodes in re.findall(
            r"^Name: .*, TacticName: ([^,]*),.* Metadata:(.*)$", log, re.MULTILINE
        )
    ]
    fused = 0
    for attention in attentions:
        parts = {attention.softmax, *attention.products}
        whole = [
            is_attention and parts <= nodes
            for is_attention, nodes in kernels
            if attention.softmax in nodes
        ]
        fused += len(whole) >= profiles and all(whole)
    return Report(int(weights[0]) + max(kept, default=0), scratch, fused)


def _same_shape(shape: Shape, found: Sequence[int]) -> bool:
    return len(shape) == len(found) and all(
        got == (-1 if isinstance(size, str) else size) or (size == "B" and got == 1)
        for size, got in zip(shape, found, strict=True)
    )


_ELEMENTWISE = ("Add", "Cast", "Div", "Mul", "Where")
"""What may stand between a product and the softmax: scale, mask and precision."""


def _product_before(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The product whose values a softmax is of."""
    for name in node.input:
        maker = makers.get(name)
        if maker is None:
            continue
        if maker.op_type == "MatMul":
            return maker
        if maker.op_type in _ELEMENTWISE and (found := _product_before(maker, makers)) is not None:
            return found
    return None


def _product_after(node: onnx.NodeProto, model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The product that a softmax's values are used in."""
    for user in _users(node, model):
        if user.op_type == "MatMul":
            return user
        if user.op_type in _ELEMENTWISE and (found := _product_after(user, model)) is not None:
            return found
    return None


def _users(node: onnx.NodeProto, model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    made = set(node.output)
    return (user for user in model.graph.node if made.intersection(chain(user.input)))
