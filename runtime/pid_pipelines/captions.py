"""Caption embeddings, made of text by the language model that the decoders were trained with.

That is Gemma-2-2b-it: its last hidden states, also those of the padding, with an instruction in
front that is cut away. It is larger than the decoder, so it is loaded when a caption is not in the
cache, and gone when the encoder is closed.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.caption_cache import CaptionCache
from pid_pipelines.caption_tokens import TOKENIZER, CaptionTokenizer, Tokens, instruction
from pid_pipelines.captioner import Captioner, GraphStates, is_captioner, read_captioner
from pid_pipelines.errors import PipelineInputError
from pid_ref.hub import why_not
from pid_runtime.backends.memory import trim_heap

Floats = NDArray[np.float32]

Dtype = Literal["fp32", "fp16", "bf16"]

DEFAULT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"
"""A copy of google/gemma-2-2b-it that the hub gives without asking for a login."""

LENGTH = 300
"""Tokens of an embedding that the released decoders take."""

WIDTH = 2304
"""Channels of an embedding that the released decoders take: Gemma-2-2b's hidden size."""

DTYPES = ("fp32", "fp16", "bf16")

_FILES = ["*.json", "*.safetensors"]
"""What of a repository is fetched."""

_BATCH = 4
"""Captions that are encoded at once."""


class States(Protocol):
    """A language model, loaded."""

    def __call__(self, tokens: Tokens) -> Floats:
        """Its last hidden states `[B, n, D]`, float32."""
        ...


