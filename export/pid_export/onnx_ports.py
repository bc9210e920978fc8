"""What all graphs have in common, traced or written by hand; loads without torch."""

import onnx
from onnx import TensorProto, helper

from pid_runtime.bundle.manifest import Port

OPSET = 22
"""Newest opset that TensorRT for RTX 1.7 parses without trouble, oldest with a bfloat16 Conv."""

TENSOR_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}
"""ONNX's element types by the manifest's names."""


def port_infos(ports: dict[str, Port]) -> list[onnx.ValueInfoProto]:
    """The inputs or outputs of a graph, as the manifest has them."""
    return [
        helper.make_tensor_value_info(name, TENSOR_TYPES[port.dtype], port.shape)
        for name, port in ports.items()
    ]
