"""Counts of operations and bytes, held to formulas written out here and to published totals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_bench.pid_stages import (
    CAPTION_TOKENS,
    KNOWN_TIMES,
    program_works,
    reference_step,
)
from pid_bench.selection import network_in
from pid_bench.stage import Stage, normal
from pid_bench.work import NO_WORK, Work, count, count_calls, total
from pid_export.bundle import dimensions_of, network_of, weight_slots
from pid_export.program import build_program
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PatchBlock, PixelBlock
from pid_ref.registry import find_checkpoint
from pid_runtime.backends.stages import Attention, build_stage
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.sizes import Sizes

META = torch.device("meta")

V1 = PidConfig(
    hidden_size=96,
    num_heads=3,
    patch_depth=3,
    latent_hidden=32,
    latent_res_blocks=2,
    pixel_hidden_size=8,
    pixel_attn_size=40,
    pixel_num_heads=5,
    text_dim=56,
)
V15 = replace(V1, latent_gate="token", pixel_gate=True, latent_padding="replicate", pixel_depth=1)

T = 11
HEIGHT, WIDTH = 64, 128
L = (HEIGHT // 16) * (WIDTH // 16)
PIXELS = 256
"""In a patch."""


def work_of(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Work:
    """One call of a module, in float32, on inputs of these shapes."""
    return count(
        Stage("", make, lambda device, dtype: tuple(normal(s, device, dtype) for s in shapes)),
        torch.float32,
    )


def program_work(*args: Any, **options: Any) -> Work:
    """A whole decode by our program; see `program_works`."""
    return total(by_graph(program_works(*args, **options)).values())


def by_graph(sections: dict[str, dict[str, Work]]) -> dict[str, Work]:
    return {graph: work for works in sections.values() for graph, work in works.items()}


# Single operations


def test_a_convolution() -> None:
    work = work_of(lambda: nn.Conv2d(5, 7, 3, padding=1), (2, 5, 6, 8))
    assert work.flop == 2 * (3 * 3 * 5) * 7 * (2 * 6 * 8)
    weights, image, result = 7 * 5 * 3 * 3 + 7, 2 * 5 * 6 * 8, 2 * 7 * 6 * 8
    assert work.parameters == weights
    assert work.weight_bytes == 4 * weights
    assert work.bytes_moved == 4 * (weights + image + result)


def test_a_matrix_product() -> None:
    work = work_of(lambda: nn.Linear(5, 7), (3, 4, 5))
    assert work == Work(2 * 12 * 5 * 7, 42, 4 * 42, 4 * (42 + 12 * 5 + 12 * 7))


def test_attention_is_charged_no_scores() -> None:
    work = work_of(lambda: Attention(3), (2, 11, 24), (2, 17, 24), (2, 17, 24))
    assert work.flop == 2 * (2 * 11 * 17 * 24) * 2  # q k^T, then its product with v
    assert work.bytes_moved == 4 * (2 * 24) * (11 + 17 + 17 + 11)


def test_elements_on_their_own_are_not_counted() -> None:
    assert work_of(nn.GELU, (4, 5)) == NO_WORK


def test_bytes_follow_the_dtype_and_calls_multiply() -> None:
    stage = Stage(
        "",
        lambda: nn.Linear(5, 7),
        lambda device, dtype: (normal((3, 5), device, dtype),),
        steps=2,
        cfg=3,
        tiles=5,
    )
    once, often = work_of(lambda: nn.Linear(5, 7), (3, 5)), count(stage, torch.bfloat16)
    assert stage.calls == 30
    assert often == Work(
        30 * once.flop, once.parameters, once.weight_bytes // 2, 30 * once.bytes_moved // 2
    )
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "options", [{"attn_mask": torch.zeros(4, 4)}, {"is_causal": True}, {"enable_gqa": True}]
)
def test_attention_that_torch_would_count_wrongly_is_refused(options: dict[str, Any]) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, **options)

    with pytest.raises(NotImplementedError, match="only plain attention"):
        work_of(Other, (1, 2, 4, 8))


def test_works_add_up() -> None:
    assert total([Work(1, 2, 3, 4), Work(10, 20, 30, 40)]) == Work(11, 22, 33, 44)
    assert total([]) == NO_WORK


# PiD, by hand. A product of [m, k] and [k, n] is 2 m k n.


def patch_block(c: PidConfig) -> int:
    d, s = c.hidden_size, L + T
    qkv, out = 2 * s * d * 3 * d, 2 * s * d * d
    attention = 2 * (2 * s * s * d)
    mlp = 3 * (2 * s * d * c.mlp_hidden)
    return qkv + attention + out + mlp + modulations(c)


def modulations(c: PidConfig) -> int:
    """Of one patch block: one row for each stream."""
    return 2 * (2 * c.hidden_size * 6 * c.hidden_size)


def pixel_block(c: PidConfig) -> int:
    d, a = c.hidden_size, c.pixel_attn_size
    flat = PIXELS * c.pixel_hidden_size
    modulation = 2 * L * d * 6 * flat
    compress, expand = 2 * L * flat * a, 2 * L * a * flat
    attention = 2 * L * a * 3 * a + 2 * (2 * L * L * a) + 2 * L * a * a
    mlp = 2 * (2 * L * PIXELS * c.pixel_hidden_size * 4 * c.pixel_hidden_size)
    return modulation + compress + attention + expand + mlp


def hoisted(c: PidConfig) -> int:
    """The caption's projection, and the latent branch but for its heads."""
    r = c.latent_hidden
    convolutions = 2 * 9 * L * (c.latent_channels * r + (1 + 2 * c.latent_res_blocks) * r * r)
    return 2 * T * c.text_dim * c.hidden_size + convolutions


