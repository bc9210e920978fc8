"""Captioners: the language model of captions as an ONNX graph, which needs neither torch nor
transformers. `pid-export --caption-encoder` makes them.

A folder of `captioner.json`, the graph and its weights, and the model's tokenizer. The graph takes
`input_ids` and `attention_mask`, int64 `[B, n]`, and gives `states`, float32 `[B, n, width]`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.caption_tokens import Tokens
from pid_pipelines.errors import PipelineInputError
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.json_reader import read_member

CAPTIONER_FILE = "captioner.json"
GRAPH_FILE = "captioner.onnx"
WEIGHTS_FILE = "captioner.onnx.data"

FORMAT_VERSION = (1, 0)
"""Major and minor: of another major a captioner is not read."""


@dataclass(frozen=True)
class CaptionerFile:
    """A file of a captioner."""

    bytes: int
    sha256: str


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
    files: dict[str, CaptionerFile]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def is_captioner(encoder: str | Path) -> bool:
    """Whether an encoder, which may be a repository's name, is the folder of a captioner."""
    return (Path(encoder).expanduser() / CAPTIONER_FILE).is_file()


def read_captioner(folder: Path) -> Captioner:
    """What a captioner says of itself; its files are looked for, and not yet read.

    Raises `PipelineInputError` for one of another format, or a file that is not there or cut.
    """
    path = folder / CAPTIONER_FILE
    try:
        raw: Any = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict) or raw.get("format_version", [0])[0] != FORMAT_VERSION[0]:
            raise ValueError(f"it is not of format {FORMAT_VERSION[0]}")
        captioner = read_member(Captioner, raw, CAPTIONER_FILE)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise PipelineInputError(
            f"expected a captioner, as pid-export --caption-encoder makes it, but cannot read "
            f"{path}: {error}; export it again"
        ) from None
    for name, file in captioner.files.items():
        found = folder / name
        size = found.stat().st_size if found.is_file() else None
        if size != file.bytes:
            got = "it is missing" if size is None else f"it has {size}"
            raise PipelineInputError(
                f"expected {file.bytes} bytes in {found}, but {got}; export the captioner again"
            )
    return captioner


class GraphStates:
    """The last hidden states of a captioner's model, by ONNX Runtime."""

    def __init__(self, folder: Path, captioner: Captioner, device: str) -> None:
        """device: cpu, cuda or cuda:N, or a provider of ONNX Runtime.

        Raises `PipelineInputError` for files that were altered, and `PidRuntimeError` for a
        provider that is not there.
        """
        from pid_runtime.backends import onnxruntime, scratch

        for name, file in captioner.files.items():
            if file_sha256(folder / name) != file.sha256:
                raise PipelineInputError(
                    f"expected the captioner as it was exported, but {folder / name} was altered; "
                    "export it again"
                )
        name, _, ordinal = device.partition(":")
        provider = onnxruntime.find_provider(name)
        onnxruntime.check_precision(provider, captioner.precision, "run it on a GPU")
        self._session = onnxruntime.open_session(
            folder / GRAPH_FILE, provider, int(ordinal) if ordinal.isdecimal() else 0
        )
        self._give_back = scratch.give_back

    def __call__(self, tokens: Tokens) -> NDArray[np.float32]:
        """States `[B, n, D]`, float32."""
        (states,) = self._session.run(
            ["states"], {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        )
        return np.asarray(states, np.float32)

    def close(self) -> None:
        """Give the memory back that the session works in."""
        del self._session
        self._give_back()
