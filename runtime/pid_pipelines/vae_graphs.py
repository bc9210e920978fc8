"""Autoencoders as ONNX graphs, which need neither torch nor diffusers. `pid-export --vae` makes
them.

A folder of `vae.json`, an encoder and, where it is known, a decoder. The encoder takes `image`,
float32 `[B, 3, H, W]` in [-1, 1], and gives normalised latents; the decoder takes `latent`,
`[B, C, h, w]`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.errors import PipelineInputError
from pid_pipelines.graph_files import GraphFile, Graphs, read_description
from pid_pipelines.vaes import check_decodes, check_image, check_latent, spec_of

Floats = NDArray[np.float32]

VAE_FILE = "vae.json"
ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"

FORMAT_VERSION = (1, 0)
"""Major and minor: of another major it is not read."""


@dataclass(frozen=True)
class VaeGraphs:
    """What `vae.json` says."""

    format_version: tuple[int, int]
    space: str
    kind: str
    """The class that it was, of diffusers or transformers."""
    source: str
    """Where its weights came from."""
    down: int
    """Pixels per latent pixel, along each axis."""
    channels: int
    """Channels of a latent."""
    files: dict[str, GraphFile]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def is_exported(vae: str | Path | None) -> bool:
    """Whether an autoencoder, which may be a repository's name, is a folder of graphs."""
    return vae is not None and (Path(vae).expanduser() / VAE_FILE).is_file()


def read_vae_graphs(folder: Path, space: str | None = None) -> VaeGraphs:
    """What an exported autoencoder says of itself.

    space: that it is wanted for. Raises `PipelineInputError` for that of another space, and as
    `read_description` does.
    """
    said = read_description(
        VaeGraphs, folder / VAE_FILE, FORMAT_VERSION[0], "an autoencoder", "--vae"
    )
    if space not in (None, said.space):
        raise PipelineInputError(
            f"expected the autoencoder of {space}, but {folder} holds that of {said.space}; take "
            f"that of {space}"
        )
    return said


class OnnxVae:
    """An autoencoder that ONNX Runtime runs; in use it is `vae_model.LoadedVae`."""

    def __init__(self, folder: Path, space: str | None = None, device: str = "cpu") -> None:
        """space: that it is wanted for. device: cpu, cuda or cuda:N, or a provider.

        Raises `PipelineInputError` as `read_vae_graphs` does.
        """
        said = read_vae_graphs(folder, space)
        self.down, self.channels = said.down, said.channels
        self._spec = spec_of(said.space)
        self.decodes = self._spec.decodes
        self._graphs = Graphs(folder, said.files, device)

    def encode(self, image: Floats) -> Floats:
        """As `LoadedVae.encode`."""
        check_image(image, self.down, self._spec.side)
        return self._graphs.run(ENCODER_FILE, {"image": np.ascontiguousarray(image, np.float32)})

    def decode(self, latent: Floats) -> Floats:
        """As `LoadedVae.decode`."""
        check_decodes(self._spec)
        check_latent(latent, self.channels)
        return self._graphs.run(DECODER_FILE, {"latent": np.ascontiguousarray(latent, np.float32)})

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.close()
