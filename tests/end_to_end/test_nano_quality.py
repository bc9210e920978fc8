"""Whether a decode is the picture: what random weights cannot tell.

The `nano` decoder that ships, end to end on photographs it was not trained on. The floors are what
it reached when it was trained, less a margin for other processors; the last test breaks the program
on purpose and must see every break fall through a floor.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL.Image import Resampling
from quality import psnr, resized, ssim
from skimage import data
from sklearn.datasets import load_sample_image

from pid_export import bundle as exporter
from pid_export import cli as export_cli
from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import read_checkpoint
from pid_ref.network import PidNet
from pid_ref.registry import NANO
from pid_ref.sampler import sample
from pid_runtime.backends import stages
from pid_runtime.bundle.files import file_sha256
from pid_runtime.command import doctor_bundle, doctor_cli
from pid_runtime.command.images import to_uint8
from pid_runtime.decoder import Decoder
from pid_runtime.noise import image_noise
from pid_runtime.tiles import tiling_of
from places import ROOT

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

SIDE = 256
"""Of the pieces most tests decode, in pixels."""

PIECES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "astronaut": (data.astronaut, 0, 128),
    "chelsea": (data.chelsea, 20, 100),
    "coffee": (data.coffee, 60, 160),
    "china": (lambda: load_sample_image("china.jpg"), 100, 200),
}
"""Held-out photographs, and the top left corner of the piece that is decoded."""

FLOOR_DB = {"astronaut": 27.4, "chelsea": 28.05, "coffee": 27.25, "china": 20.2}
"""Lowest PSNR of each piece at sigma 0, in four steps."""

FLOORS_DB = {0.0: FLOOR_DB["astronaut"], 0.4: 20.8}
"""Lowest PSNR of the astronaut by sigma."""


def piece(name: str, height: int = SIDE, width: int = SIDE) -> Pixels:
    """A piece of a photograph, `[height, width, 3]`."""
    load, top, left = PIECES[name]
    photo = np.asarray(load())
    top, left = min(top, photo.shape[0] - height), min(left, photo.shape[1] - width)
    return np.ascontiguousarray(photo[top : top + height, left : left + width])


def reduced(original: Pixels) -> Pixels:
    """What the encoder gets: a quarter of the size, `[1, H / 4, W / 4, 3]`."""
    height, width = original.shape[:2]
    return resized(original, height // 4, width // 4)[None]


def decoded(pid: Decoder, original: Pixels, *, sigma: float = 0.0, **options: Any) -> Pixels:
    """A photograph through the codec and back, in four steps unless told else, `[H, W, 3]`."""
    latent = pid.encode(reduced(original), sigma=sigma, seed=1)
    return np.asarray(pid.decode(latent, sigma=sigma, seed=0, output="uint8", **options))[0]


def enlarged(
    pid: Decoder, original: Pixels, *, sigma: float = 0.0, by: Resampling = Resampling.BICUBIC
) -> Pixels:
    """The same latent by the codec alone, which gives the photograph back, enlarged."""
    latent = pid.encode(reduced(original), sigma=sigma, seed=1)
    height, width = original.shape[:2]
    return resized(to_uint8(pid.native_decode(latent))[0], height, width, by)


def _export(folder: Path, precision: str) -> Path:
    assert NANO.file is not None
    bundle = folder / f"nano-{precision}"
    options = ExportOptions(precision, (("test", 16_384),))
    weights = read_checkpoint(NANO.file, NANO)
    source = {"file": NANO.file.name, "sha256": file_sha256(NANO.file)}
    export_bundle(bundle, NANO.config, weights, options, checkpoint=NANO, weights=source)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tmp_path_factory.mktemp("nano"), "fp32")


@pytest.fixture(scope="module")
def pid(bundle: Path) -> Iterator[Decoder]:
    with Decoder.open(bundle, backend="onnxruntime") as decoder:
        yield decoder


@pytest.mark.parametrize("name", PIECES)
def test_a_decode_is_the_picture(pid: Decoder, name: str) -> None:
    original = piece(name)
    assert psnr(original, decoded(pid, original)) > FLOOR_DB[name]


@pytest.mark.parametrize("by", [Resampling.BICUBIC, Resampling.LANCZOS])
def test_a_decode_is_better_than_the_photograph_enlarged(pid: Decoder, by: Resampling) -> None:
    """docs/nano.md says by how much on every photograph."""
    for how, least, mean in ((psnr, 0.03, 0.6), (ssim, 0.005, 0.012)):
        gains = [
            how(original, decoded(pid, original)) - how(original, enlarged(pid, original, by=by))
            for original in map(piece, PIECES)
        ]
        assert min(gains) > least and np.mean(gains) > mean


@pytest.mark.parametrize(
    ("name", "size", "tile", "overlap"),
    [
        ("astronaut", (208, 208), 544, 256),
        pytest.param("astronaut", (512, 512), 1024, 256, marks=pytest.mark.slow),
        pytest.param("chelsea", (288, 448), 1024, 256, marks=pytest.mark.slow),
        pytest.param("coffee", (400, 600), 1024, 256, marks=pytest.mark.slow),
        pytest.param("china", (400, 640), 1152, 512, marks=pytest.mark.slow),
    ],
)
def test_tiles_are_not_seen(
    pid: Decoder, name: str, size: tuple[int, int], tile: int, overlap: int
) -> None:
    """Four times enlarged, against the same decoded whole; overlap: from 8 latent pixels."""
    latent = pid.encode(piece(name, *size)[None])
    whole = pid.decode(latent)
    rows, columns = latent.shape[2:]
    tiling = tiling_of(pid.manifest, rows, columns, (tile, tile), overlap)
    assert tiling is not None and tiling.count >= 4
    tiled = pid.decode(latent, tile=(tile, tile), overlap=overlap)
    error = np.mean(np.square(whole - tiled), dtype=np.float64)
    assert 10 * np.log10(4 / error) >= 45
    # On the rows and columns where a tile begins or ends the picture is no rougher than whole.
    for axis, tiles in ((2, tiling.rows), (3, tiling.columns)):
        edges = {32 * edge for start in tiles.starts for edge in (start, start + tiles.tile)}
        at = [edge - 1 for edge in sorted(edges) if 0 < edge < 32 * tiles.size]
        rough, usual = (np.abs(np.diff(image, axis=axis)) for image in (tiled, whole))
        on_edges = np.take(rough, at, axis).mean() / np.take(usual, at, axis).mean()
        assert on_edges == pytest.approx(rough.mean() / usual.mean(), rel=0.02)


def test_a_flat_picture_stays_flat_in_tiles(pid: Decoder) -> None:
    latent = pid.encode(np.full((1, 128, 128, 3), 90, np.uint8))
    silence = np.zeros((1, 3, 512, 512), np.float32)
    whole = pid.decode(latent, rule="ode", noise=silence)
    tiled = pid.decode(latent, rule="ode", noise=silence, tile=(320, 320), overlap=128)
    assert np.abs(whole - tiled).max() < 0.02


def results(file: str) -> Any:
    """What was measured, of the weights that are here."""
    record = json.loads((ROOT / "bench/results" / file).read_text())
    assert NANO.file is not None and record["weights_sha256"] == file_sha256(NANO.file)
    return record["rows"]


def test_decodes_of_whole_photographs_reached_what_the_page_says() -> None:
    """Above bicubic and Lanczos everywhere; 3 dB at sigma 0.4, 0.8 dB on the mean at 0.

    The grid of tokens, between which nothing is shared, is seen less than bicubic's of pixels.
    """
    rows = results("nano.json")
    found = {(row["photo"], row["sigma"], row["decoder"]): row for row in rows}
    gains: dict[float, list[float]] = {}
    for photo, sigma in dict.fromkeys((row["photo"], row["sigma"]) for row in rows):
        ours, bicubic, lanczos = (
            found[photo, sigma, name] for name in ("PiD, 4 steps", "bicubic", "Lanczos")
        )
        for what in ("psnr_db", "ssim"):
            assert ours[what] > max(bicubic[what], lanczos[what]), photo
        assert ours["grid_16"] < bicubic["grid_16"] and ours["grid_32"] < 1.5, photo
        gains.setdefault(sigma, []).append(ours["psnr_db"] - bicubic["psnr_db"])
    assert len(gains[0.0]) == 5
    assert min(gains[0.4]) > 3 and np.mean(gains[0.0]) > 0.8 and min(gains[0.0]) > 0.2


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-fp32"])
def test_precisions_reached_what_the_page_says(precision: str) -> None:
    """Within 0.1 dB and 0.002 of SSIM of float32, on every photograph."""
    rows = results("nano-fp8.json")
    found = {(row["photo"], row["sigma"]): row for row in rows[precision]}
    assert len(found) == 10
    for exact in rows["fp32 (reference)"]:
        row = found[exact["photo"], exact["sigma"]]
        assert exact["psnr_db"] - row["psnr_db"] < 0.1, exact
        assert exact["ssim"] - row["ssim"] < 0.002, exact


def test_every_backend_gives_the_same_picture(pid: Decoder, bundle: Path) -> None:
    original = piece("astronaut")
    image = decoded(pid, original)
    with Decoder.open(bundle, backend="torch") as other:
        assert psnr(image, decoded(other, original)) > 60
    assert psnr(image, _reference(pid, original)) > 60


def _reference(pid: Decoder, original: Pixels) -> Pixels:
    return to_uint8(_reference_of(pid, pid.encode(reduced(original))))[0]


def _reference_of(pid: Decoder, latent: Floats) -> Floats:
    assert NANO.file is not None
    net = PidNet(NANO.config).eval()
    net.load_state_dict(dict(read_checkpoint(NANO.file, NANO)))
    height, width = (size * NANO.space.down * NANO.space.scale for size in latent.shape[2:])
    side = NANO.config.patch_size
    noise = [torch.from_numpy(image_noise(0, draw, height, width, side))[None] for draw in range(4)]
    image = sample(
        net,
        torch.from_numpy(latent),
        torch.from_numpy(pid.empty_caption()),
        torch.zeros(1),
        noise[0],
        noise[1:],
    )
    return image.numpy()


def test_the_doctor_knows_the_image(
    pid: Decoder,
    bundle: Path,
    run_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = _reference_of(pid, doctor_bundle.sample_latent(pid.manifest)).clip(-1, 1)
    assert NANO.file is not None
    known = doctor_bundle.KNOWN_DECODES[file_sha256(NANO.file)]
    np.testing.assert_allclose(doctor_bundle.fingerprint(expected), known, rtol=0, atol=1e-3)
    code, out, _ = run_command(doctor_cli.main, bundle)
    assert code == 0 and len(re.findall(r"^decode .* ok .* from the known image$", out, re.M)) == 2
    monkeypatch.setattr(stages.Update, "forward", broken(*BREAKS["wrong sign of the velocity"]))
    code, out, _ = run_command(doctor_cli.main, bundle)
    assert code == 1 and re.search(
        r"^decode +torch cpu +wrong .* from the known image, but got", out, re.M
    )


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_half_precision_costs_less_than_a_tenth_of_a_decibel(
    pid: Decoder, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The torch backend makes its stages of the manifest: no graph need be traced for it.
    monkeypatch.setattr(exporter.GraphExporter, "export", lambda *_: b"")
    monkeypatch.setattr(exporter, "check_graph", lambda *_: None)
    original = piece("astronaut")
    with Decoder.open(_export(tmp_path, precision), backend="torch") as half:
        lost = psnr(original, decoded(pid, original)) - psnr(original, decoded(half, original))
    assert abs(lost) < 0.1


@pytest.mark.slow
def test_backends_round_to_the_same_8_bits_but_for_last_digits(tmp_path: Path) -> None:
    """Where those decide, they round differently: a trained network makes little of it."""
    images: list[Floats] = []
    bundle = tmp_path / "bundle"
    arguments = ("--space", "nano", "--precision", "fp8-fp32", "--quiet", "-o", str(bundle))
    assert export_cli.main(arguments) == 0
    for backend in ("torch", "onnxruntime"):
        with Decoder.open(bundle, backend) as rounded:
            images.append(rounded.decode(rounded.encode(reduced(piece("coffee")))))
    difference = images[0] - images[1]
    assert np.sqrt(np.mean(difference**2)) < 2e-4 and np.abs(difference).max() < 5e-3


def test_more_steps_are_better_on_the_mean(pid: Decoder) -> None:
    """By little: every step knows the same, and only less noise comes through the later ones."""
    originals = [piece(name) for name in PIECES]
    images = {steps: [decoded(pid, o, steps=steps) for o in originals] for steps in (1, 2, 4)}
    one, two, four = (
        np.mean([ssim(o, image) for o, image in zip(originals, of, strict=True)])
        for of in images.values()
    )
    assert one < two < four
    one, two, four = (
        np.mean([psnr(o, image) for o, image in zip(originals, of, strict=True)])
        for of in images.values()
    )
    assert one - 0.01 < two < four + 0.01


@pytest.mark.parametrize("name", PIECES)
def test_noise_in_the_latent_costs_quality_little_by_little(pid: Decoder, name: str) -> None:
    original = piece(name)
    sigmas = (0.0, 0.2, 0.4, 0.6, 0.8)
    by_sigma = {sigma: psnr(original, decoded(pid, original, sigma=sigma)) for sigma in sigmas}
    losses = [better - worse for better, worse in pairwise(by_sigma.values())]
    assert min(losses) > 0
    assert max(losses) < 4.5  # no cliff
    assert by_sigma[0.4] > psnr(original, enlarged(pid, original, sigma=0.4)) + 2.4


@pytest.mark.parametrize(("height", "width"), [(96, 416), (288, 96)])
def test_tall_and_wide_pictures(pid: Decoder, height: int, width: int) -> None:
    for name in PIECES:
        original = piece(name, height, width)
        assert psnr(original, decoded(pid, original)) > psnr(original, enlarged(pid, original))


BREAKS: dict[str, tuple[type[torch.nn.Module], str, str]] = {
    "wrong sign of the velocity": (
        stages.Update,
        "+ update[1] * velocity",
        "- update[1] * velocity",
    ),
    "no gate of a patch block's attention": (
        stages.LeaveBlock,
        "modulation[0] * self.proj",
        "self.proj",
    ),
    "no gate of a patch block's MLP": (stages.LeaveBlock, "modulation[3] * out", "out"),
    "no gate of a pixel block's MLP": (
        stages.LeavePixelBlock,
        "self.gate_mlp(s).float().unflatten(-1, shape) * out",
        "out",
    ),
    "rows and columns swapped in the latent": (
        stages.Latent,
        "permute(0, 2, 3, 1)",
        "permute(0, 3, 2, 1)",
    ),
    "rows and columns swapped in a patch": (
        stages.UnpatchifyBytes,
        "permute(0, 1, 3, 2, 4, 5)",
        "permute(0, 1, 4, 2, 3, 5)",
    ),
}
"""Stages of the program, each with something of its `forward` replaced.

Not here: the rotary embedding, the gate of a pixel block's attention and that of the latent. These
weights lean on them too little for a picture to show it (0.04, 0 and 0.05 dB at most); random
weights show them, in tests/export/test_golden.py.
"""


def broken(stage: type[torch.nn.Module], old: str, new: str) -> Callable[..., Any]:
    """The `forward` of a stage with one expression replaced."""
    source = textwrap.dedent(inspect.getsource(stage.forward))
    assert source.count(old) == 1
    names = dict(vars(stages))
    exec(source.replace(old, new), names)
    return names["forward"]


def above_floors(bundle: Path) -> list[bool]:
    """Of a latent without noise and of one with."""
    original = piece("astronaut")
    with Decoder.open(bundle, backend="torch") as decoder:
        return [
            psnr(original, decoded(decoder, original, sigma=sigma)) > floor
            for sigma, floor in FLOORS_DB.items()
        ]


def test_the_unbroken_program_passes(bundle: Path) -> None:
    assert all(above_floors(bundle))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_program_is_no_picture(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stage, old, new = BREAKS[name]
    monkeypatch.setattr(stage, "forward", broken(stage, old, new))
    assert not all(above_floors(bundle))
