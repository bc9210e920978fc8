"""Decodes of the C++ runtime are those of Python, and so are its refusals."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from comparing import assert_equal, normal
from cpp_build import executable
from cpp_data import NETWORKS, edited
from pid_engines.child import Child, ChildError
from pid_export.golden_guided import TOLERANCE as GUIDED_TOLERANCE
from pid_export.golden_guided import export_guided, read_guided
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import RULES
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import image_noise
from pid_runtime.schedule import Rule
from places import GOLDEN

TOLERANCE = 1e-5

GUIDED = sorted((GOLDEN / "guided").glob("*.safetensors"))
"""Golden files of undistilled decodes."""

Floats = NDArray[np.float32]


class Process(Child):
    """runtime/cpp/tests/decoder_process.cpp, which decodes as it is told."""

    def __init__(self, program: Path, folder: Path) -> None:
        super().__init__([program])
        self.folder, self.files = folder, 0

    def save(self, array: Floats) -> dict[str, Any]:
        self.files += 1
        path = self.folder / f"{self.files}.f32"
        path.write_bytes(np.ascontiguousarray(array, np.float32).tobytes())
        return {"file": str(path), "shape": list(array.shape)}

    def decode(self, tensors: dict[str, Any], **options: Any) -> NDArray[Any]:
        target = self.folder / "image"
        given = {
            name: [self.save(each) for each in tensor]
            if name == "step_noise"
            else self.save(tensor)
            for name, tensor in tensors.items()
        }
        answer = self.ask({"decode": given, "to": str(target), **options})
        kind = np.uint8 if options.get("output") == "uint8" else np.float32
        return np.frombuffer(target.read_bytes(), kind).reshape(answer["shape"])


@pytest.fixture
def process(built: Path, tmp_path: Path) -> Iterator[Process]:
    decoder = Process(executable(built, "pid_decoder_process"), tmp_path)
    with decoder:
        yield decoder
        decoder.end()


@pytest.mark.parametrize("name", [*NETWORKS, "lean"])
def test_decodes_are_those_of_python(process: Process, data: Path, name: str) -> None:
    bundle, random_numbers = data / name, np.random.default_rng(3)
    network = read_manifest(bundle, verify=False).network
    scale = network["patch_size"] * read_manifest(bundle, verify=False).tokens_per_latent
    caption = random_numbers.standard_normal((2, 9, network["text_dim"]), np.float32)
    process.ask({"open": str(bundle), "threads": 1})
    with Decoder.open(bundle, threads=1, verify=False) as python:
        for height, width in ((2, 3), (4, 1)):
            shape = (2, network["latent_channels"], height, width)
            latent = random_numbers.standard_normal(shape, np.float32)
            tensors = {"latent": latent, "caption": caption}
            options = {"sigma": [0.0, 0.5], "seeds": [7]}
            want = python.decode(latent, caption, sigma=[0.0, 0.5], seed=7)
            assert_equal(process.decode(tensors, **options), want, TOLERANCE)
            pixels = process.decode(tensors, **options, output="uint8")
            wanted = python.decode(latent, caption, sigma=[0.0, 0.5], seed=7, output="uint8")
            assert_equal(pixels, wanted, 1)
            assert (pixels != wanted).mean() < 1e-3
            draws = [
                np.stack([image_noise(b, k, height * scale, width * scale) for b in (20, 30)])
                for k in range(4)
            ]
            tensors = {"latent": latent, "noise": draws[0], "step_noise": draws[1:]}
            want = python.decode(latent, noise=draws[0], step_noise=draws[1:])
            assert_equal(process.decode(tensors), want, TOLERANCE)
        one = {"latent": latent[:1], "caption": caption[:1]}
        cases: list[tuple[int, Rule]] = [(1, "sde"), (2, "ode")]
        for steps, rule in cases:
            want = python.decode(*one.values(), steps=steps, rule=rule, seed=2**64 - 1)
            got = process.decode(one, steps=steps, rule=rule, seeds=[2**64 - 1])
            assert_equal(got, want, TOLERANCE)


def test_any_times_and_chunks_are_those_of_python(
    process: Process, data: Path, chunked_bundle: Path
) -> None:
    latent = np.random.default_rng(5).standard_normal((2, 16, 3, 3), np.float32)
    times = [1.0, 0.8, 0.5, 0.0]
    cases: list[tuple[Path, dict[str, Any]]]
    cases = [(data / "any_times", {"times": times}), (chunked_bundle, {})]
    for bundle, options in cases:
        process.ask({"open": str(bundle), "threads": 1})
        with Decoder.open(bundle, threads=1, verify=False) as python:
            want = python.decode(latent, seed=[4, 4], **options)
        assert_equal(process.decode({"latent": latent}, seeds=[4, 4], **options), want, TOLERANCE)


def test_a_lean_program_decodes_the_same(
    process: Process, data: Path, chunked_bundle: Path
) -> None:
    latent = np.random.default_rng(8).standard_normal((2, 16, 3, 2), np.float32)
    images: list[NDArray[Any]] = []
    flop: list[float] = []
    for bundle in (chunked_bundle, data / "lean"):
        process.ask({"open": str(bundle), "threads": 1})
        images.append(process.decode({"latent": latent}, seeds=[1, 2]))
        flop.append(process.ask({"plan": [64, 96], "batch": 1, "steps": 2})["tflop"])
        with Decoder.open(bundle, threads=1, verify=False) as python:
            assert flop[-1] == pytest.approx(python.plan(64, 96, steps=2).tflop)
    assert_equal(*images, tolerance=0)
    assert flop[0] < flop[1]


def test_8_bit_numbers_are_those_of_python(process: Process, fp8_twin: Path) -> None:
    latent = np.random.default_rng(6).standard_normal((2, 16, 3, 3), np.float32)
    process.ask({"open": str(fp8_twin), "threads": 1})
    with Decoder.open(fp8_twin, threads=1, verify=False) as python:
        want = python.decode(latent, seed=[4, 5])
    assert np.array_equal(process.decode({"latent": latent}, seeds=[4, 5]), want)


SIDE = 32
TILES: dict[str, Any] = {"tile": (4 * SIDE, 3 * SIDE), "overlap": SIDE}
"""2 x 2 tiles of 5 x 6 pixels of the latent."""


class Both:
    """One bundle, opened by both runtimes."""

    def __init__(self, process: Process, python: Decoder) -> None:
        self.process, self.python = process, python

    def check(
        self,
        tensors: dict[str, Any],
        *,
        seeds: tuple[int, ...] = (),
        tolerance: float = TOLERANCE,
        **options: Any,
    ) -> Floats:
        """Decode with both and compare; Python's image."""
        given = {**options, "tile": (-1, -1)} if options.get("tile") == "auto" else options
        got = self.process.decode(tensors, seeds=seeds, **given)
        want = self.python.decode(**tensors, seed=seeds or 0, **options)
        if want.dtype == np.uint8:
            assert_equal(got, want, 1)
            assert (got != want).mean() < 1e-3
        else:
            assert_equal(got, want, tolerance)
        return want

    def check_refusal(self, tensors: dict[str, Any], **options: Any) -> None:
        """Both refuse in the same words."""
        given = {**options, "tile": (-1, -1)} if options.get("tile") == "auto" else options
        with pytest.raises(PidRuntimeError) as python:
            self.python.decode(**tensors, **options)
        with pytest.raises(ChildError) as cpp:
            self.process.decode(tensors, **given)
        assert str(python.value) in str(cpp.value)


