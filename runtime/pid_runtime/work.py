"""How much a decode computes: 2 floating-point operations for every multiply-add.

Counted are matrix products, convolutions and attention, as torch's `FlopCounterMode` counts them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pid_runtime.bundle.manifest import Graph, Instruction, Manifest, Noise, runs_of
from pid_runtime.bundle.sizes import Sizes

Network = Mapping[str, Any]


def section_flop(manifest: Manifest, section: str, sizes: Sizes) -> int:
    """FLOP of a section of the program, for a batch of one image."""
    return _flop(manifest, manifest.program.get(section, ()), sizes)


def refresh_flop(manifest: Manifest, name: str, sizes: Sizes) -> int:
    """FLOP of what of the prologue depends on this input, for a batch of one image."""
    return _flop(manifest, manifest.dependent("prologue", name), sizes)


def _flop(manifest: Manifest, program: Iterable[Instruction], sizes: Sizes) -> int:
    return sum(
        graph_flop(manifest.network, manifest.graphs[run.graph], sizes.extended(run.dims))
        for instruction in program
        if not isinstance(instruction, Noise)
        for run in runs_of(instruction)
    )


def graph_flop(network: Network, graph: Graph, sizes: Sizes) -> int:
    """FLOP of one call of a graph, on all its tokens, for a batch of one image."""
    count = _STAGES.get(graph.stage)
    return 0 if count is None else 2 * count(network, graph, sizes)


def _latent(n: Network, _graph: Graph, sizes: Sizes) -> int:
    channels = n["latent_channels"] // n["latent_unpatchify"] ** 2
    r = n["latent_hidden"]
    convolutions = channels * r + (1 + 2 * n["latent_res_blocks"]) * r * r
    return 9 * convolutions * sizes.value("Hs") * sizes.value("Ws")


def _caption(n: Network, _graph: Graph, sizes: Sizes) -> int:
    return sizes.value("T") * n["text_dim"] * n["hidden_size"]


def _timestep(n: Network, _graph: Graph, _sizes: Sizes) -> int:
    d = n["hidden_size"]
    return 256 * d + d * d + 2 * n["patch_depth"] * d * 6 * d


def _attention(_n: Network, graph: Graph, sizes: Sizes) -> int:
    _, queries, size = sizes.shape(graph.inputs["q"].shape)
    return 2 * queries * sizes.value("S") * size


def _tokens(n: Network, graph: Graph, sizes: Sizes) -> int:
    _, tokens, d = sizes.shape(graph.outputs["k"].shape)
    per_token = (3 if "q" in graph.outputs else 2) * d * d
    if graph.options.get("embed"):
        per_token += 3 * n["patch_size"] ** 2 * d
    if not graph.options["first"]:
        per_token += _leave(n)
    if graph.options.get("inject"):
        per_token += _gate(n, d if n["latent_gate"] == "channel" else 1)
    return tokens * per_token


def _pixel_first(n: Network, graph: Graph, sizes: Sizes) -> int:
    gate = _gate(n, 1) if graph.options["inject"] else 0
    return sizes.value("L") * (_leave(n) + gate + _embed(n) + _enter_pixels(n))


def _pixels(n: Network, graph: Graph, sizes: Sizes) -> int:
    embed = _embed(n) if graph.options["embed"] else 0
    return sizes.value("L") * (embed + _leave_pixels(n) + _enter_pixels(n))


def _update(n: Network, graph: Graph, sizes: Sizes) -> int:
    embed = _embed(n) if graph.options["embed"] else 0
    velocity = n["patch_size"] ** 2 * n["pixel_hidden_size"] * 3
    return sizes.value("L") * (embed + _leave_pixels(n) + velocity)


def _leave(n: Network) -> int:
    """Multiply-adds per token of the second half of a patch block."""
    d = n["hidden_size"]
    return d * d + 3 * d * n["mlp_hidden"]


def _gate(n: Network, outputs: int) -> int:
    d, r = n["hidden_size"], n["latent_hidden"]
    return r * d + d * outputs + r * outputs


def _embed(n: Network) -> int:
    return n["patch_size"] ** 2 * 3 * n["pixel_hidden_size"]


def _enter_pixels(n: Network) -> int:
    flat, d, a = (
        n["patch_size"] ** 2 * n["pixel_hidden_size"],
        n["hidden_size"],
        n["pixel_attn_size"],
    )
    return d * flat + flat * a + d * a + 3 * a * a


def _leave_pixels(n: Network) -> int:
    flat, d = n["patch_size"] ** 2 * n["pixel_hidden_size"], n["hidden_size"]
    return n["pixel_attn_size"] * flat + 4 * d * flat + flat * 8 * n["pixel_hidden_size"]


_STAGES: Mapping[str, Callable[[Network, Graph, Sizes], int]] = {
    "latent": _latent,
    "caption": _caption,
    "timestep": _timestep,
    "attention": _attention,
    "tokens": _tokens,
    "pixel_first": _pixel_first,
    "pixels": _pixels,
    "update": _update,
}
"""Multiply-adds of a call, by stage; the others move numbers only."""
