"""Decodes in tiles and with guidance, against plain ones and against the formulas."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pid_runtime.backends.choice import HOST_BACKENDS
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import FlowShift
from pid_runtime.bundle.sizes import Sizes
from pid_runtime.decoder import Decoder
from pid_runtime.denoise import image_bytes, state_bytes
from pid_runtime.errors import NotFiniteError, OutOfMemoryError, PidRuntimeError
from pid_runtime.interpreter import Program
from pid_runtime.noise import image_noise
from pid_runtime.request import check_request
from pid_runtime.work import graph_flop

CHANNELS, TEXT, DIM, SIDE = 16, 12, 32, 32
CLOSE = 3e-4
"""As in test_decoder.py."""
TIMES = (0.97, 0.7, 0.3, 0.0)

Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


LATENT = normal(2, CHANNELS, 5, 6, seed=1)
CAPTION, NEGATIVE = normal(2, TEXT, DIM, seed=2), normal(1, TEXT, DIM, seed=3)
TILES: dict[str, Any] = {"tile": (4 * SIDE, 3 * SIDE), "overlap": SIDE}
"""2 x 2 tiles."""


@pytest.fixture(scope="module", params=HOST_BACKENDS)
def pid(request: pytest.FixtureRequest, golden_bundle: Path) -> Iterator[Decoder]:
    with Decoder.open(golden_bundle, request.param, threads=1) as decoder:
        yield decoder


@pytest.fixture(scope="module", params=HOST_BACKENDS)
def free(request: pytest.FixtureRequest, free_bundle: Path) -> Iterator[Decoder]:
    """A bundle of any times."""
    with Decoder.open(free_bundle, request.param, threads=1) as decoder:
        yield decoder


def differ(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# Tiles


def test_one_tile_is_the_whole_picture_bit_for_bit(pid: Decoder) -> None:
    whole = pid.decode(LATENT, CAPTION, seed=5)
    np.testing.assert_array_equal(pid.decode(LATENT, CAPTION, seed=5, tile="auto"), whole)
    size = (6 * SIDE, 5 * SIDE)
    np.testing.assert_array_equal(pid.decode(LATENT, CAPTION, seed=5, tile=size), whole)


def unclamped(pid: Decoder, latent: Floats, **options: Any) -> Floats:
    """The state after one step of a decode, as images."""
    states: list[Floats] = []

    def look(done: int, calls: int) -> None:
        if done == calls:
            states.append(pid.state())

    pid.decode(latent, CAPTION, steps=1, progress=look, **options)
    batch, _, rows, columns = latent.shape
    grid = states[0].reshape(batch, 2 * rows, 2 * columns, 16, 16, 3)
    return grid.transpose(0, 5, 1, 3, 2, 4).reshape(batch, 3, SIDE * rows, SIDE * columns)


def by_hand(pid: Decoder, latent: Floats, columns: tuple[int, ...], width: int) -> Floats:
    """One step, in columns of tiles, of decodes of every tile alone, blended here."""
    noise = np.stack([image_noise(s, 0, 5 * SIDE, 6 * SIDE) for s in (7, 8)])
    total, weights = np.zeros_like(noise), np.zeros(6 * SIDE)
    for column in columns:
        at = slice(column * SIDE, (column + width) * SIDE)
        tile = unclamped(pid, latent[..., column : column + width], noise=noise[..., at])
        places = np.arange(width * SIDE) + 0.5
        rising = np.clip(places / (2 * SIDE), 0, 1) if column else 1.0
        falling = np.clip((width * SIDE - places) / (2 * SIDE), 0, 1)
        weight = rising * (falling if column + width < 6 else 1.0)
        total[..., at] += weight * tile
        weights[at] += weight
    return (total / weights).astype(np.float32)


def test_a_step_is_the_blend_of_its_tiles(pid: Decoder) -> None:
    got = unclamped(pid, LATENT, seed=7, tile=(128, 160), overlap=32)
    assert differ(got, by_hand(pid, LATENT, (0, 2), 4)) <= CLOSE


def test_tiles_agree_on_every_backend(golden_bundle: Path) -> None:
    images: list[Floats] = []
    for backend in HOST_BACKENDS:
        with Decoder.open(golden_bundle, backend, threads=1) as decoder:
            images.append(decoder.decode(LATENT, CAPTION, sigma=[0, 0.4], seed=3, **TILES))
    assert differ(images[0], images[1]) <= CLOSE


def test_an_image_of_a_tiled_batch_is_that_of_its_own_seed(pid: Decoder) -> None:
    batch = pid.decode(LATENT, CAPTION, sigma=[0.1, 0.7], seed=20, **TILES)
    alone = pid.decode(LATENT[1:], CAPTION[1:], sigma=0.7, seed=21, **TILES)
    assert differ(batch[1:], alone) <= CLOSE


def test_noise_given_is_the_seeds(pid: Decoder) -> None:
    height, width = 5 * SIDE, 6 * SIDE
    draws = [np.stack([image_noise(s, k, height, width) for s in (9, 10)]) for k in range(4)]
    given = pid.decode(LATENT, CAPTION, noise=draws[0], step_noise=draws[1:], **TILES)
    np.testing.assert_array_equal(given, pid.decode(LATENT, CAPTION, seed=9, **TILES))


def test_outputs_of_tiles(pid: Decoder) -> None:
    image = pid.decode(LATENT, CAPTION, seed=1, **TILES)
    assert image.shape == (2, 3, 5 * SIDE, 6 * SIDE) and image.dtype == np.float32
    assert np.abs(image).max() <= 1
    raw = pid.decode(LATENT, CAPTION, seed=1, output="uint8", **TILES)
    wanted = np.rint((image.transpose(0, 2, 3, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    np.testing.assert_array_equal(raw, wanted)
    pictures = pid.decode(LATENT, CAPTION, seed=1, output="pil", **TILES)
    np.testing.assert_array_equal(np.stack([np.asarray(each) for each in pictures]), raw)
    shared = pid.decode(LATENT, CAPTION, seed=1, dlpack=True, **TILES)
    np.testing.assert_array_equal(np.from_dlpack(shared), image)


def test_an_ode_in_tiles_adds_no_noise(pid: Decoder) -> None:
    first = pid.decode(LATENT, CAPTION, seed=4, rule="ode", **TILES)
    draw = np.stack([image_noise(s, 0, 5 * SIDE, 6 * SIDE) for s in (4, 5)])
    np.testing.assert_array_equal(
        pid.decode(LATENT, CAPTION, noise=draw, rule="ode", **TILES), first
    )


def test_progress_and_state_of_tiles(pid: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    states: list[Floats] = []

    def look(done: int, calls: int) -> None:
        seen.append((done, calls))
        if done % 4 == 0:
            states.append(pid.state())

    image = pid.decode(LATENT[:1], CAPTION[:1], progress=look, **TILES)
    assert seen == [(call, 16) for call in range(1, 17)]
    assert [state.shape for state in states] == [(1, 120, 256, 3)] * 4
    grid = states[-1].reshape(10, 12, 16, 16, 3).transpose(4, 0, 2, 1, 3).reshape(3, 160, 192)
    np.testing.assert_array_equal(np.clip(grid, -1, 1), image[0])
    assert differ(states[2], states[3]) > 0.01


def test_what_progress_raises_ends_the_decode_between_tiles(pid: Decoder) -> None:
    def stop(done: int, _calls: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole = pid.decode(LATENT, CAPTION, seed=2)
    with pytest.raises(KeyboardInterrupt):
        pid.decode(LATENT, CAPTION, seed=1, progress=stop, **TILES)
    np.testing.assert_array_equal(pid.decode(LATENT, CAPTION, seed=2), whole)


def test_the_state_of_tiles_goes_with_their_decode(pid: Decoder) -> None:
    kept: list[weakref.ref[Any]] = []

    def stop(_done: int, _calls: int) -> None:
        kept.append(weakref.ref(pid._canvas))
        raise KeyboardInterrupt

    def refused() -> None:
        with pytest.raises(PidRuntimeError, match="was in tiles or with guidance and has ended"):
            pid.state()

    pid.decode(LATENT[:1], CAPTION[:1], **TILES)
    refused()
    with pytest.raises(KeyboardInterrupt):
        pid.decode(LATENT[:1], CAPTION[:1], progress=stop, **TILES)
    refused()
    gc.collect()
    assert [each() for each in kept] == [None]
    pid.decode(LATENT[:1], CAPTION[:1])
    assert pid.state().shape == (1, 120, 256, 3)


def test_a_picture_that_no_bucket_holds_is_decoded_in_tiles(
    pid: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    latent = normal(1, CHANNELS, 20, 20, seed=6)
    with pytest.raises(PidRuntimeError, match=r"or decode in tiles \(tile auto\)"):
        pid.decode(latent, CAPTION[:1])
    with caplog.at_level(logging.INFO):
        image = pid.decode(latent, CAPTION[:1], tile="auto", overlap=64)
    assert image.shape == (1, 3, 640, 640)
    assert "tiles of " in caplog.text and "no bucket holds the whole picture" in caplog.text


def test_nan_in_tiles_names_the_step(spoilt_bundle: Path) -> None:
    with (
        Decoder.open(spoilt_bundle, threads=1) as decoder,
        pytest.raises(NotFiniteError, match="step 3 of 4 gave NaN"),
    ):
        decoder.decode(LATENT, CAPTION, **TILES)


def test_rows_of_a_state_beyond_2_31_bytes() -> None:
    """Places are counted in Python's integers and numpy's 64-bit strides: no sum wraps."""
    from pid_runtime.noise import standard_normal

    start = 16_384 * 16_384 * 3 - 5  # of the largest picture's draw, 3.2 GB
    wanted = standard_normal(3, 2, 10, start=start - 5)[5:]
    np.testing.assert_array_equal(standard_normal(3, 2, 5, start=start), wanted)


# Memory


def short_of_memory(decoder: Decoder, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = decoder.memory.allocate

    def refuse(size_bytes: int) -> Any:
        if size_bytes > most:
            raise MemoryError(f"{size_bytes} bytes")
        return allocate(size_bytes)

    monkeypatch.setattr(decoder.memory, "allocate", refuse)


def test_auto_takes_smaller_tiles_where_memory_is_short(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latent = normal(1, CHANNELS, 12, 12, seed=6)
    manifest = read_manifest(golden_bundle, verify=False)
    small = replace(manifest.buckets["small"], max_tokens=400)
    buckets = {"small": small, "large": replace(manifest.buckets["small"], max_tokens=1024)}
    larger = {**buckets, "large": replace(buckets["large"], arena_bytes=small.arena_bytes + 1)}
    with Decoder.open(
        golden_bundle, threads=1, manifest=replace(manifest, buckets=larger), verify=False
    ) as decoder:
        short_of_memory(decoder, small.arena_bytes, monkeypatch)
        message = (
            "decode at most 0.102 megapixels: bucket small or in tiles, of 384x160 for example"
        )
        with pytest.raises(OutOfMemoryError, match=message):
            decoder.decode(latent, CAPTION[:1], tile=(352, 384), overlap=32)
        with caplog.at_level(logging.INFO):
            got = decoder.decode(latent, CAPTION[:1], tile="auto", overlap=64)
    assert "memory is short" in caplog.text
    assert got.shape == (1, 3, 384, 384)


def test_state_bytes(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    request = check_request(manifest, LATENT[:1], CAPTION[:1], **TILES)
    state = 4 * 3 * 160 * 192
    assert state_bytes(request) == int(state * (1 + 96 / 160))
    assert image_bytes(request) == state / 4


# Guidance


def guided(free: Decoder, guidance: float, **options: Any) -> Floats:
    return free.decode(
        LATENT,
        CAPTION,
        negative=NEGATIVE,
        guidance=guidance,
        times=TIMES,
        rule="ode",
        seed=11,
        **options,
    )


def test_guidance_of_one_is_the_caption_alone(free: Decoder) -> None:
    plain = free.decode(LATENT, CAPTION, times=TIMES, rule="ode", seed=11)
    np.testing.assert_array_equal(guided(free, 1), plain)


def test_a_negative_like_the_caption_changes_nothing(free: Decoder) -> None:
    options: dict[str, Any] = {"times": TIMES, "rule": "ode", "seed": 11}
    plain = free.decode(LATENT, CAPTION, **options)
    same = free.decode(LATENT, CAPTION, negative=CAPTION, guidance=7, **options)
    assert differ(same, plain) <= 10 * CLOSE  # rounding, 7 + 6 times


def test_guidance_goes_beyond_the_caption(free: Decoder) -> None:
    """After one step: x0 of the negative, and g times the way to that of the caption."""
    noise = normal(2, 3, 5 * SIDE, 6 * SIDE, seed=12) / 10
    options: dict[str, Any] = {"times": (0.4, 0.0), "rule": "ode", "noise": noise}
    with_caption = free.decode(LATENT, CAPTION, **options)
    without = free.decode(LATENT, np.repeat(NEGATIVE, 2, 0), **options)
    got = free.decode(LATENT, CAPTION, negative=NEGATIVE, guidance=3, **options)
    wanted = without + 3 * (with_caption - without)
    inside = np.maximum(np.abs(with_caption), np.abs(without)) < 0.99
    inside &= np.abs(wanted) < 0.99
    assert inside.mean() > 0.2 and np.abs(got - wanted)[inside].max() <= 10 * CLOSE
    assert np.abs(got - with_caption)[inside].max() > 0.01


def test_guidance_with_tiles(free: Decoder) -> None:
    seen: list[int] = []
    image = guided(free, 2, progress=lambda _done, calls: seen.append(calls), **TILES)
    assert seen == [3 * 4 * 2] * 24
    alone = guided(free, 1, **TILES)
    assert image.shape == alone.shape and differ(image, alone) > 0.01


def test_branches_at_once_are_those_one_after_another(
    free: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = guided(free, 3)
    monkeypatch.setattr(free.graphs, "batches_gain", True)
    ran: list[str] = []
    seen: list[tuple[int, int]] = []
    run = Program.run

    def counted(program: Program, section: str, *rest: Any, **options: Any) -> None:
        ran.append(section)
        run(program, section, *rest, **options)

    monkeypatch.setattr(Program, "run", counted)
    got = guided(free, 3, progress=lambda *at: seen.append(at))
    assert ran.count("step") == 3  # on a batch of four
    assert seen == [(call + 1, 6) for call in range(6)]
    assert differ(got, wanted) <= 10 * CLOSE
    assert "and 2 branches at once, 6 calls" in free.plan(160, 192, times=TIMES, guidance=3).text


def test_branches_one_after_another_where_memory_is_short(
    free_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Decoder.open(free_bundle, threads=1, verify=False) as decoder:
        wanted = guided(decoder, 2)
    with Decoder.open(free_bundle, threads=1, verify=False) as decoder:
        monkeypatch.setattr(decoder.graphs, "batches_gain", True)
        short_of_memory(decoder, 2 * decoder.manifest.buckets["small"].arena_bytes, monkeypatch)
        np.testing.assert_array_equal(guided(decoder, 2), wanted)


def test_branches_of_tiles_are_not_run_at_once(
    free: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free.graphs, "batches_gain", True)
    plan = free.plan(5 * SIDE, 6 * SIDE, times=TIMES, guidance=2, **TILES)
    assert "and 2 branches," in plan.text and plan.branches == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 5}, "a negative caption for guidance 5, but got none"),
        ({"guidance": 0.5, "negative": NEGATIVE}, "guidance from 1 to 100, but got 0.5"),
        ({"guidance": float("nan"), "negative": NEGATIVE}, "guidance from 1 to 100, but got nan"),
        ({"guidance": "5", "negative": NEGATIVE}, "numbers as guidance"),
        ({"guidance": [5, 5], "negative": NEGATIVE}, "guidance from 1 to 100"),
        ({"negative": NEGATIVE}, "expected guidance with the negative caption"),
        ({"guidance": 5, "negative": NEGATIVE[:, 1:]}, "a negative of as many tokens"),
        ({"guidance": 5, "negative": NEGATIVE[0]}, "expected negative shape"),
    ],
)
def test_guidance_that_cannot_be_is_refused(free_bundle: Path, options: Any, message: str) -> None:
    manifest = read_manifest(free_bundle, verify=False)
    with pytest.raises(PidRuntimeError, match=message):
        check_request(manifest, LATENT, CAPTION, times=TIMES, **options)


def test_a_distilled_bundle_refuses_guidance_with_the_reason(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    model = {**manifest.model, "name": "flux 2k (v1)", "distilled": True}
    refused: list[Any] = [{"guidance": 5}, {"negative": NEGATIVE}]
    for options in refused:
        with pytest.raises(PidRuntimeError, match=r"no guidance, which flux 2k \(v1\) has learned"):
            check_request(replace(manifest, model=model), LATENT, CAPTION, **options)
    check_request(replace(manifest, model=model), LATENT, CAPTION, guidance=1)


# Plans


def test_a_plan_says_what_a_decode_will_do(pid: Decoder) -> None:
    whole = pid.plan(5 * SIDE, 6 * SIDE)
    assert (whole.tiles, whole.calls, whole.host_bytes, whole.reason) == (1, 4, 0, None)
    assert (whole.bucket, whole.tile) == ("small", (192, 160))
    tiled = pid.plan(5 * SIDE, 6 * SIDE, batch=2, steps=2, **TILES)
    assert (tiled.tiles, tiled.calls, tiled.tile) == (4, 8, (128, 96))
    assert tiled.reason == "as asked for" and "4 tiles of 128x96" in tiled.text
    seen: list[int] = []
    pid.decode(LATENT, CAPTION, steps=2, progress=lambda _, n: seen.append(n), **TILES)
    assert set(seen) == {tiled.calls}
    assert pid.plan(20 * SIDE, 20 * SIDE, tile="auto", overlap=64).tiles > 1


def count_work(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on count what graphs are run, and on what: floating-point operations so far."""
    bind, done = decoder.graphs.bind, 0
    network, graphs = decoder.manifest.network, decoder.manifest.graphs

    def counted(name: str, tensors: Any, scratch: Any) -> Callable[[], None]:
        call, graph = bind(name, tensors, scratch), graphs[name]
        dims: dict[str, int] = {}
        for port, tensor in tensors.items():
            shape = {**graph.inputs, **graph.outputs}[port].shape
            found = zip(shape, tensor.shape, strict=True)
            dims |= {size: int(has) for size, has in found if isinstance(size, str)}

        def run() -> None:
            nonlocal done
            call()
            done += dims.get("B", 1) * graph_flop(network, graph, Sizes(dims))

        return run

    monkeypatch.setattr(decoder.graphs, "bind", counted)
    return lambda: done