@pytest.fixture
def open_both(process: Process) -> Iterator[Callable[[Path], Both]]:
    with contextlib.ExitStack() as opened:

        def open_it(bundle: Path) -> Both:
            process.ask({"open": str(bundle), "threads": 1})
            decoder = Decoder.open(bundle, threads=1, verify=False)
            return Both(process, opened.enter_context(decoder))

        yield open_it


def test_tiles_are_those_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    both = open_both(data / "v1")
    latent, caption = normal(2, 16, 5, 6, seed=1), normal(2, 9, 32, seed=2)
    tensors: dict[str, Any] = {"latent": latent, "caption": caption}
    whole = both.check(tensors, seeds=(7, 7))
    tiled = both.check(tensors, seeds=(7, 7), sigma=[0, 0.4], **TILES)
    assert np.abs(tiled - whole).max() > 0.01
    both.check(tensors, seeds=(7, 8), output="uint8", **TILES)
    both.check({**tensors, "caption": caption[:1]}, seeds=(2**64 - 1, 3), rule="ode", **TILES)
    both.check(tensors, seeds=(7, 8), rule="dpm++2m")
    draws = [np.stack([image_noise(b, k, 160, 192) for b in (9, 10)]) for k in range(4)]
    noise = {"noise": draws[0], "step_noise": draws[1:]}
    given = both.check({**tensors, **noise}, **TILES)
    np.testing.assert_array_equal(both.python.decode(**tensors, seed=9, **TILES), given)
    both.check({"latent": normal(1, 16, 20, 21, seed=3)}, steps=1, tile="auto", overlap=64)


