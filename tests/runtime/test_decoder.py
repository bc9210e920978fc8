"""`Decoder` on small bundles, on both backends."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pid_runtime.backends.choice import HOST_BACKENDS, choose_graphs
from pid_runtime.backends.graphs import LoadedGraphs
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command.images import to_uint8
from pid_runtime.decoder import Bundle, Decoder
from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError
from pid_runtime.interpreter import Program
from pid_runtime.noise import image_noise
from places import GOLDEN

CHANNELS, TEXT, DIM = 16, 12, 32
CLOSE = 3e-4
"""Largest difference between two ways to one image, over states that reach 6: 1.3e-4 was seen."""

Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


LATENT, CAPTION = normal(3, CHANNELS, 2, 3, seed=1), normal(3, TEXT, DIM, seed=2)
SIGMAS = [0.0, 0.3, 0.8]


@pytest.fixture(scope="module", autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ort(golden_bundle: Path) -> Iterator[Decoder]:
    with Decoder.open(golden_bundle, threads=1) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def eager(golden_bundle: Path) -> Iterator[Decoder]:
    with Decoder.open(golden_bundle, "torch", threads=1) as decoder:
        yield decoder


@pytest.fixture(params=HOST_BACKENDS)
def pid(request: pytest.FixtureRequest, ort: Decoder, eager: Decoder) -> Decoder:
    return ort if request.param == "onnxruntime" else eager


@pytest.fixture
def pid_of(ort: Decoder, eager: Decoder) -> Callable[[str], Decoder]:
    return {"onnxruntime": ort, "torch": eager}.__getitem__


def differ(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# Images


def test_noise_given_reproduces_the_reference(pid: Decoder) -> None:
    golden = load_file(GOLDEN / "flux_2k.safetensors")
    states: list[Floats] = []
    image = pid.decode(
        golden["in/latent"],
        golden["in/caption"],
        sigma=golden["in/sigma"],
        noise=golden["in/noise"],
        step_noise=[golden[f"in/eps{k}"] for k in range(3)],
        progress=lambda *_: states.append(pid.state()),
    )
    assert image.shape == (1, 3, 64, 64) and image.dtype == np.float32
    assert differ(image, np.clip(golden["out/x4"], -1, 1)) <= CLOSE
    assert [state.shape for state in states] == [(1, 16, 256, 3)] * 4
    for k, state in enumerate(states, 1):  # tokens of 16 x 16 pixels, row by row
        grid = state.reshape(4, 4, 16, 16, 3).transpose(4, 0, 2, 1, 3)
        assert differ(grid.reshape(3, 64, 64), golden[f"out/x{k}"][0]) <= CLOSE


def test_a_seed_gives_the_same_image_on_every_backend(ort: Decoder, eager: Decoder) -> None:
    arguments: dict[str, Any] = {"sigma": SIGMAS, "seed": 2**64 - 2}
    images = [d.decode(LATENT, CAPTION, **arguments) for d in (ort, eager, ort)]
    assert differ(images[0], images[1]) <= CLOSE
    np.testing.assert_array_equal(images[0], images[2])
    other = ort.decode(LATENT, CAPTION, sigma=SIGMAS, seed=2**64 - 3)
    assert differ(other, images[0]) > 0.1


def test_an_image_of_a_batch_is_the_image_of_its_own_seed(pid: Decoder) -> None:
    seed = 2**64 - 2  # the third image's has wrapped around to 0
    batch = pid.decode(LATENT, CAPTION, sigma=SIGMAS, seed=seed)
    listed = pid.decode(LATENT, CAPTION, sigma=SIGMAS, seed=[seed, seed + 1, 0])
    np.testing.assert_array_equal(batch, listed)
    for b in range(3):
        alone = pid.decode(
            LATENT[b : b + 1], CAPTION[b : b + 1], sigma=SIGMAS[b], seed=(seed + b) % 2**64
        )
        assert differ(alone[0], batch[b]) <= CLOSE


def test_shapes_in_turn_are_as_with_fresh_decoders(
    golden_bundle: Path, pid: Decoder, ort: Decoder
) -> None:
    backend = "onnxruntime" if pid is ort else "torch"
    # within a bucket, into the next, back, another aspect ratio, a batch, a shorter caption
    shapes = [(1, 2, 2, 12), (1, 8, 16, 12), (1, 2, 2, 12), (1, 4, 1, 12), (2, 1, 3, 12)]
    for number, (batch, h, w, text) in enumerate([*shapes, (1, 2, 2, 5)]):
        latent, caption = normal(batch, CHANNELS, h, w), normal(batch, text, DIM)
        image = pid.decode(latent, caption, seed=number)
        assert image.shape == (batch, 3, 32 * h, 32 * w)
        with Decoder.open(golden_bundle, backend, threads=1, verify=False) as fresh:
            assert differ(fresh.decode(latent, caption, seed=number), image) <= CLOSE


def test_memory_is_reused_for_shapes_that_fit(golden_bundle: Path) -> None:
    with Decoder.open(golden_bundle, threads=1, verify=False) as pid:
        pid.decode(normal(1, CHANNELS, 8, 8))
        block = pid._block
        for h, w, batch in ((2, 2, 1), (8, 8, 1), (4, 16, 1), (1, 1, 2)):
            pid.decode(normal(batch, CHANNELS, h, w))
            assert pid._block is block
        pid.decode(normal(2, CHANNELS, 8, 8))
        assert pid._block is not block


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_do_not_change_the_image(
    chunked_bundle: Path, ort: Decoder, eager: Decoder, backend: str, batch: int
) -> None:
    whole = ort if backend == "onnxruntime" else eager
    assert {b.chunk_tokens for b in read_manifest(chunked_bundle).buckets.values()} == {5}
    latent, caption, sigma = LATENT[:batch], CAPTION[:batch], SIGMAS[:batch]  # of 24 tokens
    want = whole.decode(latent, caption, sigma=sigma, seed=5)
    with Decoder.open(chunked_bundle, backend, threads=1, verify=False) as chunked:
        assert differ(chunked.decode(latent, caption, sigma=sigma, seed=5), want) <= CLOSE
        one = normal(batch, CHANNELS, 1, 1)  # 4 tokens: fewer than a chunk
        assert differ(chunked.decode(one, seed=5), whole.decode(one, seed=5)) <= CLOSE
        np.testing.assert_array_equal(
            chunked.decode(latent, caption, sigma=sigma, seed=5, output="uint8"),
            to_uint8(chunked.decode(latent, caption, sigma=sigma, seed=5)),
        )


def test_bytes_are_the_rounded_floats(pid: Decoder) -> None:
    pixels = pid.decode(LATENT, CAPTION, output="uint8")
    assert pixels.shape == (3, 64, 96, 3) and pixels.dtype == np.uint8
    image = pid.decode(LATENT, CAPTION)
    np.testing.assert_array_equal(pixels, to_uint8(image))
    assert image.min() >= -1 and image.max() <= 1 and pixels.std() > 10


def test_images_are_the_callers_own(pid: Decoder) -> None:
    for dlpack in (False, True):
        first = pid.decode(LATENT, CAPTION, seed=1, dlpack=dlpack)
        before = np.from_dlpack(first).copy()
        pid.decode(LATENT, CAPTION, seed=2, dlpack=dlpack)
        np.testing.assert_array_equal(np.from_dlpack(first), before)


# Arguments


def test_takes_and_gives_dlpack(pid: Decoder) -> None:
    want = pid.decode(LATENT, CAPTION, seed=3)
    latent, caption = torch.from_numpy(LATENT), torch.from_numpy(CAPTION)
    image = torch.from_dlpack(pid.decode(latent, caption, seed=3, dlpack=True))
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), want)
    pixels = torch.from_dlpack(pid.decode(latent, caption, seed=3, output="uint8", dlpack=True))
    np.testing.assert_array_equal(pixels.numpy(), to_uint8(want))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_takes_other_floats(pid: Decoder, kind: torch.dtype) -> None:
    latent, caption = torch.from_numpy(LATENT).to(kind), torch.from_numpy(CAPTION).to(kind)
    image = pid.decode(latent, caption, noise=torch.zeros(3, 3, 64, 96, dtype=kind), steps=1)
    want = pid.decode(
        latent.float().numpy(), caption.float().numpy(), noise=np.zeros((3, 3, 64, 96)), steps=1
    )
    np.testing.assert_array_equal(image, want)


def test_takes_arrays_that_are_read_only_or_not_contiguous(pid: Decoder) -> None:
    latent = np.asfortranarray(LATENT)
    latent.flags.writeable = False
    caption = np.broadcast_to(CAPTION[:1], CAPTION.shape)
    image = pid.decode(latent, caption, sigma=np.full(1, 0.5, np.float32))
    np.testing.assert_array_equal(image, pid.decode(LATENT, CAPTION[:1].repeat(3, 0), sigma=[0.5]))
    np.testing.assert_array_equal(image, pid.decode(LATENT, CAPTION[:1], sigma=[0.5] * 3))


def test_takes_what_torch_users_have(pid: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    want = pid.decode(LATENT, CAPTION, seed=7, sigma=0.25)
    latent = torch.from_numpy(LATENT).requires_grad_()
    sigma = torch.tensor([0.25] * 3, requires_grad=True)
    generator = torch.Generator().manual_seed(7)
    got = pid.decode(latent, torch.from_numpy(CAPTION), seed=generator, sigma=sigma)
    np.testing.assert_array_equal(got, want)
    seeds = [torch.Generator().manual_seed(7 + b) for b in range(3)]
    np.testing.assert_array_equal(pid.decode(LATENT, CAPTION, seed=seeds, sigma=0.25), want)
    on_device = SimpleNamespace(  # a tensor of a GPU, which is copied from there
        shape=LATENT.shape,
        dtype="torch.float32",
        __dlpack_device__=lambda: (2, 0),
        __dlpack__=None,
        cpu=lambda: torch.from_numpy(LATENT),
    )
    if pid.device == "cpu" and "onnxruntime" in repr(pid):
        got = pid.decode(on_device, CAPTION, seed=7, sigma=0.25)
        np.testing.assert_array_equal(got, want)
    with caplog.at_level(logging.INFO, "pid_runtime"):
        image = pid.decode(LATENT, CAPTION, seed=None, steps=1)
    (seed,) = (int(text.split()[1]) for text in caplog.messages if text.startswith("Seed "))
    np.testing.assert_array_equal(image, pid.decode(LATENT, CAPTION, seed=seed, steps=1))


def test_images_of_pillow(pid: Decoder) -> None:
    images = pid.decode(LATENT, CAPTION, steps=1, output="pil")
    want = pid.decode(LATENT, CAPTION, steps=1, output="uint8")
    assert [image.size for image in images] == [(96, 64)] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), want)


def test_a_decoder_says_what_it_is(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(golden_bundle.parent))
    bundle = f"~/{golden_bundle.name}"
    with Bundle.open(bundle, "torch", torch.device("cpu"), verify=False) as opened:
        pid = opened.decoder()
        assert pid.device == "cpu"
        assert repr(opened) == f"<Bundle {str(golden_bundle)!r}: custom, fp32 on torch cpu>"
        assert repr(pid) == f"<Decoder {str(golden_bundle)!r}: custom, fp32 on torch cpu>"
        pid.close()
        assert repr(pid).endswith(" on torch cpu, closed>")


def test_advice_is_logged_once(
    edit_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = edit_bundle(lambda manifest: manifest["model"].update(latent_spread=[0.3, 2.0]))
    with Decoder.open(bundle, threads=1, verify=False) as pid:
        for _ in range(2):
            pid.decode(9 * LATENT, steps=1, sigma=0.9)
    told = [record.getMessage() for record in caplog.records]
    assert [text[:30] for text in told] == [
        "sigma 0.9 is beyond 0.8, the h",
        "no caption was given: the empt",
        "the latent's standard deviatio",
    ]


def test_a_decoder_is_not_closed_while_it_decodes(golden_bundle: Path) -> None:
    with Decoder.open(golden_bundle, threads=1, verify=False) as pid:
        with pytest.raises(PidRuntimeError, match="close it when the decode has ended"):
            pid.decode(LATENT, CAPTION, progress=lambda *_: pid.close())
        assert pid.decode(LATENT, CAPTION, steps=1).shape == (3, 3, 64, 96)


def test_no_caption_is_the_empty_one(pid: Decoder) -> None:
    assert pid.empty_caption().shape == (1, TEXT, DIM) and not pid.empty_caption().any()
    image = pid.decode(LATENT)
    np.testing.assert_array_equal(image, pid.decode(LATENT, pid.empty_caption()))
    assert differ(image, pid.decode(LATENT, CAPTION)) > 0.01


def test_noise_of_the_seed_may_be_given(pid: Decoder) -> None:
    def draw(k: int) -> Floats:
        return np.stack([image_noise(9 + b, k, 64, 96) for b in range(3)])

    want = pid.decode(LATENT, CAPTION, seed=9)
    for later in (None, [draw(1), draw(2), draw(3)], [draw(1), None, draw(3)]):
        image = pid.decode(LATENT, CAPTION, seed=9, noise=draw(0), step_noise=later)
        assert differ(image, want) <= CLOSE


def test_sigma_is_per_image(pid: Decoder) -> None:
    image = pid.decode(LATENT, CAPTION, sigma=SIGMAS)
    for b, sigma in enumerate(SIGMAS):
        same = pid.decode(LATENT, CAPTION, sigma=sigma)
        assert differ(same[b], image[b]) <= CLOSE
        assert differ(same[(b + 1) % 3], image[(b + 1) % 3]) > 1e-4


def test_steps_and_rules(pid: Decoder) -> None:
    done: list[tuple[int, int]] = []
    images = {
        (steps, rule): pid.decode(
            LATENT, CAPTION, steps=steps, rule=rule, progress=lambda k, n: done.append((k, n))
        )
        for steps in (1, 2, 4)
        for rule in ("sde", "ode")
    }
    once = [(1, 1)] * 2 + [(1, 2), (2, 2)] * 2 + [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    assert done == once
    assert differ(images[1, "sde"], images[1, "ode"]) <= CLOSE  # there is nothing between
    several = [image for (steps, _), image in images.items() if steps > 1]
    assert all(differ(a, b) > 0.01 for a, b in pairwise(several))
    np.testing.assert_array_equal(images[4, "sde"], pid.decode(LATENT, CAPTION))
    noise = [np.full((3, 3, 64, 96), np.inf, np.float32)] * 3  # ode uses none
    ode = pid.decode(LATENT, CAPTION, rule="ode", step_noise=noise)
    np.testing.assert_array_equal(images[4, "ode"], ode)


def test_a_nan_of_an_earlier_decode_leaves_no_trace(pid: Decoder) -> None:
    with pytest.raises(PidRuntimeError, match="finite noise"):
        pid.decode(LATENT, CAPTION, noise=np.full((3, 3, 64, 96), np.nan, np.float32))
    poison = np.full((3, 3, 64, 96), 3e38, np.float32)
    with pytest.raises(NotFiniteError, match="step 1 of 2"):
        pid.decode(LATENT, CAPTION, noise=poison, steps=2, step_noise=[poison])
    assert np.isfinite(pid.decode(LATENT, CAPTION, steps=1)).all()


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_any_times(free_bundle: Path, ort: Decoder, backend: str) -> None:
    with Decoder.open(free_bundle, backend, threads=1, verify=False) as free:
        for steps in (1, 2, 4):
            sampler = ort.manifest.sampler
            times = [*(sampler.times[row] for row in sampler.schedules[str(steps)]), 0.0]
            image = free.decode(LATENT, CAPTION, sigma=SIGMAS, times=times, seed=4)
            want = ort.decode(LATENT, CAPTION, sigma=SIGMAS, steps=steps, seed=4)
            assert differ(image, want) <= CLOSE
        done: list[int] = []
        times = np.linspace(1, 0, 8).tolist()
        free.decode(LATENT, CAPTION, times=times, progress=lambda k, _: done.append(k))
        assert done == [1, 2, 3, 4, 5, 6, 7]
        for times in (None, [], [0.0], [1.0], [0.5, 0.5, 0], [0, 1], [1.5, 0], [np.nan, 0]):
            with pytest.raises(PidRuntimeError, match=r"expected times.*; "):
                free.decode(LATENT, times=times)
        with pytest.raises(PidRuntimeError, match="at most 100 steps, but got 101"):
            free.decode(LATENT, times=np.linspace(1, 0, 102).tolist())
        with pytest.raises(PidRuntimeError, match="expected 4 steps, but got times of 1"):
            free.decode(LATENT, times=[1, 0], steps=4)


# Bundles that decoders share


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_decoders_of_a_bundle_read_nothing_again(
    golden_bundle: Path, tmp_path: Path, pid_of: Callable[[str], Decoder], backend: str
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(golden_bundle, copied)
    expected = pid_of(backend).decode(LATENT, CAPTION, seed=3)
    with Bundle.open(copied, backend, threads=1) as bundle:
        shutil.rmtree(copied)
        decoders = [bundle.decoder() for _ in range(2)]
    for decoder in decoders:  # the bundle is closed: its weights stay for them
        with decoder:
            np.testing.assert_array_equal(decoder.decode(LATENT, CAPTION, seed=3), expected)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_decoders_of_a_bundle_run_side_by_side(
    golden_bundle: Path, pid_of: Callable[[str], Decoder], backend: str
) -> None:
    seeds = range(4)
    expected = [pid_of(backend).decode(LATENT, CAPTION, seed=seed) for seed in seeds]
    with Bundle.open(golden_bundle, backend, threads=1) as bundle:

        def decode(seed: int) -> list[Floats]:
            with bundle.decoder() as decoder:
                return [decoder.decode(LATENT, CAPTION, seed=seed) for _ in range(3)]

        with ThreadPoolExecutor(len(seeds)) as threads:
            for images, want in zip(threads.map(decode, seeds), expected, strict=True):
                for image in images:
                    np.testing.assert_array_equal(image, want)


def test_graphs_go_with_their_last_user(golden_bundle: Path) -> None:
    graphs = choose_graphs(golden_bundle, read_manifest(golden_bundle), "onnxruntime")
    closed: list[bool] = []
    graphs.load()
    manifest = read_manifest(golden_bundle)
    watched = SimpleNamespace(
        manifest=manifest,
        memory=graphs.memory,
        graphs=graphs.graphs,
        close=lambda: closed.append(True),
    )
    bundle = Bundle(golden_bundle, manifest, cast(LoadedGraphs, watched), {})
    first, second = bundle.decoder(), bundle.decoder()
    bundle.close()
    bundle.close()
    first.close()
    first.close()
    assert not closed
    second.close()
    assert closed == [True]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["arena", "run"])
def test_memory_that_runs_out(pid: Decoder, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    latent = np.zeros((2, 16, 6, 12), np.float32)
    with monkeypatch.context() as patch:
        if where == "arena":
            patch.setattr(type(pid.memory), "allocate", raising(MemoryError("not a byte")))
        else:
            patch.setattr(Program, "run", raising(RuntimeError("[x] std::bad_alloc: not a byte")))
        with pytest.raises(OutOfMemoryError) as caught:
            pid.decode(latent)
    assert re.fullmatch(
        r"expected enough memory for 2 x 0.0737 megapixels \(0.0\d GB for the arena, and what the "
        r"graphs work in\), but got too little \(.*not a byte\); decode a smaller batch or at most "
        r"0.0164 megapixels: bucket tiny",
        str(caught.value),
    )
    assert np.isfinite(pid.decode(latent)).all()


def test_an_error_that_is_a_bug_stays_one(pid: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "run", raising(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        pid.decode(np.zeros((1, 16, 2, 2), np.float32))


@pytest.mark.parametrize("what", ["LoadedSessions.load", "read_constants"])
def test_a_bundle_that_memory_does_not_suffice_for(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "read_constants":
        monkeypatch.setattr("pid_runtime.decoder.read_constants", raising(MemoryError()))
    else:
        monkeypatch.setattr("onnxruntime.InferenceSession", raising(RuntimeError("std::bad_alloc")))
    with pytest.raises(OutOfMemoryError, match=r"weights are 0\.\d\d GB, but got too little"):
        Decoder.open(golden_bundle)


def test_a_closed_bundle_makes_no_decoder(golden_bundle: Path) -> None:
    bundle = Bundle.open(golden_bundle, threads=1)
    bundle.close()
    with pytest.raises(PidRuntimeError, match=r"expected \S+ to be open, but it was closed"):
        bundle.decoder()


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_a_closed_decoder_is_refused(golden_bundle: Path, backend: str) -> None:
    with Decoder.open(golden_bundle, backend, threads=1) as decoder:
        decoder.decode(LATENT, CAPTION, steps=1)
    with pytest.raises(PidRuntimeError, match="expected an open decoder, but it was closed"):
        decoder.decode(LATENT, CAPTION, steps=1)


def test_a_decoder_serves_one_thread_at_a_time(pid: Decoder) -> None:
    expected = pid.decode(LATENT, CAPTION, seed=5)
    refused: list[str] = []

    def meanwhile(step: int, steps: int) -> None:
        with ThreadPoolExecutor(1) as other, pytest.raises(PidRuntimeError) as caught:
            other.submit(pid.decode, LATENT, CAPTION, seed=6).result()
        refused.append(str(caught.value))

    image = pid.decode(LATENT, CAPTION, seed=5, progress=meanwhile)
    assert len(refused) == 4
    assert all("expected one call at a time" in message for message in refused)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(pid.decode(LATENT, CAPTION, seed=5), expected)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_choosing_graphs_reads_no_weights(
    golden_bundle: Path, tmp_path: Path, backend: str
) -> None:
    choose_graphs(tmp_path / "nowhere", read_manifest(golden_bundle), backend).close()


# Images that are none


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("output", ["float32", "uint8"])
def test_an_image_of_nan_is_refused(spoilt_bundle: Path, backend: str, output: Any) -> None:
    done: list[int] = []
    with Decoder.open(spoilt_bundle, backend, threads=1) as decoder:
        with pytest.raises(NotFiniteError, match="step 3 of 4 gave NaN or infinity; check the bun"):
            decoder.decode(
                LATENT, CAPTION, output=output, progress=lambda step, _: done.append(step)
            )
        assert np.isfinite(decoder.decode(LATENT, CAPTION, steps=1)).all()
    assert done == [1, 2, 3, 4]


def test_advice_about_nan_fits_the_precision(spoilt_bundle: Path) -> None:
    with Decoder.open(spoilt_bundle, "torch", threads=1) as decoder:
        decoder.manifest = replace(decoder.manifest, precision="fp16")
        with pytest.raises(NotFiniteError, match="float16 may have overflowed: export with --prec"):
            decoder.decode(LATENT, CAPTION)


# Mistakes


def changed(array: Floats, value: float) -> Floats:
    array = array.copy()
    array.flat[7] = value
    return array


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "channels": (r"latent shape \[B, 16, h, w\], but got", {"latent": LATENT[:, :4]}),
    "rank": (r"latent shape \[B, 16, h, w\], but got", {"latent": LATENT[0]}),
    "no image": ("latent shape", {"latent": LATENT[:0]}),
    "no height": ("latent shape", {"latent": LATENT[:, :, :0]}),
    "integers": ("latent values of float16", {"latent": LATENT.astype(np.int32)}),
    "NaN": ("finite latent", {"latent": changed(LATENT, np.nan)}),
    "infinity": ("finite latent", {"latent": torch.from_numpy(changed(LATENT, np.inf)).half()}),
    "tokens": (
        "at most 0.262 megapixels, .*--buckets large=1088",
        {"latent": normal(3, CHANNELS, 17, 16)},
    ),
    "caption width": (r"caption shape \[B, T, 32\]", {"caption": CAPTION[..., :31]}),
    "caption length": ("T at most 12", {"caption": normal(3, 13, DIM)}),
    "no text": ("caption shape", {"caption": CAPTION[:, :0]}),
    "caption rank": ("caption shape", {"caption": CAPTION[0]}),
    "caption batch": ("that of the latent, 3", {"caption": CAPTION[:2]}),
    "caption NaN": ("finite caption", {"caption": changed(CAPTION, np.nan)}),
    "caption integers": ("caption values", {"caption": CAPTION.astype(np.int64)}),
    "sigma above": (r"sigma in \[0, 1\]", {"sigma": 1.01}),
    "sigma below": (r"sigma in \[0, 1\]", {"sigma": [0, -0.1, 0]}),
    "sigma NaN": (r"sigma in \[0, 1\]", {"sigma": np.nan}),
    "sigmas": ("one sigma or 3", {"sigma": [0, 0]}),
    "seed below": ("seed from 0", {"seed": -1}),
    "seed above": ("seed from 0", {"seed": 2**64}),
    "seeds": ("one seed or 3", {"seed": [1, 2]}),
    "steps": ("expected 1, 2, 4 steps, but got 3", {"steps": 3}),
    "no steps": ("expected 1, 2, 4 steps, but got 0", {"steps": 0}),
    "times": ("knows only its own", {"times": [1, 0]}),
    "rule": ("rule sde, ode, dpm", {"rule": "euler"}),
    "output": ("output float32 or uint8 or pil", {"output": "float16"}),
    "output and dlpack": ("no dlpack for output pil", {"output": "pil", "dlpack": True}),
    "sigma text": ("numbers as sigma, but got '0.2'", {"sigma": "0.2"}),
    "sigma truth": ("numbers as sigma, but got 'True'", {"sigma": True}),
    "sigma ragged": ("numbers as sigma", {"sigma": [0, [0, 0]]}),
    "seed truth": ("whole number as seed, but got 'True'", {"seed": True}),
    "seed float": ("whole number as seed, but got '1.5'", {"seed": 1.5}),
    "seed text": ("whole number as seed", {"seed": "7"}),
    "steps text": ("whole number as steps, but got '4'", {"steps": "4"}),
    "steps truth": ("whole number as steps", {"steps": True}),
    "latent path": ("array as latent, but got 'latent.npy'", {"latent": Path("latent.npy")}),
    "prompt": ("array as caption, but got 'a cat'; give the embedding", {"caption": "a cat"}),
    "noise shape": (r"noise shape \[3, 3, 64, 96\]", {"noise": normal(1, 3, 64, 96)}),
    "noise count": ("expected 3 step noises", {"step_noise": [normal(3, 3, 64, 96)] * 2}),
}


@pytest.mark.parametrize(("message", "arguments"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_anything_runs(
    ort: Decoder, message: str, arguments: dict[str, Any]
) -> None:
    chosen: dict[str, Any] = {"latent": LATENT, "caption": CAPTION, "seed": 0, **arguments}
    with pytest.raises(PidRuntimeError, match=message) as caught:
        ort.decode(**chosen, progress=lambda *_: pytest.fail("a step was run"))
    assert "\n" not in str(caught.value)


def test_no_state_before_a_decode(golden_bundle: Path) -> None:
    with (
        Decoder.open(golden_bundle, "torch", threads=1, verify=False) as pid,
        pytest.raises(PidRuntimeError, match=r"before its state is read$"),
    ):
        pid.state()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "backend of onnxruntime, torch, tensorrt, tensorrt-rtx, but got 'tensorflow'",
            {"backend": "tensorflow"},
        ),
        ("providers .*CPUExecutionProvider.* but got 'abacus'", {"device": "abacus"}),
        ("device such as cuda:0, but got 'cpu:x'", {"device": "cpu:x"}),
        ("device by name, such as cpu or cuda:0, but got 0", {"device": 0}),
        ("device such as cuda:0, but got 'cpu:'", {"device": "cpu:"}),
        ("device torch can use", {"backend": "torch", "device": "abacus"}),
        ("device torch can use.{,250}$", {"backend": "torch", "device": "mps"}),
        (r"path in UTF-8.*'b\\udcff'; rename the folder", {"bundle": os.fsdecode(b"b\xff")}),
        ("at least one thread, but got 0", {"threads": 0}),
        ("at least one thread, but got -1", {"backend": "torch", "threads": -1}),
    ],
)
def test_unknown_backends_and_devices(
    golden_bundle: Path, message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(PidRuntimeError, match=message) as caught:
        Decoder.open(arguments.pop("bundle", golden_bundle), **arguments)
    assert "\n" not in str(caught.value)


def test_threads_of_torch(golden_bundle: Path) -> None:
    before = torch.get_num_threads()
    try:
        Decoder.open(golden_bundle, "torch", threads=2, verify=False).close()
        assert torch.get_num_threads() == 2
        Decoder.open(golden_bundle, "torch", threads=1, verify=False).close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("name", ["weights.safetensors", "latent.onnx"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [(Path.unlink, "has no file"), (truncate, "bytes, but it has"), (alter, "was altered")],
)
def test_damaged_bundles(
    edit_bundle: Callable[..., Path],
    backend: str,
    name: str,
    harm: Callable[[Path], object],
    message: str,
) -> None:
    bundle = edit_bundle()
    harm(bundle / name)
    with pytest.raises(PidRuntimeError, match=message):
        Decoder.open(bundle, backend)


def test_unread_weights_that_are_none(edit_bundle: Callable[..., Path]) -> None:
    bundle = edit_bundle()
    weights = bundle / "weights.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    for backend in HOST_BACKENDS:
        with pytest.raises(PidRuntimeError, match=r"weights|load") as caught:
            Decoder.open(bundle, backend, threads=1, verify=False)
        assert "\n" not in str(caught.value)


def test_precision_the_provider_lacks(edit_bundle: Callable[..., Path]) -> None:
    bundle = edit_bundle(lambda manifest: manifest.update(precision="bf16"))
    with pytest.raises(PidRuntimeError, match="CPU provider has no bf16 kernels"):
        Decoder.open(bundle)


def test_bundles_that_are_none(tmp_path: Path, golden_bundle: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(PidRuntimeError, match=r"expected a bundle \(a folder with"):
            Decoder.open(path)
    moved = shutil.copytree(golden_bundle, tmp_path / "moved here")
    Decoder.open(str(moved)).close()
