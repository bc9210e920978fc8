"""Tokens of captions, as the decoders were trained: an instruction, then the caption, then padding.

The instruction fills the front of what the encoder reads and is cut away from its result, but for
the first token and the last that make the length. Needs numpy and tokenizers, not torch.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pid_pipelines.errors import PipelineInputError

TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"

TOKENIZER_FILES = (TOKENIZER, _CONFIG)
"""All that is read of a tokenizer; the second one need not be there."""

INSTRUCTION_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"
"""Of the instruction in UTF-8, which is the one that the decoders were trained with."""

_log = logging.getLogger(__name__)


def instruction() -> str:
    """The text in front of every caption: diffusers' default for Sana, in one string.

    Raises `PipelineInputError` when the diffusers that is installed has another one.
    """
    from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

    parameters = inspect.signature(SanaPipeline.__call__).parameters
    lines: Any = parameters["complex_human_instruction"].default
    text = "\n".join(lines or ()).replace("'Enhanced prompt'", '"Enhanced prompt"')
    if hashlib.sha256(text.encode()).hexdigest() != INSTRUCTION_SHA256:
        raise PipelineInputError(
            "expected diffusers with the instruction that the decoders were trained with, but "
            "the one installed has another; pip install 'diffusers==0.42.1'"
        )
    return text


@dataclass(frozen=True)
class Tokens:
    """What an encoder reads for some captions, and which of its states are the embedding."""

    ids: NDArray[np.int64]
    """`[B, n]`."""
    mask: NDArray[np.int64]
    """`[B, n]`, 0 for padding."""
    length: int
    """Tokens of an embedding: the first one, and the last `length - 1`."""

    def select(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of states `[B, n, D]` the embedding `[B, length, D]`."""
        return np.concatenate([states[:, :1], states[:, 1 - self.length :]], axis=1)


class CaptionTokenizer:
    """Makes tokens of captions with an encoder's own tokenizer."""

    def __init__(self, folder: Path, instruction: str) -> None:
        """folder: has `tokenizer.json`. instruction: "" for captions as they stand.

        Raises `PipelineInputError` when it has none, or one that marks no beginning.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise PipelineInputError(
                f"expected {TOKENIZER} beside the encoder, but {folder} has none; save it there "
                "with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(folder)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise PipelineInputError(
                f"expected {path} to be a tokenizer, but got: {reason}; save it again with "
                "transformers"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._first = self._beginning(folder)
        self._instruction = instruction
        self._pad = self._special("<pad>") or 0

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """Tokens of captions for embeddings of `length` tokens; warns of captions that are cut."""
        before = len(self._encode("")) if self._instruction else 2
        most = before + length - 2
        ids = np.full((len(texts), most), self._pad, np.int64)
        mask = np.zeros((len(texts), most), np.int64)
        for row, text in enumerate(texts):
            found = self._encode(text)
            if len(found) > most:
                _log.warning(
                    "a caption is %d tokens too long and is cut: %r; %d fit",
                    len(found) - most,
                    f"{text[:40]}.." if len(text) > 40 else text,
                    most - before + (0 if self._instruction else 1),
                )
            kept = found[:most]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
        return Tokens(ids, mask, length)

    def _encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(self._instruction + text).ids)
        return ids if ids[:1] == [self._first] else [self._first, *ids]

    def _beginning(self, folder: Path) -> int:
        """The token every text begins with, which some tokenizers leave to their users."""
        name = "<bos>"
        config = folder / _CONFIG
        if config.is_file():
            given = json.loads(config.read_text("utf-8")).get("bos_token", name)
            name = given["content"] if isinstance(given, dict) else given
        found = self._special(name)
        if found is None:
            raise PipelineInputError(
                f"expected a tokenizer with {name!r}, which every caption begins with, but "
                f"{folder / TOKENIZER} has none; take the encoder's own"
            )
        return found

    def _special(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)
