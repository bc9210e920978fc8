"""PiD in a pipeline of diffusers, and what users of diffusers do to their pipelines."""

import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from fakes.generators import PARTS, small_pipeline
from pid_pipelines.backbones import BACKBONES
from pid_pipelines.captions import CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_run import run
from pid_pipelines.pid_decoder import PidDecoder
from pid_ref.registry import SPACES, find_space
from pid_runtime.decoder import Decoder
from places import GOLDEN

ENCODER = GOLDEN / "captions" / "encoder"
CALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3}
MODELS = ("text_encoder", "text_encoder_2", "transformer", "vae")

EditBundle = Callable[..., Path]


@pytest.fixture
def bundle(edit_bundle: EditBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The small network of golden file flux_2k, as one of space flux."""
    monkeypatch.setenv("PID_CAPTION_CACHE", str(tmp_path / "captions"))
    model = {"name": "small", "space": "flux", "captioned": True}
    return edit_bundle(lambda manifest: manifest.update(model=model))


@pytest.fixture
def pid(bundle: Path) -> Iterator[PidDecoder]:
    with PidDecoder(bundle, encoder=ENCODER, threads=1) as decoder:
        yield decoder


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(bundle: Path, pipe: Any, texts: list[str], seed: Any, **call: Any) -> list[Any]:
    """PiD's pictures, by hand: of a plain pipeline's latents and the captions of texts."""
    caught = run(pipe, SPACES["flux"], {**CALL, **call})[-1]
    with CaptionEncoder(ENCODER, width=32) as encoder:
        captions = encoder.encode(texts, 12)
    with Decoder.open(bundle, threads=1) as decoder:
        return decoder.decode(caught.latent, captions, seed=seed, output="pil")


def same(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, Image.Image)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("backbone", ["flux", "zimage"])
def test_attached_pictures_are_pids(backbone: str, bundle: Path, pid: PidDecoder) -> None:
    pipe, plain = small_pipeline(backbone), small_pipeline(backbone)
    kind = type(pipe)
    assert pid.attach(pipe) is pid
    images = pipe("a boat", **CALL, generator=seeded()).images
    assert images[0].size == (384, 256)
    same(images, expected(bundle, plain, ["a boat"], 3, prompt="a boat", generator=seeded()))
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert inspect.signature(type(pipe).__call__) == inspect.signature(kind.__call__)

    pid.detach()
    assert type(pipe) is kind
    pid.detach()  # again does nothing
    own = pipe("a boat", **CALL, generator=seeded()).images
    same(own, plain("a boat", **CALL, generator=seeded()).images)
    assert own[0].size == (96, 64)
    pid.attach(pipe)
    same(pipe("a boat", **CALL, generator=seeded()).images, images)


def test_batches_seeds_and_forms(bundle: Path, pid: PidDecoder) -> None:
    pipe, plain = small_pipeline("flux"), small_pipeline("flux")
    pid.attach(pipe, steps=2)
    texts = ["a boat", "a house"]
    generators = [seeded(seed) for seed in (5, 1, 9, 2)]
    call = {"num_images_per_prompt": 2, "output_type": "np"}
    images = pipe(texts, **CALL, **call, generator=generators).images
    assert images.shape == (4, 256, 384, 3) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    more: dict[str, Any] = {
        "num_images_per_prompt": 2,
        "generator": [seeded(s) for s in (5, 1, 9, 2)],
    }
    caught = run(plain, SPACES["flux"], {**CALL, **more, "prompt": texts})[-1]
    with CaptionEncoder(ENCODER, width=32) as encoder:
        captions = encoder.encode(texts, 12)
    with Decoder.open(bundle, threads=1) as decoder:
        wanted = decoder.decode(
            caught.latent, captions[[0, 0, 1, 1]], seed=[5, 1, 9, 2], steps=2, output="float32"
        )
    np.testing.assert_array_equal(images, np.clip(wanted / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))

    again = [seeded(seed) for seed in (5, 1, 9, 2)]
    (tensor,) = pipe(
        texts, **CALL, num_images_per_prompt=2, output_type="pt", generator=again, return_dict=False
    )
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1), images)
    latents = pipe(texts, **CALL, output_type="latent", generator=seeded()).images
    assert latents.shape == (2, 24, 64)  # as without PiD
    with pytest.raises(
        PipelineInputError, match="output_type pil, np, pt or latent, but got 'jpg'"
    ):
        pipe("a boat", **CALL, output_type="jpg")


def test_prompt_embeds(bundle: Path, pid: PidDecoder, caplog: pytest.LogCaptureFixture) -> None:
    pipe, plain = small_pipeline("flux"), small_pipeline("flux")
    embeds, pooled, _ = plain.encode_prompt("a boat", None)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    pid.attach(pipe)
    images = pipe(**given, **CALL, generator=seeded(), pid_prompt="a boat").images
    same(images, expected(bundle, plain, ["a boat"], 3, **given, generator=seeded()))
    assert caplog.text == ""
    pipe(**given, **CALL, generator=seeded())
    assert "no caption was given" in caplog.text


def test_a_generator_that_is_stopped_early(
    bundle: Path, pid: PidDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pipe, plain = small_pipeline("zimage"), small_pipeline("zimage")
    pid.attach(pipe, stop_at=2)
    computed: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: computed.append(1))
    images = pipe("a boat", **CALL, generator=seeded()).images
    assert len(computed) == 2 and "stopped after 2 of 3 steps, at sigma 0." in caplog.text
    way = run(plain, SPACES["flux"], {**CALL, "prompt": "a boat", "generator": seeded()}, at=[2])[0]
    assert way.sigma > 0.1
    with CaptionEncoder(ENCODER, width=32) as encoder, Decoder.open(bundle, threads=1) as decoder:
        caption = encoder.encode(["a boat"], 12)
        wanted = decoder.decode(way.latent, caption, sigma=way.sigma, seed=3, output="pil")
    same(images, wanted)


def test_callbacks_of_the_users(pid: PidDecoder) -> None:
    pipe = small_pipeline("flux")
    pid.attach(pipe)
    seen: list[Any] = []

    def look(pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, sorted(tensors)))
        pipe._interrupt = index == 1
        return {}

    pipe(
        "a boat",
        **CALL,
        generator=seeded(),
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert seen == [(0, ["latents", "prompt_embeds"]), (1, ["latents", "prompt_embeds"])]


def test_compiled_and_offloaded_parts(bundle: Path, pid: PidDecoder) -> None:
    plain = small_pipeline("flux")
    wanted = expected(bundle, plain, ["a boat"], 3, prompt="a boat", generator=seeded())
    pipe = small_pipeline("flux")
    pid.attach(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    same(pipe("a boat", **CALL, generator=seeded()).images, wanted)
    pid.detach()

    pipe = small_pipeline("flux")
    cpu = torch.device("cpu")
    for name in MODELS:
        accelerate.cpu_offload(getattr(pipe, name), cpu)  # as in sequential offload
    pid.attach(pipe)
    assert next(pipe.transformer.parameters()).device.type == "meta"
    same(pipe("a boat", **CALL, generator=seeded()).images, wanted)
    pid.detach()

    pipe = small_pipeline("flux")
    hooks = [
        accelerate.cpu_offload_with_hook(getattr(pipe, name), cpu)[1]  # as in model offload
        for name in MODELS
    ]
    pipe._all_hooks = hooks
    pid.attach(pipe)
    same(pipe("a boat", **CALL, generator=seeded()).images, wanted)


@pytest.mark.parametrize("backbone", PARTS)
def test_outputs_of_every_class(
    backbone: str, bundle: Path, edit_bundle: EditBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a decoder gets of an attached pipeline, and of its latents by hand, is the same."""
    space, pipe = find_space(backbone), small_pipeline(backbone)
    model = {"name": "small", "space": space.name, "captioned": True}
    got: list[Any] = []

    def keep(_self: object, latent: Any, captions: Any, sigma: Any, *_: Any) -> list[Any]:
        got.append((latent, captions, sigma))
        return []

    monkeypatch.setattr(PidDecoder, "_pictures", keep)
    call: dict[str, Any] = {BACKBONES[backbone].prompt_argument: "a boat", **CALL}
    with PidDecoder(edit_bundle(lambda m: m.update(model=model)), encoder=ENCODER) as pid:
        assert pid.attach(pipe) and pipe(**call, generator=seeded()).images == []
        output = pipe(**call, generator=seeded(), output_type="latent")
        pid.decode(output, "a boat", height=64, width=96)
    (attached, captions, sigma), (by_hand, same_captions, _) = got
    assert sigma == 0 and attached.shape[:2] == (1, space.channels)
    np.testing.assert_allclose(by_hand, attached, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(captions, same_captions)


def test_latents_decoded_by_hand(bundle: Path, pid: PidDecoder) -> None:
    pipe, plain = small_pipeline("flux"), small_pipeline("flux")
    output = pipe(["a boat", "a boat"], **CALL, generator=seeded(), output_type="latent")
    images = pid.decode(output, "a boat", height=64, width=96, generator=seeded())
    call: dict[str, Any] = {"prompt": ["a boat", "a boat"], "generator": seeded()}
    same(images, expected(bundle, plain, ["a boat"], 3, **call))
    same(pid.decode(output.images, "a boat", height=64, width=96, seed=3), images)
    with pytest.raises(PipelineInputError, match="tokens of a square picture, but got 2 x 24"):
        pid.decode(output, "a boat")
    with pytest.raises(PipelineInputError, match="prompts that divide the 2 pictures, but got 3"):
        pid.decode(output, ["a"] * 3, height=64, width=96)


def test_one_model_after_the_other(
    bundle: Path, pid: PidDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is gone while the language model is there, unless both are to stay."""
    loads: list[bool] = []
    used: list[PidDecoder] = [pid]
    load = CaptionEncoder._load

    def watched(encoder: CaptionEncoder) -> Any:
        loads.append(used[-1]._decoder is None)
        return load(encoder)

    monkeypatch.setattr(CaptionEncoder, "_load", watched)
    latent = np.zeros((1, 16, 4, 4), np.float32)
    for text in ("one", "two", "two"):
        pid.decode(latent, text, seed=0)
        assert pid._encoder is not None and pid._encoder._states is None
    assert loads == [True, True] and pid._decoder is not None
    with PidDecoder(bundle, encoder=ENCODER, threads=1, resident=True) as stays:
        used.append(stays)
        for text in ("three", "four"):
            stays.decode(latent, text, seed=0)
        assert stays._encoder is not None and stays._encoder._states is not None
    assert loads == [True, True, True, False]


def test_what_cannot_be_attached(bundle: Path, pid: PidDecoder) -> None:
    with pytest.raises(PipelineInputError, match="bundle of sd3, whose latents StableDiffusion3P"):
        pid.attach(small_pipeline("sd3"))
    with pytest.raises(PipelineInputError, match="with callback_on_step_end, but got object"):
        pid.attach(object())
    pipe = small_pipeline("flux")
    pid.attach(pipe)
    with pytest.raises(PipelineInputError, match="without a pipeline, but it has one; detach"):
        pid.attach(pipe)
    with (
        PidDecoder(bundle, encoder=ENCODER) as other,
        pytest.raises(PipelineInputError, match="without PiD, but a PidDecoder is attached"),
    ):
        other.attach(pipe)
    pid.detach()
    pid.attach(pipe, stop_at=4)
    with pytest.raises(
        PipelineInputError, match="at most 3, the generator's steps, but got step 4"
    ):
        pipe("a boat", **CALL)
    pid.close()
    with pytest.raises(PipelineInputError, match="open PidDecoder, but it was closed"):
        pid.attach(pipe)
    with pytest.raises(PipelineInputError, match="open PidDecoder, but it was closed"):
        pid.decode(np.zeros((1, 16, 4, 4), np.float32))
