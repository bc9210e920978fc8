"""Graphs with ONNX Runtime's own operators, beside those of the ONNX standard.

Written with standard operators, ONNX Runtime keeps the whole table of attention weights in memory,
`heads * Q * S` values. Its own operator has flash kernels, on the CPU and on CUDA.
"""

from onnx import helper

from pid_export.onnx_ports import port_infos
from pid_export.program import GraphSpec

DOMAIN = "com.microsoft"


def contrib_graph(name: str, spec: GraphSpec, opset: int) -> bytes | None:
    """The ONNX file of an attention graph (`backends.stages.Attention`); None for others.

    Of one that rounds there is none: the operator would leave its weights as they are.

    `com.microsoft.MultiHeadAttention`, as ONNX Runtime's ContribOperators.md describes it: q, k and
    v `[B, sequence, heads * head_dim]`; scale 1, as queries come scaled.
    """
    if spec.stage != "attention" or "fp8_scales" in spec.options:
        return None
    attention = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["attended"],
        name="attention",
        domain=DOMAIN,
        num_heads=spec.options["heads"],
        scale=1.0,
    )
    graph = helper.make_graph([attention], name, port_infos(spec.inputs), port_infos(spec.outputs))
    model = helper.make_model(
        graph,
        ir_version=10,
        producer_name="pid-trt",
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
    )
    return model.SerializeToString(deterministic=True)
