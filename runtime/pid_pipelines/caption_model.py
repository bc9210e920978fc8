"""The language model of captions, in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pid_pipelines.caption_tokens import Tokens
from pid_pipelines.errors import PipelineInputError
from pid_runtime.errors import memory_shortage

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ModelStates:
    """The last hidden states of a language model, after its final norm and without its head."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device = model, device

    def __call__(self, tokens: Tokens) -> NDArray[np.float32]:
        """States `[B, n, D]`, float32."""
        ids, mask = (torch.from_numpy(each).to(self._device) for each in (tokens.ids, tokens.mask))
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return states.last_hidden_state.float().cpu().numpy()


def load_model(folder: Path, name: str, dtype: str) -> Any:
    """Load an encoder on the CPU; name: what to call it in messages. dtype: fp32, fp16 or bf16.

    Attention is computed as it stands ("eager"): Gemma-2 caps its scores, which fused kernels of
    torch do not. Raises `PipelineInputError` for what transformers cannot load.
    """
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # commands have one of their own
    try:
        return AutoModel.from_pretrained(
            folder, dtype=_DTYPES[dtype], attn_implementation="eager", local_files_only=True
        )
    except Exception as error:  # classes of transformers, safetensors, the hub and others
        if memory_shortage(error) is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise PipelineInputError(
            f"expected {name} to be a language model that transformers loads, but got: {reason}; "
            "save it again with transformers"
        ) from error


def load_states(folder: Path, name: str, dtype: str, device: str) -> ModelStates:
    """An encoder on a device of torch; the rest as of `load_model`."""
    model = load_model(folder, name, dtype)
    try:
        return ModelStates(model.eval().to(device), device)
    except (RuntimeError, AssertionError) as error:
        if memory_shortage(error) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise PipelineInputError(
            f"expected a device of torch, but got {device!r}: {reason}; try cpu or cuda"
        ) from None
