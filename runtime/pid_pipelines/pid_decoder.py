"""`PidDecoder`: PiD in place of the VAE's decoder of a pipeline of diffusers."""

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.backbones import BACKBONES, check_space
from pid_pipelines.before_decoding import captions_device
from pid_pipelines.caption_cache import CaptionCache
from pid_pipelines.captions import DEFAULT_ENCODER, CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_latents import pid_latent
from pid_pipelines.generator_run import Catcher, size_of, to_numpy
from pid_pipelines.generators import raw_rule, space_of
from pid_ref.registry import SPACES, LatentSpace
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Decoder

Floats = NDArray[np.float32]

_log = logging.getLogger("pid_pipelines")

PROMPT = "pid_prompt"
"""Argument of an attached pipeline's call: what is to be seen, where it gets embeddings."""

OUTPUT_TYPES = ("pil", "np", "pt")


class PidDecoder:
    """Decodes what pipelines of diffusers make, by a bundle.

    pid = PidDecoder("flux-2k", device="cuda").attach(pipe)
    image = pipe("a boat on a lake", height=512, width=512).images[0]  # 2048 x 2048

    The decoder is opened when it is first needed and kept; the language model of captions is gone
    before the pipeline runs, and the decoder while that model is there. With `resident` both stay.
    """

    def __init__(
        self,
        bundle: str | Path,
        backend: str = "onnxruntime",
        device: Any = None,
        *,
        encoder: str | Path = DEFAULT_ENCODER,
        cache: CaptionCache | None = None,
        resident: bool = False,
        **options: Any,
    ) -> None:
        """bundle, backend, device, options: as of `Decoder.open`.

        encoder: of captions, as `CaptionEncoder` takes it. cache: of captions; None for the
        user's own, which `pid-caption` uses too.
        Raises `PidRuntimeError` for a broken bundle.
        """
        self.path = Path(bundle).expanduser()
        self.manifest = read_manifest(self.path, verify=False)
        self._backend, self._device, self._options = backend, device, options
        self._encoder_name, self._cache = encoder, cache or CaptionCache()
        self._resident = resident
        self._encoder: CaptionEncoder | None = None
        self._decoder: Decoder | None = None
        self._pipe: Any = None
        self._pipe_kind: Any = None
        self._is_open = True

    def attach(self, pipe: Any, *, stop_at: int | None = None, **decoding: Any) -> "PidDecoder":
        """From now on the pictures of `pipe(prompt, ..)` are PiD's; see `detach`.

        stop_at: stop the generator after this step, counted from 1, and decode what it has then.
        decoding: further arguments of `Decoder.decode`, such as steps.

        The call is as before: a batch of prompts, `num_images_per_prompt`, `generator`, whose seeds
        are PiD's too, and `output_type` "pil", "np" or "pt"; "latent" leaves PiD out. A pipeline
        that gets `prompt_embeds` may be told what is to be seen as `pid_prompt`.
        Raises `PipelineInputError` for a pipeline of another space than the bundle's.
        """
        self._check_open()
        if self._pipe is not None:
            raise PipelineInputError(
                "expected a PidDecoder without a pipeline, but it has one; detach() it first"
            )
        kind = type(pipe)
        parameters = inspect.signature(kind.__call__).parameters
        if "callback_on_step_end" not in parameters:
            raise PipelineInputError(
                "expected a pipeline of diffusers with callback_on_step_end, but got "
                f"{kind.__name__}; call it with output_type='latent', and use decode()"
            )
        if hasattr(kind, "_pid_decoder"):
            raise PipelineInputError(
                "expected a pipeline without PiD, but a PidDecoder is attached; detach() that first"
            )
        space = space_of(pipe)
        check_space(self.manifest, space, kind.__name__)

        @functools.wraps(kind.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(pipe, space, stop_at, decoding, args, kwargs)

        # Python looks for __call__ in the class, so the pipeline gets one of its own, of the same
        # name, by which diffusers knows it.
        own = {"__call__": call, "__module__": kind.__module__, "_pid_decoder": self}
        metaclass: Any = type(kind)
        pipe.__class__ = metaclass(kind.__name__, (kind,), own)
        self._pipe, self._pipe_kind = pipe, kind
        return self

    def detach(self) -> None:
        """Let the pipeline make its own pictures again; without one it does nothing."""
        if self._pipe is not None:
            self._pipe.__class__ = self._pipe_kind
            self._pipe = self._pipe_kind = None

    def decode(
        self,
        output: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        pipe: Any = None,
        height: int | None = None,
        width: int | None = None,
        generator: Any = None,
        sigma: Any = 0.0,
        output_type: str = "pil",
        **decoding: Any,
    ) -> Any:
        """Pictures of what a pipeline returned for `output_type="latent"`.

        output: that, or its `images`: a tensor or an array `[B, ..]`. prompt: one text, or as many
        as divide B, each for the same number of pictures; None costs quality. height, width: that
        the pipeline was given, of tokens of a picture that is no square. pipe: the pipeline, which
        FLUX.2 [klein]'s raw latents need; the attached one if None.
        generator: one of torch or B of them, whose seeds are PiD's too; None for a seed by chance.
        sigma, decoding: as of `Decoder.decode`, whose `seed` may stand for `generator`.

        Returns what diffusers' pipelines do: a list of PIL images, for "np" float32 `[B, H, W, 3]`
        in [0, 1], for "pt" a tensor `[B, 3, H, W]` of the same.
        Raises `PidRuntimeError` and `PipelineInputError` for what does not fit the bundle.
        """
        self._check_open()
        _check_output_type(output_type)
        given = getattr(output, "images", output)
        latents = to_numpy(given[0] if isinstance(given, tuple) else given)
        pipe = self._pipe if pipe is None else pipe
        space = self._space(pipe)
        size = size_of({"height": height, "width": width})
        latent = pid_latent(space, latents, size, raw_rule(pipe))
        decoding = {"seed": generator, **decoding}
        captions = self._captions(prompt)
        return self._pictures(latent, captions, sigma, output_type, decoding)

    def close(self) -> None:
        """Detach, and give all memory back; nothing can be decoded afterwards."""
        self.detach()
        self._is_open = False
        self._close_decoder()
        if self._encoder is not None:
            self._encoder.close()

    def __enter__(self) -> "PidDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise PipelineInputError("expected an open PidDecoder, but it was closed; make another")

    def _space(self, pipe: Any) -> LatentSpace:
        """Of the pipeline, or where there is none of the bundle."""
        if pipe is not None:
            space = space_of(pipe)
            check_space(self.manifest, space, type(pipe).__name__)
            return space
        name = self.manifest.model.get("space")
        if name not in SPACES:
            raise PipelineInputError(
                f"expected a bundle that names its latent space, but got {name!r}; give the "
                "pipeline, as pipe="
            )
        return SPACES[str(name)]

    def _call(
        self,
        pipe: Any,
        space: LatentSpace,
        stop_at: int | None,
        decoding: Mapping[str, Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """What an attached pipeline does when it is called."""
        plain = self._pipe_kind.__call__
        said = kwargs.pop(PROMPT, None)
        bound = inspect.signature(plain).bind(pipe, *args, **kwargs)
        arguments = bound.arguments
        output_type = arguments.get("output_type") or "pil"
        if output_type == "latent":
            return plain(*bound.args, **bound.kwargs)
        _check_output_type(output_type)
        prompt = arguments.get(_prompt_argument(pipe)) if said is None else said
        captions = self._captions(prompt)  # first: a model that cannot be had is told at once
        then = arguments.get("callback_on_step_end")
        tensors = getattr(then, "tensor_inputs", None)
        if tensors is None:
            tensors = arguments.get("callback_on_step_end_tensor_inputs", ())
        catcher = Catcher(space, stop_at=stop_at, size=size_of(arguments), then=then)
        arguments["callback_on_step_end"] = catcher
        arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *tensors]))
        arguments["output_type"] = "latent"
        output = plain(*bound.args, **bound.kwargs)
        last = catcher.last()
        if last.step < last.steps:
            _log.info(
                "The generator stopped after %d of %d steps, at sigma %.3f",
                *(last.step, last.steps, last.sigma),
            )
        options = {"seed": arguments.get("generator"), **decoding}
        pictures = self._pictures(last.latent, captions, last.sigma, output_type, options)
        if isinstance(output, tuple):
            return (pictures, *output[1:])
        output.images = pictures
        return output

    def _captions(self, prompt: str | Sequence[str] | None) -> Floats | None:
        """Embeddings `[P, T, D]` of P prompts; None where there are none, or none are wanted."""
        if prompt is None or self.manifest.model.get("captioned") is False:
            return None
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        network = self.manifest.network
        length = network["text_max_length"]
        if self._encoder is None:
            self._encoder = CaptionEncoder(
                self._encoder_name,
                device=captions_device(self._encoder_name, self._backend, self._device),
                cache=self._cache,
                width=network["text_dim"],
            )
        if self._resident:
            return self._encoder.encode(texts, length)
        if not self._encoder.has(texts, length):
            self._close_decoder()
        try:
            return self._encoder.encode(texts, length)
        finally:
            self._encoder.unload()

    def _pictures(
        self,
        latent: Floats,
        captions: Floats | None,
        sigma: Any,
        output_type: str,
        options: Mapping[str, Any],
    ) -> Any:
        """Of latents `[B, C, h, w]` and the captions of P prompts, where B is a multiple of P."""
        if captions is not None:
            repeats, rest = divmod(len(latent), len(captions))
            if rest or not repeats:
                raise PipelineInputError(
                    f"expected prompts that divide the {len(latent)} pictures, but got "
                    f"{len(captions)}; give one for all, or one for each"
                )
            captions = np.repeat(captions, repeats, axis=0)
        if self._decoder is None:
            self._decoder = Decoder.open(
                self.path, self._backend, self._device, manifest=self.manifest, **self._options
            )
        output: Any = "pil" if output_type == "pil" else "float32"
        pictures = self._decoder.decode(latent, captions, sigma=sigma, output=output, **options)
        if output_type == "pil":
            return pictures
        images = np.clip(pictures / 2 + 0.5, 0, 1)
        if output_type == "np":
            return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        import torch

        return torch.from_numpy(images)

    def _close_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


def _prompt_argument(pipe: Any) -> str:
    name = type(pipe).__name__
    named = (each.prompt_argument for each in BACKBONES.values() if each.pipeline == name)
    return next(named, "prompt")


def _check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise PipelineInputError(
            f"expected output_type {', '.join(OUTPUT_TYPES)} or latent, but got {output_type!r}"
        )
