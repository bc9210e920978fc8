"""Models of other libraries as ONNX graphs with their weights beside them.

PiD's own stages are traced without weights, by `graphs`; these are small, or one graph each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from pid_export.graphs import ExportError
from pid_export.onnx_ports import OPSET
from pid_export.tracing import tracing
from pid_runtime.bundle.files import write_whole


def trace(
    model: torch.nn.Module,
    samples: Mapping[str, torch.Tensor],
    dims: Mapping[str, Mapping[int, Any]],
    output: str,
) -> torch.onnx.ONNXProgram:
    """The graph of a model.

    samples: inputs to trace with, by name. dims: of each the axes of any size, as torch.export's
    `Dim`. output: what to call the result.
    """
    with tracing(), torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (),
            # Of one tensor given twice, torch makes one input.
            kwargs={name: sample.clone() for name, sample in samples.items()},
            dynamo=True,
            opset_version=OPSET,
            output_names=[output],
            dynamic_shapes={name: dict(axes) for name, axes in dims.items()},
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"torch exported nothing for {type(model).__name__}")
    return program


def save_graph(program: torch.onnx.ONNXProgram, path: Path) -> onnx.ModelProto:
    """Write a graph, and its weights beside it; returns it without them.

    What torch says in it of the machine and the code that it was traced on is taken out.
    """
    program.save(path, external_data=True)
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for each in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del each.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    write_whole(path, model.SerializeToString(deterministic=True))
    return model
