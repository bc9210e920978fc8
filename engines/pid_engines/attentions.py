"""The attentions of a graph, whether float16 is enough for them, and products of 8-bit numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx

LARGEST_FP16_KEYS = 65_504
"""Most keys of an attention in float16: a sum of as many ones is the largest float16 number."""

LARGEST_SCORES = 1 << 40
"""Most scores of an attention, heads x queries x keys, that TensorRT for RTX 1.7.1 builds.

Beyond it the builder dies with "Internal Error (kOPT values for profile 0 ..)".
"""


@dataclass(frozen=True)
class Attention:
    """An attention of a graph, by the names of its nodes."""

    softmax: str
    products: tuple[str, str]
    """Queries with keys, and weights with values."""


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


def find_rounded_products(model: onnx.ModelProto) -> list[str]:
    """The names of a graph's products of 8-bit numbers: both operands were such."""
    makers = {name: node for node in model.graph.node for name in node.output}

    def was_rounded(name: str) -> bool:
        maker = makers.get(name)
        while maker is not None and maker.op_type in _MOVES:
            maker = makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and all(map(was_rounded, node.input))
    ]


def overflows(profiles: Sequence[Mapping[str, Sequence[int]]]) -> bool:
    """Whether an attention of this graph may see more keys than it can add up in float16.

    Any of the graph's sizes may be that of the keys, so the largest counts.
    """
    keys = max((max(sizes) for profile in profiles for sizes in profile.values()), default=1)
    return keys > LARGEST_FP16_KEYS


_MOVES = ("Reshape", "Transpose")
"""What changes no number."""

_ELEMENTWISE = ("Add", "Cast", "DequantizeLinear", "Div", "Mul", "QuantizeLinear", "Where")
"""What may stand between a product and the softmax: scale, mask, precision and rounding."""


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
