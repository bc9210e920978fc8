"""The language model of captions to a captioner: one ONNX graph, its weights and its tokenizer.

pid_pipelines.captioner says what is in the folder, and runs it.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from pid_export.graphs import ExportError
from pid_export.traced_model import save_graph, trace
from pid_pipelines.caption_model import load_model
from pid_pipelines.caption_tokens import TOKENIZER_FILES, CaptionTokenizer, instruction
from pid_pipelines.captioner import (
    CAPTIONER_FILE,
    FORMAT_VERSION,
    GRAPH_FILE,
    WEIGHTS_FILE,
    Captioner,
)
from pid_pipelines.captions import DTYPES, find_encoder, width_of
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.graph_files import files_of
from pid_runtime.bundle.files import check_new, check_space, whole_folder, write_whole

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
        sample = torch.ones((2, 37), dtype=torch.int64)
        dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("n")}
        program = trace(
            _States(model), dict.fromkeys(INPUTS, sample), dict.fromkeys(INPUTS, dims), "states"
        )
        advance(0.4)
        graph = save_graph(program, aside / GRAPH_FILE)
        del program, model
        gc.collect()
        advance(0.3)
        _check(graph, width)
        tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        for name in tokenizer:
            shutil.copyfile(folder / name, aside / name)
        files = files_of(aside, (GRAPH_FILE, WEIGHTS_FILE, *tokenizer))
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


def _check(model: onnx.ModelProto, width: int) -> None:
    """Raise `ExportError` unless a graph has the ports it must have, of dynamic sizes."""
    graph = model.graph
    ports = {
        port.name: [each.dim_param or each.dim_value for each in port.type.tensor_type.shape.dim]
        for port in (*graph.input, *graph.output)
    }
    tokens = ports.get(INPUTS[0], [])
    named = len(tokens) == 2 and all(isinstance(each, str) for each in tokens)
    if not named or ports != {**dict.fromkeys(INPUTS, tokens), "states": [*tokens, width]}:
        raise ExportError(f"the caption encoder's graph has other ports: {ports}")
