"""Stages to ONNX graphs, traced without weights: those stay in the bundle's one weights file."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset22
from onnxscript.optimizer import optimize_ir

from pid_export.onnx_ports import OPSET
from pid_export.program import GraphSpec
from pid_export.tracing import tracing
from pid_runtime.backends.stages import (
    DTYPES,
    GROUP_EPSILON,
    GROUPS,
    Dimensions,
    build_stage,
)
from pid_runtime.bundle.manifest import PRECISIONS, WEIGHTS_FILE, Port

op: Any = opset22  # whose types know no lists, which it takes as constants

_SAMPLES = {"B": 2, "T": 7, "h": 3, "w": 5, "Hs": 6, "Ws": 10, "L": 60, "S": 67, "Q": 11}
"""Sizes to trace at; all different, so that no two symbols are taken for one."""

_IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.int8: ir.DataType.INT8,
}

_ZERO = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
"""A zero point of none, which says what to round to."""


def _quantize(x: Any, scale: Any) -> Any:
    return op.QuantizeLinear(x, scale, op.Constant(value=_ZERO))


def _dequantize(x: Any, scale: Any) -> Any:
    return op.DequantizeLinear(x, scale)


def _group_norm(x: Any, weight: Any, bias: Any) -> Any:
    """Written out: of a GroupNormalization, TensorRT keeps input and result in float32.

    So it would, were the float32 that is measured the one that is scaled.
    """

    def exact(values: Any) -> Any:
        return op.Cast(values, to=onnx.TensorProto.FLOAT)

    grouped = exact(op.Reshape(x, [0, GROUPS, -1]))
    weight, bias = (op.Reshape(values, [1, GROUPS, -1]) for values in (weight, bias))
    mean = op.ReduceMean(grouped, [2])
    centred = op.Sub(grouped, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), [2])
    scale = op.Div(weight, op.Sqrt(op.Add(variance, GROUP_EPSILON)))
    offset = op.Sub(bias, op.Mul(mean, scale))
    scale, offset = (op.Reshape(values, [0, -1, 1, 1]) for values in (scale, offset))
    return op.CastLike(op.Add(op.Mul(exact(x), scale), offset), x)


_OPERATIONS = {
    torch.ops.pid.quantize.default: _quantize,
    torch.ops.pid.dequantize.default: _dequantize,
    torch.ops.pid.group_norm.default: _group_norm,
}
"""How to write the operations that are ours, in `pid_runtime.backends`."""


class ExportError(RuntimeError):
    """An exported graph is not what the manifest promises; a bug or an unsupported torch."""


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the weights file."""

    offset: int
    length: int


class GraphExporter:
    """Traces every distinct stage once and writes a graph for each place it is used in."""

    _traces: ClassVar[MutableMapping[str, bytes]] = {}
    """Traced stages, for every exporter of the process: a trace takes a second or two."""

    def __init__(self, network: Dimensions, precision: str) -> None:
        self._network, self._precision = network, precision

    def export(self, name: str, spec: GraphSpec, placed: Mapping[str, Placed]) -> bytes:
        """The ONNX file of a graph, whose weights are where `placed` says (by full name)."""
        model = onnx.load_from_string(self._traced(spec))
        model.graph.name = name
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = placed[f"{name}.{tensor.name}"]
                entries = {"location": WEIGHTS_FILE, "offset": place.offset, "length": place.length}
                del tensor.external_data[:]
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=str(value))
        return model.SerializeToString(deterministic=True)

    def _traced(self, spec: GraphSpec) -> bytes:
        """The graph of a stage, traced once for all networks that are alike in what it uses."""
        network: Any = _Used(self._network)
        with torch.device("meta"):
            stage = build_stage(spec.stage, spec.options, network, self._precision).eval()
        text = any("T" in port.shape for port in spec.inputs.values())
        longest_text = network.text_max_length if text else 0
        typed = network.used or "fp8_scales" in spec.options
        used = (network.used, PRECISIONS[self._precision]) if typed else ()
        key = repr((spec.stage, spec.options, spec.inputs, spec.outputs, used))
        if key not in self._traces:
            with tracing():
                self._traces[key] = _trace(spec, stage, longest_text)
        return self._traces[key]


class _Used:
    """Dimensions that remember which of them have been used."""

    def __init__(self, network: Dimensions) -> None:
        self._network = network
        self.used: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return self.used.setdefault(name, getattr(self._network, name))


