"""The language model of captions to a captioner: one ONNX graph, its weights and its tokenizer.

pid_pipelines.captioner says what is in the folder, and runs it.
"""

import gc
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from pid_export.graphs import ExportError, interrupts_held
from pid_export.onnx_ports import OPSET
from pid_pipelines.caption_model import load_model
from pid_pipelines.caption_tokens import TOKENIZER, CaptionTokenizer, instruction
from pid_pipelines.captioner import (
    CAPTIONER_FILE,
    FORMAT_VERSION,
    GRAPH_FILE,
    WEIGHTS_FILE,
    Captioner,
    CaptionerFile,
)
from pid_pipelines.captions import DTYPES, find_encoder, width_of
from pid_pipelines.errors import PipelineInputError
from pid_runtime.bundle.files import check_new, check_space, file_sha256, whole_folder, write_whole

INPUTS = ("input_ids", "attention_mask")


def export_captioner(
    encoder: str | Path,
    output: Path,
    precision: str = "fp32",
    advance: Callable[[float], object] = lambda part: None,
) -> Captioner:
    """Export an encoder of captions; returns what was written into `captioner.json`.

    encoder: a folder as transformers saves it, or a repository of the hub. precision: fp32, fp16
    or bf16; norms and softmax are computed in float32 in each. advance: called with the part done,
    of 1, since the last call.
    Needs host memory for the weights in that precision, and a gigabyte.
    Raises `PipelineInputError` for what is no encoder, and `PidRuntimeError` for an output that is
    there already or has no room.
    """
    if precision not in DTYPES:
        raise PipelineInputError(f"expected --precision {', '.join(DTYPES)}, but got {precision!r}")
    check_new(output)
    folder, revision = find_encoder(encoder)
    width, text = width_of(folder), instruction()
    CaptionTokenizer(folder, text)  # refuses one without
    model = load_model(folder, str(encoder), precision).eval()
    advance(0.2)
    needed = sum(each.numel() * each.element_size() for each in model.parameters())
    with whole_folder(output) as aside:
        check_space(aside, needed, "the captioner", "choose another place with -o")
        with interrupts_held():
            program = _traced(model)
        advance(0.4)
        program.save(aside / GRAPH_FILE, external_data=True)
        del program, model
        gc.collect()
        advance(0.3)
        _finish(aside / GRAPH_FILE, width)
        shutil.copyfile(folder / TOKENIZER, aside / TOKENIZER)
        names = (GRAPH_FILE, WEIGHTS_FILE, TOKENIZER)
        files = {
            name: CaptionerFile((aside / name).stat().st_size, file_sha256(aside / name))
            for name in names
        }
        name = folder.name if folder == Path(encoder).expanduser() else str(encoder)
        captioner = Captioner(FORMAT_VERSION, name, revision, precision, width, text, files)
        write_whole(aside / CAPTIONER_FILE, captioner.to_json() + "\n")
        advance(0.1)
    return captioner


class _States(torch.nn.Module):
    """The model with its last hidden states alone as result, in float32.

    NumPy has no bfloat16, in which ONNX Runtime could not hand them out.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found.last_hidden_state.float()


def _traced(model: torch.nn.Module) -> torch.onnx.ONNXProgram:
    """The graph, for any batch and any number of tokens."""
    sample = {name: torch.ones((2, 37), dtype=torch.int64) for name in INPUTS}
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("n")}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _States(model).eval(),
                (),
                kwargs=sample,
                dynamo=True,
                opset_version=OPSET,
                output_names=["states"],
                dynamic_shapes=dict.fromkeys(INPUTS, dims),
                optimize=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    if program is None:
        raise ExportError("torch exported nothing for the caption encoder")
    return program


def _finish(path: Path, width: int) -> None:
    """Take out of a graph what torch says of the machine and the code that it was traced on.

    Raises `ExportError` unless it has the ports it must have, of dynamic sizes.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for each in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del each.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    write_whole(path, model.SerializeToString(deterministic=True))
    ports = {
        port.name: [each.dim_param or each.dim_value for each in port.type.tensor_type.shape.dim]
        for port in (*graph.input, *graph.output)
    }
    tokens = ports.get(INPUTS[0], [])
    named = len(tokens) == 2 and all(isinstance(each, str) for each in tokens)
    if not named or ports != {**dict.fromkeys(INPUTS, tokens), "states": [*tokens, width]}:
        raise ExportError(f"the caption encoder's graph has other ports: {ports}")
