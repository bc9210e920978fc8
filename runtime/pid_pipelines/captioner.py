"""Captioners: the language model of captions as an ONNX graph, which needs neither torch nor
transformers. `pid-export --caption-encoder` makes them.

A folder of `captioner.json`, the graph and its weights, and the model's tokenizer. The graph takes
`input_ids` and `attention_mask`, int64 `[B, n]`, and gives `states`, float32 `[B, n, width]`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.caption_tokens import TOKENIZER_FILES, Tokens
from pid_pipelines.graph_files import GraphFile, Graphs, check_unaltered, read_description
from pid_runtime.backends.choice import split_device

CAPTIONER_FILE = "captioner.json"
GRAPH_FILE = "captioner.onnx"
WEIGHTS_FILE = "captioner.onnx.data"

FORMAT_VERSION = (1, 0)
"""Major and minor: of another major a captioner is not read."""


@dataclass(frozen=True)
class Captioner:
    """What `captioner.json` says."""

    format_version: tuple[int, int]
    encoder: str
    """Where the model came from: a repository, or the name of a folder."""
    revision: str
    """What tells the model from others: a commit, or a hash of its folder."""
    precision: str
    """fp32, fp16 or bf16."""
    width: int
    """Channels of an embedding."""
    instruction: str
    """The text in front of every caption."""
    files: dict[str, GraphFile]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def is_captioner(encoder: str | Path) -> bool:
    """Whether an encoder, which may be a repository's name, is the folder of a captioner."""
    return (Path(encoder).expanduser() / CAPTIONER_FILE).is_file()


def read_captioner(folder: Path) -> Captioner:
    """What a captioner says of itself. Raises `PipelineInputError` as `read_description` does."""
    path = folder / CAPTIONER_FILE
    return read_description(Captioner, path, FORMAT_VERSION[0], "a captioner", "--caption-encoder")


class GraphStates:
    """The last hidden states of a captioner's model, by ONNX Runtime."""

    def __init__(self, folder: Path, captioner: Captioner, device: str) -> None:
        """device: as of `Graphs`.

        Raises `PidRuntimeError` for a device that is none or lacks the precision, and
        `PipelineInputError` for a tokenizer that was altered.
        """
        from pid_runtime.backends.onnxruntime import check_precision, find_provider

        provider = find_provider(split_device(device)[0])
        check_precision(provider, captioner.precision, "run it on a GPU")
        tokenizer = [name for name in captioner.files if name in TOKENIZER_FILES]
        check_unaltered(folder, captioner.files, tokenizer)
        self._graphs = Graphs(folder, captioner.files, device)

    def __call__(self, tokens: Tokens) -> NDArray[np.float32]:
        """States `[B, n, D]`, float32."""
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        return self._graphs.run(GRAPH_FILE, inputs)

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.close()
