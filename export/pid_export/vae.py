"""An autoencoder of a latent space to two ONNX graphs, which pid_pipelines.vae_graphs runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pid_export.traced_model import save_graph, trace
from pid_pipelines.graph_files import files_of
from pid_pipelines.vae_files import find_vae, read_vae
from pid_pipelines.vae_graphs import (
    DECODER_FILE,
    ENCODER_FILE,
    FORMAT_VERSION,
    VAE_FILE,
    VaeGraphs,
)
from pid_pipelines.vae_model import decode_raw, encode_mean, normalization
from pid_pipelines.vaes import Vae, spec_of
from pid_runtime.bundle.files import check_new, check_space, whole_folder, write_whole

LARGEST_SIDE = 4096
"""Of a latent, that the graphs are traced for."""


def export_vae(
    space: str,
    source: str | Path | None,
    output: Path,
    advance: Callable[[float], object] = lambda part: None,
) -> VaeGraphs:
    """Export a space's autoencoder in float32; returns what was written into `vae.json`.

    source: as of `pid_pipelines.vae_model.load_vae`. advance: called with the part done, of 1,
    since the last call. Graphs take any batch, and any size that the autoencoder does; statistics
    of the space are in them.
    Raises `PipelineInputError` for what is no autoencoder of the space, and `PidRuntimeError` for
    an output that is there already or has no room.
    """
    spec = spec_of(space)
    check_new(output)
    found = find_vae(space, spec, source)
    model = read_vae(space, spec, found).eval().requires_grad_(False)
    advance(0.1)
    needed = sum(4 * each.numel() for each in model.parameters())
    with whole_folder(output) as aside:
        check_space(aside, needed, "the autoencoder", "choose another place with -o")
        ways = _ways(spec)
        for way, file, name, shape, dims in ways:
            program = trace(way(spec, model), {name: torch.zeros(shape)}, {name: dims}, "result")
            save_graph(program, aside / file)
            del program
            advance(0.8 / len(ways))
        files = files_of(aside, sorted(path.name for path in aside.iterdir()))
        origin = str(source or spec.repository or f"nvidia/PiD {spec.file}")
        said = VaeGraphs(FORMAT_VERSION, space, spec.kind, origin, spec.down, spec.channels, files)
        write_whole(aside / VAE_FILE, said.to_json() + "\n")
        advance(0.1)
    return said


def _ways(
    spec: Vae,
) -> list[tuple[type["_Way"], str, str, tuple[int, ...], dict[int, Any]]]:
    """What is traced: into which file, and its input's name, shape, and dimensions of any size."""
    down = spec.down
    dims: dict[int, Any] = {0: torch.export.Dim("B")}
    if spec.side is None:
        h, w = (torch.export.Dim(name, min=2, max=LARGEST_SIDE) for name in ("h", "w"))
        height, width = 3, 5
        of_image, of_latent = dims | {2: down * h, 3: down * w}, dims | {2: h, 3: w}
    else:
        height = width = spec.side // down
        of_image = of_latent = dims
    image, latent = (2, 3, height * down, width * down), (2, spec.channels, height, width)
    encode = (_Encode, ENCODER_FILE, "image", image, of_image)
    decode = (_Decode, DECODER_FILE, "latent", latent, of_latent)
    return [encode, decode] if spec.decodes else [encode]


class _Way(nn.Module):
    """One way through an autoencoder, with the space's normalisation."""

    factor: Tensor
    shift: Tensor

    def __init__(self, spec: Vae, model: Any) -> None:
        super().__init__()
        self.kind, self.model = spec.kind, model
        factor, shift = normalization(spec, model)
        self.register_buffer("factor", factor.clone())
        self.register_buffer("shift", shift.clone())


class _Encode(_Way):
    def forward(self, image: Tensor) -> Tensor:
        return (encode_mean(self.kind, self.model, image) - self.shift) * self.factor


class _Decode(_Way):
    def forward(self, latent: Tensor) -> Tensor:
        return decode_raw(self.kind, self.model, latent / self.factor + self.shift)
