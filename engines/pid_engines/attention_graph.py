"""Attention as TensorRT's compiler fuses it without moving anything.

The bundle's attention graph takes a batch, `[B, Q, heads * head_dim]`. With a batch axis the
compiler copies q, k, v and the result into layouts of its own, four times the sequence in scratch.
Without one, on `[Q, heads, head_dim]`, its fused kernel reads the buffers where they lie, and one
copy is left, of the result. Engines are built for one image, so the batch axis is reshaped away.

Of 8-bit numbers TensorRT for RTX 1.7.1 fuses an attention whose weights are rounded as well, right
after the softmax, and whose profile begins above 32 keys (`profiles.FEWEST_FP8_KEYS`).
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pid_export.onnx_ports import OPSET, TENSOR_TYPES, port_infos
from pid_runtime.bundle.manifest import Graph, Port


def attention_graph(graph: Graph, *, bf16_island: bool = False) -> bytes:
    """The ONNX file of an attention graph of a bundle, for one image.

    Ports are the graph's with B = 1. bf16_island: attend in bfloat16 within a graph of another
    type, where float16 would overflow.
    """
    heads = graph.options["heads"]
    port = graph.inputs["q"]
    width = int(port.shape[-1])
    if "fp8_scales" in graph.options:
        return _rounded(graph, heads, width, graph.options["fp8_scales"])
    nodes = _split()
    seen = "heads"
    if bf16_island:
        seen = "bf16"
        for name in ("q", "k", "v"):
            half, brain = [f"{name}_heads"], [f"{name}_bf16"]
            nodes.append(helper.make_node("Cast", half, brain, brain[0], to=TensorProto.BFLOAT16))
    nodes += [
        helper.make_node("Transpose", [f"q_{seen}"], ["q_t"], name="q_t", perm=[1, 0, 2]),
        helper.make_node("Transpose", [f"k_{seen}"], ["k_t"], name="k_t", perm=[1, 2, 0]),
        helper.make_node("Transpose", [f"v_{seen}"], ["v_t"], name="v_t", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["q_t", "k_t"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="weights", axis=-1),
        helper.make_node("MatMul", ["weights", "v_t"], ["mean_t"], name="mean_t"),
        helper.make_node("Transpose", ["mean_t"], ["mean"], name="mean", perm=[1, 0, 2]),
    ]
    if bf16_island:
        nodes.append(
            helper.make_node("Cast", ["mean"], ["out"], name="out", to=TENSOR_TYPES[port.dtype])
        )
    result = "out" if bf16_island else "mean"
    nodes.append(helper.make_node("Reshape", [result, "join"], ["attended"], name="attended"))
    return _model(graph, heads, width, nodes, [])


def _rounded(graph: Graph, heads: int, width: int, scales: Mapping[str, float]) -> bytes:
    """The same on 8-bit numbers: `backends.stages.RoundedAttention`, as compilers know it."""
    nodes = _split()

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))

    for name, axes in (("q", [1, 0, 2]), ("k", [1, 2, 0]), ("v", [1, 0, 2])):
        node("DequantizeLinear", [f"{name}_heads", f"{name}_scale"], f"{name}_float")
        node("Transpose", [f"{name}_float"], f"{name}_t", perm=axes)
    node("MatMul", ["q_t", "k_t"], "scores")
    node("Softmax", ["scores"], "weights", axis=-1)
    node("QuantizeLinear", ["weights", "weights_scale", "zero"], "weights_fp8")
    node("DequantizeLinear", ["weights_fp8", "weights_scale"], "weights_float")
    node("MatMul", ["weights_float", "v_t"], "mean_t")
    node("Transpose", ["mean_t"], "mean", perm=[1, 0, 2])
    node("QuantizeLinear", ["mean", "attended_scale", "zero"], "mean_fp8")
    node("Reshape", ["mean_fp8", "join"], "attended")
    constants = [
        numpy_helper.from_array(np.array(scale, ml_dtypes.bfloat16), f"{name}_scale")
        for name, scale in scales.items()
    ]
    zero = numpy_helper.from_array(np.array(0, ml_dtypes.float8_e4m3fn), "zero")
    return _model(graph, heads, width, nodes, [*constants, zero])


def _split() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Reshape", [name, "split"], [f"{name}_heads"], name=f"{name}_heads")
        for name in ("q", "k", "v")
    ]


def _model(
    graph: Graph,
    heads: int,
    width: int,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> bytes:
    shapes = {"split": [-1, heads, width // heads], "join": [1, -1, width]}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "attention",
            port_infos(_of_one_image(graph.inputs)),
            port_infos(_of_one_image(graph.outputs)),
            [
                *(numpy_helper.from_array(np.array(s, np.int64), n) for n, s in shapes.items()),
                *constants,
            ],
        ),
        ir_version=10,
        producer_name="pid-trt",
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    return model.SerializeToString(deterministic=True)


def _of_one_image(ports: dict[str, Port]) -> dict[str, Port]:
    return {
        name: Port(port.dtype, tuple(1 if size == "B" else size for size in port.shape))
        for name, port in ports.items()
    }