def test_guidance_is_that_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    tensors: dict[str, Any] = {
        "latent": normal(2, 16, 5, 6, seed=1),
        "caption": normal(2, 12, 32, seed=2),
        "negative": normal(1, 12, 32, seed=3),
    }
    both = open_both(data / "any_times")
    guided: dict[str, Any] = {"times": [0.97, 0.7, 0.3, 0.0], "guidance": 3.0}
    for rule in RULES:
        # Each step makes of an error 3 + 2 times as much.
        both.check(tensors, seeds=(4, 4), tolerance=10 * TOLERANCE, rule=rule, **guided)
    both.check(tensors, seeds=(4, 4), tolerance=10 * TOLERANCE, **TILES, **guided)
    both.check(tensors, seeds=(4, 4), **{**guided, "guidance": 1.0})
    shifted = open_both(data / "undistilled")
    assert shifted.python.manifest.sampler.rule == "dpm++2m"
    shifted.check(tensors, seeds=(4, 4), tolerance=50 * TOLERANCE)
    shifted.check(tensors, seeds=(4, 4), steps=3, guidance=2.0, **TILES, tolerance=50 * TOLERANCE)


def test_plans_are_those_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    def check(both: Both, height: int, width: int, **options: Any) -> None:
        asked = {**options, "plan": [height, width]}
        if options.get("tile") == "auto":
            asked["tile"] = (-1, -1)
        want = asdict(both.python.plan(height, width, **options))
        assert both.process.ask(asked) == {**want, "tile": list(want["tile"])}

    def check_refusal(both: Both, height: int, width: int, **options: Any) -> None:
        asked = {**options, "plan": [height, width]}
        if options.get("tile") == "auto":
            asked["tile"] = (-1, -1)
        with pytest.raises(PidRuntimeError) as python:
            both.python.plan(height, width, **options)
        with pytest.raises(ChildError) as cpp:
            both.process.ask(asked)
        assert str(python.value) in str(cpp.value)

    both = open_both(data / "v1")
    for batch in (1, 3):
        check(both, 160, 192, batch=batch)
        check(both, 160, 192, batch=batch, steps=2, **TILES)
        check(both, 160, 192, batch=batch, rule="dpm++2m")
    check(both, 640, 672, tile="auto", overlap=64)
    for height, width, options in (
        (640, 640, {}),
        (100, 96, {}),
        (0, 64, {}),
        (64, -64, {}),
        (160, 192, {"steps": 3}),
        (160, 192, {"tile": (64, 64)}),
        (160, 192, {"batch": 0}),
        (160, 192, {"guidance": 0.5}),
        (32 * 600, 32, {"tile": "auto"}),
    ):
        check_refusal(both, height, width, **options)
    for name in ("v1.5", "flux2"):
        check(open_both(data / name), 128, 128)
    both = open_both(data / "undistilled")
    check(both, 160, 192)
    check(both, 160, 192, guidance=1.0, steps=3)
    check(both, 160, 192, guidance=2.0, steps=3, batch=2, **TILES)
    both = open_both(data / "any_times")
    check(both, 160, 192, times=[0.97, 0.3, 0.0], batch=2)
    check_refusal(both, 160, 192)