def time_embedding(c: PidConfig) -> int:
    return 2 * 256 * c.hidden_size + 2 * c.hidden_size * c.hidden_size


def gates(c: PidConfig) -> list[int]:
    """Outputs of every latent gate."""
    injections = [c.hidden_size if c.latent_gate == "channel" else 1] * c.num_injections
    return [*injections, *([1] if c.pixel_gate else [])]


def embed_pixels(c: PidConfig) -> int:
    return 2 * L * PIXELS * 3 * c.pixel_hidden_size


def reference(c: PidConfig) -> int:
    d = c.hidden_size
    latent = sum(2 * L * c.latent_hidden * d + 2 * L * (2 * d) * outputs for outputs in gates(c))
    return (
        hoisted(c)
        + time_embedding(c)
        + 2 * L * (3 * PIXELS) * d
        + latent
        + c.patch_depth * patch_block(c)
        + 2 * embed_pixels(c)  # in, and the final layer out
        + c.pixel_depth * pixel_block(c)
    )


def saved_per_step(c: PidConfig) -> int:
    """What a step of the program does not do, and the reference does, but for what is hoisted."""
    d = c.hidden_size
    last_text = 2 * T * d * d + 2 * (2 * T * (L + T) * d) + 2 * T * d * d
    last_text += 3 * (2 * T * d * c.mlp_hidden)
    folded = time_embedding(c) + c.patch_depth * modulations(c)
    # The gate sees the latent's r channels in place of the D made of them.
    gated = sum(2 * L * (d - c.latent_hidden) * outputs for outputs in gates(c))
    # The shift before a pixel block's attention is made compressed.
    shifts = c.pixel_depth * 2 * L * d * (PIXELS * c.pixel_hidden_size - c.pixel_attn_size)
    # Its attention's output goes through one matrix in place of two in a row.
    merged = c.pixel_depth * 2 * L * c.pixel_attn_size * c.pixel_attn_size
    return last_text + folded + gated + shifts + merged - embed_pixels(c)  # embedded twice


def test_a_patch_block() -> None:
    shapes = (1, L, 96), (1, T, 96), (1, 96), (L, 16), (T, 16)
    assert work_of(lambda: PatchBlock(V1), *shapes).flop == patch_block(V1)


def test_a_pixel_block() -> None:
    shapes = (1, L, PIXELS, 8), (1, L, 96), (L, 4)
    assert work_of(lambda: PixelBlock(V1), *shapes).flop == pixel_block(V1)


@pytest.mark.parametrize("config", [V1, V15], ids=["v1", "v1.5"])
def test_the_reference(config: PidConfig) -> None:
    stage = reference_step(config, HEIGHT, WIDTH, T, steps=4)
    assert count(stage, torch.float32).flop == 4 * reference(config)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("config", [V1, V15], ids=["v1", "v1.5"])
def test_the_program_does_exactly_this_much_less(config: PidConfig, steps: int) -> None:
    less = steps * saved_per_step(config) + (steps - 1) * hoisted(config)
    work = program_work(config, HEIGHT, WIDTH, T, steps)
    assert work.flop == steps * reference(config) - less


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_programs_weights_are_the_bundles(precision: str) -> None:
    program = build_program(V15, precision, KNOWN_TIMES)
    slots = weight_slots(V15, program, precision).values()
    work = program_work(V15, HEIGHT, WIDTH, T, precision=precision)
    assert work.weight_bytes == sum(slot.bytes for slot in slots)