class CaptionEncoder:
    """Encodes captions. Loads the language model when one is asked for that the cache has not.

    with CaptionEncoder() as encoder:
        caption = encoder.encode(["a small boat"])  # [1, 300, 2304]
    """

    def __init__(
        self,
        encoder: str | Path = DEFAULT_ENCODER,
        *,
        dtype: Dtype | None = None,
        device: str = "cpu",
        cache: CaptionCache | None = None,
        width: int | None = WIDTH,
    ) -> None:
        """encoder: a folder as transformers saves it, a repository of the hub, or a captioner.

        dtype: what it computes in; None for bf16, in which it was trained, and of a captioner for
        what it was exported in. device: torch's name of it, or ONNX Runtime's for a captioner.
        cache: None keeps nothing. width: channels that the decoder wants; None for any.
        Raises `PipelineInputError` for an encoder that cannot be had or has another width.
        """
        if dtype not in (None, *DTYPES):
            raise PipelineInputError(f"expected dtype {' or '.join(DTYPES)}, but got {dtype!r}")
        self.name = str(encoder)
        self._folder, self.revision = find_encoder(encoder)
        self._device, self._cache = device, cache
        self._captioner: Captioner | None = None
        if is_captioner(self._folder):
            self._captioner = read_captioner(self._folder)
            if dtype not in (None, self._captioner.precision):
                raise PipelineInputError(
                    f"expected {self._captioner.precision}, which {encoder} was exported in, but "
                    f"got {dtype}; leave it out, or export another with --precision {dtype}"
                )
            dtype, self.width = cast(Dtype, self._captioner.precision), self._captioner.width
        else:
            self.width = width_of(self._folder)
        self.dtype: Dtype = dtype or "bf16"
        if width is not None and self.width != width:
            raise PipelineInputError(
                f"expected an encoder of hidden size {width}, which the decoder's captions have, "
                f"but {self.name} has {self.width}; take {DEFAULT_ENCODER}, or the encoder that "
                "the decoder was trained with"
            )
        self._states: States | None = None
        self._is_open = True

    def encode(
        self,
        texts: Sequence[str],
        length: int = LENGTH,
        *,
        plain: bool = False,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Floats:
        """Embeddings of captions, float32 `[len(texts), length, width]`.

        "" is a caption like any other. One that is too long is cut, with a warning of how many
        tokens were lost. length: at least 2. plain: without the instruction in front. progress:
        called with how many more captions are done.
        Raises `PipelineInputError` for no texts, or what is no text.
        """
        if not self._is_open:
            raise PipelineInputError("expected an open encoder, but it was closed; open another")
        given: Sequence[Any] = texts
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in given):
            raise PipelineInputError(
                f"expected a list of captions, but got {texts!r:.60}; give texts, as ['a boat']"
            )
        if length < 2:
            raise PipelineInputError(f"expected a length of at least 2 tokens, but got {length}")
        found = {text: self._known(text, length, plain) for text in dict.fromkeys(texts)}
        missing = [text for text, caption in found.items() if caption is None]
        progress(len(texts) - len(missing))
        if missing:
            tokenizer = CaptionTokenizer(self._folder, "" if plain else self._instruction())
            states = self._load()
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                tokens = tokenizer(batch, length)
                captions = tokens.select(states(tokens))
                self._check_finite(captions)
                for text, caption in zip(batch, captions, strict=True):
                    found[text] = caption
                    if self._cache is not None:
                        self._cache.put(self._key(text, length, plain), self._rounded(caption))
                progress(len(batch))
        return np.stack([caption for text in texts if (caption := found[text]) is not None])

    def __enter__(self) -> "CaptionEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, texts: Sequence[str], length: int = LENGTH, *, plain: bool = False) -> bool:
        """Whether all of these captions are in the cache, so that no model is needed."""
        return all(self._known(text, length, plain) is not None for text in set(texts))

    def close(self) -> None:
        """Give the language model's memory back; nothing can be encoded afterwards."""
        self._is_open = False
        self.unload()

    def unload(self) -> None:
        """Give the language model's memory back; the next caption loads it again."""
        if self._states is None:
            return
        states, self._states = self._states, None
        if isinstance(states, GraphStates):
            states.close()
        del states
        gc.collect()
        trim_heap()
        if self._captioner is None and self._device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def _check_finite(self, captions: Floats) -> None:
        """Raise `PipelineInputError` for embeddings that no decoder could use."""
        if not np.isfinite(captions).all():
            fix = "take bf16 or fp32" if self.dtype == "fp16" else "its weights are broken"
            raise PipelineInputError(
                f"expected finite caption embeddings, but {self.name} in {self.dtype} made NaN or "
                f"infinity; {fix}"
            )

    def _known(self, text: str, length: int, plain: bool) -> Floats | None:
        if self._cache is None:
            return None
        found = self._cache.get(self._key(text, length, plain))
        return found if found is not None and found.shape == (length, self.width) else None

    def _key(self, text: str, length: int, plain: bool) -> dict[str, Any]:
        return {
            "encoder": self.revision,
            "text": text,
            "length": length,
            "dtype": self.dtype,
            "plain": plain,
        }

    def _rounded(self, caption: Floats) -> NDArray[Any]:
        """In the precision that it was computed in, which takes less room."""
        return rounded(caption, self.dtype)

    def _instruction(self) -> str:
        return instruction() if self._captioner is None else self._captioner.instruction

    def _load(self) -> States:
        if self._states is None and self._captioner is not None:
            self._states = GraphStates(self._folder, self._captioner, self._device)
        if self._states is None:
            from pid_pipelines.caption_model import load_states

            self._states = load_states(self._folder, self.name, self.dtype, self._device)
        return self._states


def rounded(caption: Floats, dtype: str) -> NDArray[Any]:
    """An embedding in a precision of `DTYPES`."""
    import ml_dtypes

    kinds: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return caption.astype(kinds[dtype])


def find_encoder(encoder: str | Path) -> tuple[Path, str]:
    """The folder of an encoder, fetched if need be, and what tells its contents from others.

    Raises `PipelineInputError` for one that cannot be had.
    """
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return folder, f"sha256:{_digest(folder)}"
    try:
        from huggingface_hub import (
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]
        )

        found = Path(snapshot_download(str(encoder), allow_patterns=_FILES))
    except ImportError:
        raise
    except Exception as error:
        raise PipelineInputError(
            f"expected the caption encoder {encoder}, but {why_not(error)}; {DEFAULT_ENCODER} "
            "needs no login, and a folder that holds it needs no network"
        ) from error
    return found, f"{encoder}@{found.name}"  # a snapshot's folder is named by its commit


def _digest(folder: Path) -> str:
    """Of an encoder's configuration and tokenizer, and of the size and age of its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.is_file():
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def width_of(folder: Path) -> int:
    """Channels of an encoder's states. Raises `PipelineInputError` for a folder without one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        return int(config["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise PipelineInputError(
            f"expected an encoder as transformers saves it, with config.json and {TOKENIZER}, but "
            f"{folder} has no config.json with a hidden_size; give the folder of a language model"
        ) from None