@pytest.mark.parametrize("file", GUIDED, ids=lambda file: file.stem)
def test_guided_golden_files_agree(process: Process, tmp_path: Path, file: Path) -> None:
    golden = read_guided(file)
    export_guided(golden, tmp_path / "bundle")
    process.ask({"open": str(tmp_path / "bundle"), "threads": 1})
    tensors: dict[str, Any] = {**golden.inputs}
    sigma = np.atleast_1d(tensors.pop("sigma")).tolist()
    options = {"steps": golden.steps, "guidance": golden.guidance, "sigma": sigma}
    process.decode(tensors, **options, state_to=str(tmp_path / "state"))
    batch, _, height, width = golden.unclamped.shape
    patch = golden.config.patch_size
    grid = (batch, height // patch, width // patch, patch, patch, 3)
    state = np.frombuffer((tmp_path / "state").read_bytes(), np.float32).reshape(grid)
    image = state.transpose(0, 5, 1, 3, 2, 4).reshape(golden.unclamped.shape)
    assert_equal(image, golden.unclamped, GUIDED_TOLERANCE)


def test_both_refuse_in_the_same_words(
    open_both: Callable[[Path], Both], data: Path, tmp_path: Path
) -> None:
    latent, negative = normal(1, 16, 5, 6, seed=1), normal(1, 12, 32, seed=3)
    one: dict[str, Any] = {"latent": latent}
    both = open_both(data / "v1")
    for options in (
        {"tile": (100, 64)},
        {"tile": (192, 192)},
        {"tile": (64, 64)},
        {"tile": (64, 64), "overlap": 10},
        {"overlap": 32},
        {"steps": 3},
        {"times": [1.0, 0.0]},
        {"guidance": 5.0},
    ):
        both.check_refusal(one, **options)
    both.check_refusal({"latent": normal(1, 16, 20, 20, seed=1)})
    both.check_refusal({"latent": normal(1, 16, 513, 1, seed=1)}, tile="auto")
    both.check_refusal({"latent": normal(1, 16, 40, 40, seed=1)}, tile=(640, 640))
    both.check_refusal({"latent": normal(1, 16, 40, 40, seed=1)}, tile="auto", overlap=320)
    both = open_both(data / "undistilled")
    both.check_refusal(one)
    for options in ({"guidance": 0.5}, {"guidance": 1000.5}, {"guidance": 2.0, "steps": 101}):
        both.check_refusal({**one, "negative": negative}, **options)
    both.check_refusal({**one, "negative": negative[:, 1:]})
    both.check_refusal({**one, "negative": negative[0]})
    both.check_refusal({**one, "negative": negative}, times=[0.5, 0.7, 0.0])
    both = open_both(data / "any_times")
    both.check_refusal({**one, "negative": negative}, times=[1.0, 0.0])
    distilled = edited(
        data / "v1",
        tmp_path / "distilled",
        lambda tree: tree["model"].update(name="flux 2k", distilled=True),
    )
    both = open_both(distilled)
    both.check_refusal(one, guidance=5.0)
    both.check_refusal(one, guidance=2.5)
    both.check_refusal({**one, "negative": negative})


def test_an_image_of_nan_is_refused(process: Process, spoilt_bundle: Path) -> None:
    process.ask({"open": str(spoilt_bundle), "threads": 1})
    latent = np.random.default_rng(5).standard_normal((1, 16, 2, 3), np.float32)
    process.decode({"latent": latent}, steps=1)
    with pytest.raises(ChildError, match="step 3 of 4 gave NaN or infinity; check the bundle"):
        process.decode({"latent": latent}, output="uint8")
    with pytest.raises(ChildError, match="step 3 of 4 gave NaN or infinity; check the bundle"):
        process.decode({"latent": latent}, tile=(64, 32), overlap=0)
