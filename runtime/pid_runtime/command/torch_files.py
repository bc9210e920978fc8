"""Files that torch.save wrote."""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a dictionary by name, or one called "latent"; float16, or float32.

    Nothing but tensors and plain values is unpickled. Raises what torch raises.
    """
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    named = content if isinstance(content, dict) else {"latent": content}
    tensors = {str(k): v.detach() for k, v in named.items() if isinstance(v, torch.Tensor)}
    kept = (torch.float32, torch.float16)
    return {k: (v if v.dtype in kept else v.float()).numpy() for k, v in tensors.items()}
