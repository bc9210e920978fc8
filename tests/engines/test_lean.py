"""A lean program computes what the bundle's own does, in less memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparing import assert_equal, normal
from lean_bundles import copy_with, in_slices, lean
from pid_engines.lean import lean_program
from pid_export import bundle as exporting
from pid_export.bundle import BUCKETS, ExportOptions, export_bundle
from pid_export.verify import _sliced_as
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.registry import find_checkpoint
from pid_ref.sampler import timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Copy, Each, Manifest, Noise, Operand, Run
from pid_runtime.bundle.sizes import sizes_of_request
from pid_runtime.decoder import Decoder
from pid_runtime.work import section_flop

SMALL = PidConfig(
    latent_channels=4,
    latent_hidden=8,
    latent_res_blocks=1,
    hidden_size=16,
    num_heads=2,
    patch_depth=3,
    pixel_hidden_size=4,
    pixel_attn_size=16,
    pixel_num_heads=2,
    text_dim=6,
    text_max_length=5,
)
"""The pixels' attention is as wide as the tokens, so that more can take each other's place."""


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write no graphs: the torch backend needs none."""
    monkeypatch.setattr(exporting.GraphExporter, "export", lambda *_: b"")
    monkeypatch.setattr(exporting, "check_graph", lambda *_: None)


def exported(folder: Path, config: PidConfig, **options: Any) -> Path:
    chosen = ExportOptions(buckets=(("tiny", 40),), **options)
    weights = RandomWeights(state_shapes(config), 0)
    export_bundle(folder, config, weights, chosen, weights={"random_seed": 0})
    return folder


def assert_decodes_alike(bundle: Path, tmp_path: Path, backend: str, tokens: int) -> None:
    """Decode batches of shapes with the bundle's program and a lean one, in equal slices.

    What torch makes of a query, or an image, may differ in the last bit with their number: with
    torch the bundle's attention is in slices too, and all batches are.
    """
    manifest = in_slices(read_manifest(bundle, verify=False), tokens)
    network = manifest.network
    changed = lean(manifest)
    if backend == "torch":
        manifest = _sliced_as(changed, manifest)
    pair = (
        copy_with(bundle, tmp_path / "whole", manifest),
        copy_with(bundle, tmp_path / "lean", changed),
    )
    times = None if manifest.sampler.times else (0.9, 0.4, 0.0)
    caption = normal(1, 3, network["text_dim"], seed=9)
    latents = [
        normal(batch, network["latent_channels"], height, width, seed=batch)
        for batch, height, width in ((1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 1, 1))
    ]
    images: list[list[Any]] = []
    for each in pair:
        with Decoder.open(each, backend, threads=1) as decoder:
            options: dict[str, Any] = {"times": times, "seed": 4, "sigma": 0.25}
            images.append([decoder.decode(each, caption, **options) for each in latents])
    for want, got in zip(*images, strict=True):
        assert_equal(got, want, tolerance=0)


