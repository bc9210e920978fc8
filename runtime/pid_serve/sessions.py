"""What workers hold, and the tasks they are given: decoders of a bundle."""

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.before_decoding import captions_device, graph_device, torch_device
from pid_pipelines.upscale_codecs import check_tile, open_codec, pixels_per_latent, side_of
from pid_pipelines.vae_graphs import is_exported
from pid_pipelines.vae_tiles import VaeTile
from pid_pipelines.vaes import Codec
from pid_runtime.backends.choice import device_name
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.images import to_uint8
from pid_runtime.decoder import Decoder
from pid_runtime.latents import noisy
from pid_runtime.request import check_request
from pid_runtime.tiles import TileOption

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DecodeTask:
    """One image to make."""

    latent: NDArray[Any] | None
    """`[1, C, h, w]`, any floats; None to encode `photo`."""
    photo: Floats | None
    """`[1, 3, H, W]` in [-1, 1], as the codec takes it; None where there is a latent."""
    caption: NDArray[Any] | None
    """`[1, T, D]`, any floats; None for the empty one."""
    sigma: float
    """Noise level of the latent, 0 to 1; of a photo, that to add."""
    seed: int
    """Of 64 bits."""
    steps: int | None
    """None for the bundle's default."""
    tile: TileOption = None
    """As of `Decoder.decode`."""
    overlap: int | None = None
    """As of `Decoder.decode`."""
    negative: NDArray[Any] | None = None
    """As the caption, of undistilled bundles."""
    guidance: float | None = None
    """As of `Decoder.decode`."""
    preview: bool = False
    """Whether steps are to be seen."""
    native: bool = False
    """Whether what the latent's own decoder makes of it is wanted too."""

    def kind(self) -> Hashable:
        """What tasks of a batch have in common."""
        arrays = (self.latent, self.photo, self.caption, self.negative)
        return (
            self.steps,
            self.guidance,
            self.tile,
            self.overlap,
            *(None if each is None else each.shape for each in arrays),
        )


@dataclass(frozen=True)
class Step:
    """What is told after a step."""

    done: int
    steps: int
    preview: Bytes | None
    """The state, reduced: `[h, w, 3]`; None where nobody wants it."""


@dataclass(frozen=True)
class Made:
    """What came of a task."""

    image: Bytes
    """`[H, W, 3]`."""
    native: Bytes | None
    """`[h, w, 3]`, of the latent's own decoder; None if it is not wanted or not here."""


@dataclass(frozen=True)
class CaptionTask:
    """Prompts to encode."""

    texts: tuple[str, ...]
    length: int
    """Tokens of an embedding."""


@dataclass(frozen=True)
class About:
    """What a session of a bundle says of itself."""

    manifest: Manifest
    backend: str
    device: str
    multiple: int | None
    """Pixels of a picture per latent pixel, along each axis; None where pictures are not taken."""
    side: int | None = None
    """Of the squares that pictures are made, in pixels; None where they stay as they are."""


@dataclass(frozen=True)
class OpenDecoder:
    """Opens a bundle in a worker; fields are the arguments of `Decoder.open`, and an autoencoder
    as `open_codec` takes it.
    """

    bundle: Path
    backend: str = "onnxruntime"
    device: str | None = None
    threads: int | None = None
    verify: bool = True
    engines: str | None = None
    cuda_graphs: bool = True
    vae: str | None = None
    vae_tile: VaeTile = None

    def __call__(self) -> "DecodeSession":
        decoder = Decoder.open(
            self.bundle,
            self.backend,
            self.device,
            threads=self.threads,
            verify=self.verify,
            engines=self.engines,
            cuda_graphs=self.cuda_graphs,
        )
        return DecodeSession(decoder, self, about_of(self))


def about_of(opener: OpenDecoder) -> About:
    """What its session will say, without opening it."""
    manifest = read_manifest(opener.bundle, verify=False)
    takes_pictures = manifest.codec is not None or opener.vae is not None
    multiple = pixels_per_latent(manifest) if takes_pictures else None
    check_tile(manifest, opener.vae_tile)
    device = device_name(opener.backend, opener.device)
    return About(manifest, opener.backend, device, multiple, side_of(manifest))