GUIDED: dict[str, Any] = {"guidance": 3.0}


@pytest.mark.parametrize(
    "options",
    [{}, TILES, GUIDED, {**GUIDED, **TILES}, {"rule": "dpm++2m"}, {"rule": "ode", **TILES}],
    ids=["plain", "tiles", "guided", "both", "looking back", "ode in tiles"],
)
@pytest.mark.parametrize(("batch", "at_once"), [(1, False), (2, False), (2, True)])
def test_a_plan_counts_the_work_that_is_done(
    free_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    batch: int,
    at_once: bool,
) -> None:
    with Decoder.open(free_bundle, "torch", threads=1, verify=False) as decoder:
        monkeypatch.setattr(decoder.graphs, "batches_gain", at_once)
        work = count_work(decoder, monkeypatch)
        negative = NEGATIVE if "guidance" in options else None
        caption = CAPTION[:batch]
        decoder.decode(LATENT[:batch], caption, negative=negative, times=TIMES, **options)
        plan = decoder.plan(5 * SIDE, 6 * SIDE, batch=batch, times=TIMES, **options)
    assert plan.tflop * 1e12 == pytest.approx(work(), rel=1e-12)


def test_a_plan_of_a_distilled_bundle_computes_no_times(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Decoder.open(golden_bundle, "torch", threads=1, verify=False) as decoder:
        work = count_work(decoder, monkeypatch)
        decoder.decode(LATENT, CAPTION, steps=2, **TILES)
        plan = decoder.plan(5 * SIDE, 6 * SIDE, batch=2, steps=2, **TILES)
    assert plan.tflop * 1e12 == pytest.approx(work(), rel=1e-12)


def test_a_plan_of_an_undistilled_bundle_needs_no_negative(
    free_bundle: Path, pid_of_manifest: Callable[[Any], Decoder]
) -> None:
    manifest = read_manifest(free_bundle, verify=False)
    sampler = replace(
        manifest.sampler, steps=25, rule="dpm++2m", guidance=5.0, flow_shift=FlowShift(6.0, 2048)
    )
    plan = pid_of_manifest(replace(manifest, sampler=sampler)).plan(128, 128)
    assert (plan.steps, plan.branches, plan.calls) == (25, 2, 50)


@pytest.fixture
def pid_of_manifest(free_bundle: Path) -> Iterator[Callable[[Any], Decoder]]:
    opened: list[Decoder] = []

    def open_it(manifest: Any) -> Decoder:
        opened.append(Decoder.open(free_bundle, manifest=manifest, verify=False, threads=1))
        return opened[-1]

    yield open_it
    for decoder in opened:
        decoder.close()


@pytest.mark.parametrize("size", [(100, 128), (0, 64), (-32, 64)])
def test_a_plan_wants_whole_latent_pixels(pid: Decoder, size: tuple[int, int]) -> None:
    with pytest.raises(PidRuntimeError, match="sides in multiples of 32 pixels"):
        pid.plan(*size)