@pytest.mark.parametrize("tokens", [5, 4096])
def test_onnx_runtime_decodes_the_same(golden_bundle: Path, tmp_path: Path, tokens: int) -> None:
    assert_decodes_alike(golden_bundle, tmp_path, "onnxruntime", tokens)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pixel_depth": 1},
        {"pixel_depth": 3},
        {"pixel_depth": 4, "patch_depth": 1},
        {"pixel_gate": True, "latent_gate": "token"},
        {"hidden_size": 32},
    ],
    ids=str,
)
def test_torch_decodes_the_same(untraced: None, tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = exported(tmp_path / "bundle", replace(SMALL, **change))
    assert_decodes_alike(bundle, tmp_path, "torch", 7)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16"}, {"arbitrary_timesteps": True}]
)
def test_so_it_does_in_other_bundles(
    untraced: None, tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = exported(tmp_path / "bundle", SMALL, **options)
    assert_decodes_alike(bundle, tmp_path, "torch", 7)


def test_it_takes_what_it_has_to(golden_bundle: Path) -> None:
    """No pixels, one x, no other state: all that is kept of them is a slice."""
    manifest = read_manifest(golden_bundle)
    changed = lean_program(manifest)
    wide = {
        name
        for name, buffer in changed.buffers.items()
        if buffer.shape[:2] == ("B", "L") and buffer.kind == "temporary"
    }
    depth = manifest.network["patch_depth"]
    last = {f"{name}.{depth - 1}" for name in ("q", "attended")}
    pixels = {f"pixel_{name}.{i}" for name in ("q", "k", "v", "attended") for i in (0, 1)}
    assert wide == {"state", "noise", "latent_tokens", "x.0"} | last | pixels
    *_, noise, update = changed.program["step"]
    assert isinstance(noise, Noise) and isinstance(update, Each)
    again, sampler, copy = update.do
    assert isinstance(again, Run) and isinstance(sampler, Run)
    assert (again.graph, sampler.graph, copy) == ("pixel.1", "update", Copy("next_state", "state"))
    assert again.outputs["pixels"] == sampler.inputs["pixels"]
    attentions = [each for each in changed.program["step"] if isinstance(each, Run) and each.dims]
    assert len(attentions) == depth + 2 and {each.chunk for each in attentions} == {"Q"}
    assert changed.format_version == (2, 0) and manifest.format_version == (1, 4)
    for section in ("prologue", "timestep", "image", "image_bytes"):
        assert changed.program[section] == manifest.program[section]


def with_step(manifest: Manifest, *more: Run | Copy) -> Manifest:
    step = (*manifest.program["step"], *more)
    return replace(manifest, program={**manifest.program, "step": step})


def test_what_is_needed_later_stays(golden_bundle: Path) -> None:
    """A value that is read again, or in another section, does not give way to the next."""
    manifest = read_manifest(golden_bundle)
    first = next(
        each
        for each in manifest.program["step"]
        if isinstance(each, Run) and each.graph == "image.1"
    )
    unread = {name: Operand(o.buffer + ".more", o.start) for name, o in first.outputs.items()}
    buffers = {
        **manifest.buffers,
        **{o.buffer + ".more": manifest.buffers[o.buffer] for o in first.outputs.values()},
    }
    again = with_step(replace(manifest, buffers=buffers), replace(first, outputs=unread))
    kept = lean_program(again)
    assert kept.buffers["x.1"].shape[1] == "L" and kept.buffers["x.2"].shape[1] == "C"
    ends = (*manifest.program["image"], Copy("next_state", "noise"))
    elsewhere = replace(manifest, program={**manifest.program, "image": ends})
    assert lean_program(elsewhere).buffers["next_state"].shape[1] == "L"


def test_what_cannot_be_computed_again_is_refused(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle)
    *before, noise, update, copy = manifest.program["step"]
    step = (*before, Copy("noise", "state"), noise, update, copy)
    changed = replace(manifest, program={**manifest.program, "step": step})
    with pytest.raises(AssertionError, match=r"pixel\.1 cannot be run again for update"):
        lean_program(changed)


def full_size(bucket: str) -> tuple[int, int, float]:
    """Arena of the v1 network's own and of its lean program, and how much more work that is."""
    config = find_checkpoint("flux", "2k").config
    times = (timesteps(1)[0], *timesteps(4)[:-1])
    program = exporting.build_program(config, "bf16", len(times))
    options = ExportOptions(buckets=((bucket, BUCKETS[bucket]),), precision="bf16")
    manifest = Manifest(
        producer="",
        model={},
        precision="bf16",
        network=exporting.network_of(config),
        tokens_per_latent=config.tokens_per_latent,
        sampler=exporting._sampler(options, times),
        files={},
        graphs={
            name: exporting.Graph("", g.stage, g.options, g.inputs, g.outputs, 0, "")
            for name, g in program.graphs.items()
        },
        buffers=program.buffers,
        buckets=exporting._buckets(config, program, options, len(times)),
        program=program.sections,
    )
    manifest = in_slices(manifest, 1024)
    changed = lean(manifest)
    side = int((BUCKETS[bucket] / config.tokens_per_latent**2) ** 0.5)
    sizes = sizes_of_request(
        manifest.network,
        manifest.tokens_per_latent,
        batch=1,
        latent_height=side,
        latent_width=side,
        text_tokens=300,
        rows=5,
    )
    own, more = (section_flop(each, "step", sizes) for each in (manifest, changed))
    return (
        manifest.buckets[bucket].arena_bytes,
        changed.buckets[bucket].arena_bytes,
        more / own - 1,
    )


def test_a_full_size_network_takes_less() -> None:
    own, changed, work = full_size("4k")
    assert own == 1_795_094_016 and changed == 1_396_508_160
    assert 0 < work < 0.02