def _trace(spec: GraphSpec, stage: torch.nn.Module, longest_text: int) -> bytes:
    samples = {
        name: torch.empty(
            _sample_shape(port, longest_text), dtype=DTYPES[port.dtype], device="meta"
        )
        for name, port in spec.inputs.items()
    }
    dims: dict[str, Any] = {}
    shapes = {
        name: {
            axis: _dim(size, dims, longest_text)
            for axis, size in enumerate(port.shape)
            if isinstance(size, str)
        }
        for name, port in spec.inputs.items()
    }
    program = torch.export.export(
        stage,
        (),
        kwargs=samples,
        dynamic_shapes=shapes,
        strict=False,
        # torch 2.11 does not see that min(2 w, 4 w) is 2 w, and refuses the latent stage.
        prefer_deferred_runtime_asserts_over_guards="w" in dims,
    )
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        output_names=list(spec.outputs),
        optimize=False,
        verbose=False,
        custom_translation_table=_OPERATIONS,
    )
    if exported is None:
        raise ExportError(f"torch exported nothing for stage {spec.stage}")
    model = exported.model
    # The optimiser would fold weights, which are not there: it sees them as inputs instead.
    weights = {name: model.graph.initializers.pop(name) for name in stage.state_dict()}
    for weight in weights.values():
        weight.const_value = None
    model.graph.inputs.extend(weights.values())
    optimize_ir(model)
    del model.graph.inputs[len(spec.inputs) :]
    for name, parameter in stage.state_dict().items():
        weights[name].const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            0,
            parameter.numel() * parameter.element_size(),
            _IR_TYPES[parameter.dtype],
            shape=ir.Shape(parameter.shape),
            name=name,
        )
        model.graph.initializers[name] = weights[name]
    _name_axes(model, spec)
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    for node in _nodes(proto.graph):
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.metadata_props[:]
    proto.graph.doc_string = ""
    proto.producer_name, proto.producer_version = "pid-trt", ""
    return proto.SerializeToString(deterministic=True)


def _dim(symbol: str, dims: dict[str, Any], longest_text: int) -> Any:
    largest = longest_text if symbol == "T" else 1 << 24
    return dims.setdefault(symbol, torch.export.Dim(symbol, min=1, max=largest))


def check_graph(name: str, content: bytes, spec: GraphSpec) -> None:
    """Check a graph with onnx.checker, and that its ports are the manifest's, symbols and all.

    Raises `ExportError` when a dimension that must stay symbolic was specialised.
    """
    model = onnx.load_from_string(content)
    onnx.checker.check_model(_without_weights(model), full_check=False)
    for ports, values in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
        found = {value.name: value for value in values}
        if list(found) != list(ports):
            raise ExportError(f"graph {name}: expected ports {list(ports)}, but got {list(found)}")
        for port_name, port in ports.items():
            tensor = found[port_name].type.tensor_type
            shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
            if shape != port.shape:
                raise ExportError(
                    f"graph {name}: expected {port_name} of shape {port.shape}, but got {shape}"
                )
            if tensor.elem_type != _IR_TYPES.get(DTYPES[port.dtype], ir.DataType.UINT8):
                raise ExportError(f"graph {name}: {port_name} is not {port.dtype}")
    constants = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if constants > 1 << 16:
        raise ExportError(
            f"graph {name} holds {constants} bytes of constants beside the weights file"
        )


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights as inputs: the checker wants external files to be there."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [t for t in bare.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for tensor in bare.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.add().CopyFrom(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    return bare


def _sample_shape(port: Port, longest_text: int) -> tuple[int, ...]:
    samples = {**_SAMPLES, "T": min(_SAMPLES["T"], longest_text)}
    return tuple(size if isinstance(size, int) else samples[size] for size in port.shape)


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Call symbolic axes what the manifest calls them; `check_graph` compares the sizes."""
    for ports, values in ((spec.inputs, model.graph.inputs), (spec.outputs, model.graph.outputs)):
        for value, port in zip(values, ports.values(), strict=True):
            traced = value.shape
            if traced is None or len(traced) != len(port.shape):
                raise ExportError(
                    f"expected {value.name} of rank {len(port.shape)}, but got {traced}"
                )
            value.shape = ir.Shape(
                wanted if isinstance(wanted, str) and not isinstance(got, int) else got
                for wanted, got in zip(port.shape, traced, strict=True)
            )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