def test_works_by_graph() -> None:
    sections = program_works(V1, HEIGHT, WIDTH, T)
    works = by_graph(sections)
    assert sum(map(len, sections.values())) == len(works)
    program = build_program(V1, "bf16", KNOWN_TIMES)
    assert set(works) == {"table", *program.graphs} - {"patchify", "unpatchify_bytes"}
    s, d = L + T, V1.hidden_size
    full, last = 2 * (2 * s * s * d), 2 * (2 * L * s * d)
    assert works["attention"].flop == 4 * (2 * full + last)


def test_chunks_have_the_same_flop_and_read_the_weights_again() -> None:
    spec = build_program(V1, "fp32", KNOWN_TIMES).graphs["pixel.1"]
    stage = build_stage(spec.stage, spec.options, dimensions_of(network_of(V1)), "fp32").to(META)

    def part(tokens: int) -> Work:
        sizes = Sizes({"B": 1, "L": tokens})
        inputs = {
            name: torch.empty(sizes.shape(port.shape), device=META)
            for name, port in spec.inputs.items()
        }
        return count_calls(stage, (), inputs, 1)

    whole, chunk = part(L), part(L // 4)
    assert 4 * chunk.flop == whole.flop
    matrices = sum(z.nbytes for name, z in stage.state_dict().items() if "rope" not in name)
    assert 4 * chunk.bytes_moved == whole.bytes_moved + 3 * matrices


# PiD, as published: TFLOP of one step


@pytest.mark.parametrize(
    ("variant", "side", "tflop"),
    [
        ("2kto4k-v1", 2048, 45.12),
        ("2kto4k-v1", 4096, 486.5),
        ("2kto4k", 2048, 46.36),
        ("2kto4k", 4096, 491.5),
    ],
)
def test_the_released_networks(variant: str, side: int, tflop: float) -> None:
    config = find_checkpoint("flux", variant).config
    reference = count(reference_step(config, side, side, CAPTION_TOKENS), torch.bfloat16)
    assert reference.flop / 1e12 == pytest.approx(tflop, rel=0.005)
    program = program_work(config, side, side, CAPTION_TOKENS)
    assert 0.9 * 4 * reference.flop < program.flop < 4 * reference.flop
    assert program.weight_bytes < 0.7 * reference.weight_bytes
    assert program.parameters < 0.7 * reference.parameters


def test_sizes_that_cannot_be() -> None:
    for height, width in ((64, 100), (0, 64), (-64, 64)):
        with pytest.raises(PidInputError, match=f"multiples of 32, but got {width}x{height}$"):
            reference_step(V1, height, width, T)
        with pytest.raises(PidInputError, match=f"multiples of 32, but got {width}x{height}$"):
            program_work(V1, height, width, T)


def test_rounded_weights_are_half_as_many_bytes() -> None:
    """Those of the blocks' large matrices, which are most of what there is at full size."""
    config = find_checkpoint("flux", "2k").config
    at = {
        precision: program_work(config, 512, 512, T, precision=precision)
        for precision in ("bf16", "fp8", "int8")
    }
    for precision in ("fp8", "int8"):
        assert 0.5 < at[precision].weight_bytes / at["bf16"].weight_bytes < 0.57
        assert at[precision].flop == pytest.approx(at["bf16"].flop, rel=2e-2)


def test_graphs_that_a_bundle_keeps_are_counted_as_they_are() -> None:
    config, kept = find_checkpoint("flux", "2k").config, ("image.3", "update", "attention")
    own, plain, rounded = (
        by_graph(program_works(config, 512, 512, T, precision=precision, kept=names))
        for precision, names in (("fp8", kept), ("bf16", ()), ("fp8", ()))
    )
    assert set(own) == set(plain) == set(rounded)
    scales = 16  # bytes of them at most, of what comes rounded from other graphs
    for as_they_are, name in ((True, "image.3"), (True, "update"), (False, "image.4")):
        like, unlike = (plain, rounded) if as_they_are else (rounded, plain)
        assert abs(own[name].weight_bytes - like[name].weight_bytes) <= scales
        assert abs(own[name].weight_bytes - unlike[name].weight_bytes) > 1_000_000
    assert own["attention"].bytes_moved == plain["attention"].bytes_moved
    assert own["pixel_attention"].bytes_moved == rounded["pixel_attention"].bytes_moved


def test_a_bundle_says_what_it_keeps(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    assert network_in(manifest).kept == ()
    model = {**manifest.model, "rounding": {"kept": ["update"]}}
    assert network_in(replace(manifest, model=model)).kept == ("update",)