class DecodeSession:
    """A decoder, and what encodes photos for it."""

    def __init__(self, decoder: Decoder, opener: OpenDecoder, about: About) -> None:
        manifest, device, vae = decoder.manifest, decoder.device, opener.vae
        self._decoder, self.about = decoder, about
        self._codec: Codec | None = None
        if about.multiple is not None:
            find = graph_device if manifest.codec or is_exported(vae) else torch_device
            where = find(opener.backend, device)
            self._codec = open_codec(manifest, vae, where, opener.vae_tile)

    def run(
        self, tasks: Sequence[DecodeTask], report: Callable[[Sequence[Any]], None]
    ) -> list[Made]:
        """Images of tasks of one kind; reports a `Step` for each."""
        captions = [task.caption for task in tasks if task.caption is not None]
        negatives = [task.negative for task in tasks if task.negative is not None]
        latents = [self._latent(task) for task in tasks]
        request = check_request(
            self.about.manifest,
            np.concatenate(latents),
            np.concatenate(captions) if captions else None,
            sigma=[task.sigma for task in tasks],
            seed=[task.seed for task in tasks],
            steps=tasks[0].steps,
            negative=np.concatenate(negatives) if negatives else None,
            guidance=tasks[0].guidance,
            tile=tasks[0].tile,
            overlap=tasks[0].overlap,
        )

        def progress(done: int, steps: int) -> None:
            previews: list[Bytes | None] = [None] * len(tasks)
            if any(task.preview for task in tasks):
                state = self._decoder.state()
                grid = request.sizes.value("Hs"), request.sizes.value("Ws")
                previews = [
                    _preview(each, grid) if task.preview else None
                    for task, each in zip(tasks, state, strict=True)
                ]
            report([Step(done, steps, preview) for preview in previews])

        images = self._decoder.run(request, "uint8", progress=progress)
        natives = [
            self._native(latent) if task.native else None
            for task, latent in zip(tasks, latents, strict=True)
        ]
        return [Made(image, native) for image, native in zip(images, natives, strict=True)]

    def _latent(self, task: DecodeTask) -> NDArray[Any]:
        if task.latent is not None:
            return task.latent
        assert self._codec is not None and task.photo is not None
        return noisy(self.about.manifest, self._codec.encode(task.photo), task.sigma, task.seed)

    def _native(self, latent: NDArray[Any]) -> Bytes | None:
        if self._codec is None or not self._codec.decodes:
            return None
        image = self._codec.decode(latent.astype(np.float32, copy=False))
        return to_uint8(np.clip(image, -1, 1))[0]

    def close(self) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(self._decoder.close)
            if self._codec is not None:
                ending.callback(self._codec.close)


_PREVIEW = 256
"""About the longest side of a preview, in pixels."""


def _preview(state: Floats, grid: tuple[int, int]) -> Bytes:
    """A state `[L, P * P, 3]` of rows and columns of patches, reduced to about `_PREVIEW`."""
    side = math.isqrt(state.shape[1])
    whole = max(grid) * side
    by = next((n for n in range(1, side) if side % n == 0 and whole // n <= _PREVIEW), side)
    kept = side // by
    patches = state.reshape(*grid, kept, by, kept, by, 3).mean((3, 5))
    # (rows, columns, y, x, 3) -> (rows, y, columns, x, 3)
    image = patches.swapaxes(1, 2).reshape(grid[0] * kept, grid[1] * kept, 3)
    return to_uint8(np.moveaxis(np.clip(image, -1, 1), -1, 0))


@dataclass(frozen=True)
class OpenEncoder:
    """Opens what encodes prompts in a worker: a language model, or a captioner's graph."""

    encoder: str
    """As `CaptionEncoder` takes it."""
    backend: str
    device: str | None

    def __call__(self) -> "CaptionSession":
        from pid_pipelines.captions import CaptionEncoder  # needs an extra

        device = captions_device(self.encoder, self.backend, self.device)
        return CaptionSession(CaptionEncoder(self.encoder, device=device, width=None))


class CaptionSession:
    """An encoder of prompts."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.about: int = encoder.width

    def run(
        self, tasks: Sequence[CaptionTask], report: Callable[[Sequence[Any]], None]
    ) -> list[Floats]:
        """Embeddings `[B, T, D]` of the texts of every task; nothing is reported."""
        return [self._encoder.encode(task.texts, task.length) for task in tasks]

    def close(self) -> None:
        self._encoder.close()
