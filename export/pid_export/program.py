"""A network as a program: which graphs there are, and the order they run in over which buffers.

Between two attentions every token is on its own. So the network is cut there: per-token stages,
chunked over L, alternate with attentions, and each buffer is written by one stage and read by
later ones. Names say where a value belongs: `x.3` is the image tokens that enter patch block 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pid_ref.config import PidConfig
from pid_runtime.bundle.manifest import (
    FP8,
    PRECISIONS,
    Buffer,
    Copy,
    Instruction,
    Noise,
    Operand,
    Port,
    Run,
)
from pid_runtime.bundle.sizes import Shape
from pid_runtime.bundle.source import Constant, Function, PixelAxis, Rope1d, Rope2d, Table

FLOAT = "float32"
THETA = 10000.0
ROPE_EXTENT = 16.0
MODULATION = 6
"""Rows of one block's modulation: shift, scale, gate of the attention, then of the MLP."""

Stream = Literal["x", "y"]
"""The image's tokens or the text's."""

View = tuple[str | Operand, Shape]
"""What a port is bound to: a buffer's name or a part of one, and the shape the graph sees it in."""

Views = dict[str, View]
"""By the name of the port."""


@dataclass(frozen=True)
class GraphSpec:
    """A graph before it is exported: the stage, its options, and its ports."""

    stage: str
    options: dict[str, Any]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    # Whose weights it gets, which makes no difference to what is traced.
    block: int = field(default=0, compare=False)
    """Index of the patch or pixel block, for a stage that comes with every block."""
    stream: Stream = field(default="x", compare=False)
    """Whose tokens, for a stage that comes once for each."""


@dataclass(frozen=True)
class RoundedParts:
    """What a program rounds to 8 bits."""

    kept: frozenset[str] = frozenset()
    """Graphs whose products are not."""
    weights: bool = False
    """To integers, and nothing else."""
    attentions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of the attentions that are, by graph, the scales of `stages.RoundedAttention`."""
    told: float | None = None
    """Scale of what tokens tell their pixels, if that is."""


@dataclass(frozen=True)
class ProgramSpec:
    """Graphs, buffers and instructions of a decoder."""

    graphs: dict[str, GraphSpec]
    buffers: dict[str, Buffer]
    sections: dict[str, tuple[Instruction, ...]]


class _Builder:
    """Collects graphs and buffers while the program is written down."""

    def __init__(self, config: PidConfig, precision: str, rounded: RoundedParts | None) -> None:
        self.config = config
        self.compute = PRECISIONS[precision]
        self.rounded = rounded
        self.graphs: dict[str, GraphSpec] = {}
        self.buffers: dict[str, Buffer] = {}

    def buffer(self, name: str, dtype: str, *shape: int | str, kind: str = "temporary") -> str:
        self.buffers[name] = Buffer(dtype, shape, kind)
        return name

    def end_buffer(self, attention: str, end: str, name: str, *shape: int | str) -> None:
        """A buffer of what goes into an attention, or comes out."""
        scales = self.rounded.attentions.get(attention) if self.rounded else None
        self.scaled_buffer(None if scales is None else scales[end], name, *shape)

    def scaled_buffer(self, scale: float | None, name: str, *shape: int | str) -> None:
        """A buffer of 8-bit numbers with this scale; None for one that is not rounded."""
        if scale is None:
            self.buffer(name, self.compute, *shape)
        else:
            self.buffers[name] = Buffer(FP8, shape, "temporary", scale=scale)

    def rounding(
        self, graph: str, *, takes: str = "", gives: str = "", pixels: bool = False
    ) -> dict[str, list[str]]:
        """Options of a stage: takes and gives are the attentions before and after it."""
        if self.rounded is None:
            return {}
        found = {
            "weights": self.rounded.weights and graph not in self.rounded.kept,
            "products": not self.rounded.weights and graph not in self.rounded.kept,
            "attended": takes in self.rounded.attentions,
            "projected": gives in self.rounded.attentions,
            "told": pixels and self.rounded.told is not None,
        }
        chosen = [name for name, is_chosen in found.items() if is_chosen]
        return {"rounding": chosen} if chosen else {}

    def table(self, name: str, table: Table) -> None:
        self.buffers[name] = Buffer(FLOAT, table.shape, "table", table)

    def constant(self, name: str, *shape: int) -> None:
        self.buffers[name] = Buffer(FLOAT, shape, "constant", Constant(f"table.{name}"))

    def run(
        self,
        graph: str,
        stage: str,
        options: dict[str, Any],
        inputs: Views,
        outputs: Views,
        chunk: str | None = None,
        dims: dict[str, str] | None = None,
        block: int = 0,
        stream: Stream = "x",
    ) -> Run:
        """An instruction, and the graph it runs."""

        def operands(views: Views) -> dict[str, Operand]:
            return {n: Operand(o) if isinstance(o, str) else o for n, (o, _) in views.items()}

        ins, outs = operands(inputs), operands(outputs)

        def ports(views: Views, named: dict[str, Operand]) -> dict[str, Port]:
            return {n: Port(self.buffers[named[n].buffer].dtype, s) for n, (_, s) in views.items()}

        spec = GraphSpec(stage, options, ports(inputs, ins), ports(outputs, outs), block, stream)
        if self.graphs.setdefault(graph, spec) != spec:
            raise AssertionError(f"graph {graph} is run with different ports")
        return Run(graph, ins, outs, chunk, dims or {})


def build_program(
    config: PidConfig, precision: str, known_times: int | None, rounded: RoundedParts | None = None
) -> ProgramSpec:
    """Write down the program of a network.

    known_times: rows of the folded modulation table, or None to compute it from any timestep.
    rounded: what is rounded to 8 bits; None for nothing.
    """
    b = _Builder(config, precision, rounded)
    d, p, state = config.hidden_size, config.patch_size, 3 * config.patch_pixels
    _declare_inputs(b, known_times)
    b.buffer("state", FLOAT, "B", "L", state)
    b.buffer("latent_tokens", b.compute, "B", "L", config.latent_hidden)
    b.buffer("y.0", b.compute, "B", "T", d)

    prologue: list[Instruction] = [
        b.run(
            "latent",
            "latent",
            {},
            {"latent": ("latent", ("B", config.latent_channels, "h", "w"))},
            {"latent_tokens": ("latent_tokens", ("B", "Hs", "Ws", config.latent_hidden))},
        ),
        b.run(
            "caption",
            "caption",
            {},
            {"caption": ("caption", ("B", "T", config.text_dim))},
            {"y": ("y.0", ("B", "T", d))},
        ),
        Noise("state", "noise_image", "patchify"),
    ]
    timestep: list[Instruction] = []
    if known_times is None:
        rows = MODULATION * config.patch_depth
        timestep.append(
            b.run(
                "timestep",
                "timestep",
                {},
                {"timestep": (Operand("timestep", ("step", 0)), (1,))},
                {
                    "modulation": (Operand("modulation", ("row", 0, 0, 0)), (2, rows, d)),
                    "time_embedding": (Operand("time_embedding", ("row", 0)), (d,)),
                },
            )
        )
    sections = {
        "prologue": tuple(prologue),
        "timestep": tuple(timestep),
        "step": (*_patch_blocks(b), *_pixel_blocks(b)),
        "image": (_unpatchify(b, "unpatchify", "image", ("B", 3, "Hs", p, "Ws", p)),),
        "image_bytes": (
            _unpatchify(b, "unpatchify_bytes", "image_bytes", ("B", "Hs", p, "Ws", p, 3)),
        ),
    }
    b.run(
        "patchify",
        "patchify",
        {},
        {"image": ("noise_image", ("B", 3, "Hs", p, "Ws", p))},
        {"tokens": ("state", ("B", "Hs", "Ws", p, p, 3))},
    )
    return ProgramSpec(b.graphs, b.buffers, sections)


def _declare_inputs(b: _Builder, known_times: int | None) -> None:
    """Buffers the runtime fills, and those the image comes out of."""
    c = b.config
    p = c.patch_size
    b.buffer("latent", FLOAT, "B", c.latent_channels, "h", "w", kind="input")
    b.buffer("caption", FLOAT, "B", "T", c.text_dim, kind="input")
    b.buffer("sigma", FLOAT, "B", kind="input")
    b.buffer("update", FLOAT, "N", 3, kind="schedule")
    # Two, as neither holds anything between draws: one would take up memory all that while.
    for name in ("noise_image", "step_noise_image"):
        b.buffer(name, FLOAT, "B", 3, "H", "W")
    b.buffer("image", FLOAT, "B", 3, "H", "W", kind="output")
    b.buffer("image_bytes", "uint8", "B", "H", "W", 3, kind="output")
    rows = MODULATION * c.patch_depth
    if known_times is None:
        b.buffer("timestep", FLOAT, "N", 1, kind="schedule")
        b.buffer("modulation", FLOAT, "N", 2, rows, c.hidden_size)
        b.buffer("time_embedding", FLOAT, "N", c.hidden_size)
    else:
        b.constant("modulation", known_times, 2, rows, c.hidden_size)
        b.constant("time_embedding", known_times, c.hidden_size)
    functions: tuple[Function, ...] = ("cos", "sin")
    for prefix, head_dim in (("rope", c.head_dim), ("pixel_rope", c.pixel_head_dim)):
        for function in functions:
            table = Rope2d(function, head_dim, c.rope_reference / p, ROPE_EXTENT, THETA)
            b.table(f"{prefix}_{function}", table)
    for function in functions:
        b.table(f"text_rope_{function}", Rope1d(function, c.head_dim, THETA))
    b.table("pixel_columns", PixelAxis("column", c.pixel_hidden_size, p, THETA))
    b.table("pixel_rows", PixelAxis("row", c.pixel_hidden_size, p, THETA))


def _unpatchify(b: _Builder, stage: str, output: str, shape: Shape) -> Run:
    p = b.config.patch_size
    tokens = ("state", ("B", "Hs", "Ws", p, p, 3))
    return b.run(stage, stage, {}, {"tokens": tokens}, {"image": (output, shape)})


def _attend(
    b: _Builder, graph: str, heads: int, size: int, names: tuple[str, str, str, str], q: str, s: str
) -> Run:
    """Attention of the queries `names[0]` over the keys and values, whole sequences at once."""
    queries, keys, values, out = names
    options: dict[str, Any] = {"heads": heads}
    if b.rounded is not None and graph in b.rounded.attentions:
        options["fp8_scales"] = dict(b.rounded.attentions[graph])
    return b.run(
        graph,
        "attention",
        options,
        {
            "q": (queries, ("B", "Q", size)),
            "k": (keys, ("B", "S", size)),
            "v": (values, ("B", "S", size)),
        },
        {"attended": (out, ("B", "Q", size))},
        dims={"Q": q, "S": s},
    )


def _rows(stream: int, first: int, count: int, size: int) -> View:
    """Rows of the modulation table at the current timestep."""
    return Operand("modulation", ("row", stream, first, 0)), (count, size)


def _patch_blocks(b: _Builder) -> list[Instruction]:
    """For every patch block: the text's stage, the image's stage, and their joint attention."""
    c = b.config
    d, depth = c.hidden_size, c.patch_depth
    program: list[Instruction] = []
    for i in range(depth):
        first, last = i == 0, i == depth - 1
        # The text's queries and output are of no use after the last block: drop them there.
        q_rows, skip = ("L", Operand(f"q.{i}")) if last else ("S", Operand(f"q.{i}", (0, "T", 0)))
        for end, rows in (("q", q_rows), ("k", "S"), ("v", "S"), ("attended", q_rows)):
            b.end_buffer("attention", end, f"{end}.{i}", "B", rows, d)
        text_out: Views = {}
        if not first and not last:
            text_out["next_x"] = (b.buffer(f"y.{i}", b.compute, "B", "T", d), ("B", "T", d))
        for name in ("k", "v") if last else ("q", "k", "v"):
            text_out[name] = (f"{name}.{i}", ("B", "T", d))
        modulation = MODULATION * i - (0 if first else 4), 2 if first else MODULATION
        text_in: Views = {
            "x": (f"y.{max(i - 1, 0)}", ("B", "T", d)),
            "modulation": _rows(1, *modulation, d),
            "rope_cos": ("text_rope_cos", ("T", c.head_dim // 2)),
            "rope_sin": ("text_rope_sin", ("T", c.head_dim // 2)),
        }
        image_in: Views = {
            "x": ("state", ("B", "L", 3 * c.patch_pixels))
            if first
            else (f"x.{i - 1}", ("B", "L", d)),
            "modulation": _rows(0, *modulation, d),
            "rope_cos": ("rope_cos", ("L", c.head_dim // 2)),
            "rope_sin": ("rope_sin", ("L", c.head_dim // 2)),
        }
        if not first:
            text_in["attended"] = (f"attended.{i - 1}", ("B", "T", d))
            image_in["attended"] = (Operand(f"attended.{i - 1}", (0, "T", 0)), ("B", "L", d))
        inject = i % c.latent_interval == 0
        if inject:
            image_in |= _latent_inputs(c)
        image_out: Views = {
            "next_x": (b.buffer(f"x.{i}", b.compute, "B", "L", d), ("B", "L", d)),
            "q": (skip, ("B", "L", d)),
            "k": (Operand(f"k.{i}", (0, "T", 0)), ("B", "L", d)),
            "v": (Operand(f"v.{i}", (0, "T", 0)), ("B", "L", d)),
        }
        takes = "" if first else "attention"
        image_options = {
            "first": first,
            "embed": first,
            "inject": inject,
            **b.rounding(f"image.{i}", takes=takes, gives="attention"),
        }
        text_options = {
            "first": first,
            "last": last,
            **b.rounding(f"text.{i}", takes=takes, gives="attention"),
        }
        program += [
            b.run(
                f"text.{i}",
                "tokens",
                text_options,
                text_in,
                text_out,
                block=i,
                stream="y",
            ),
            b.run(f"image.{i}", "tokens", image_options, image_in, image_out, chunk="L", block=i),
            _attend(
                b,
                "attention",
                c.num_heads,
                d,
                (f"q.{i}", f"k.{i}", f"v.{i}", f"attended.{i}"),
                q_rows,
                "S",
            ),
        ]
    return program


def _latent_inputs(c: PidConfig) -> Views:
    return {
        "latent_tokens": ("latent_tokens", ("B", "L", c.latent_hidden)),
        "sigma": ("sigma", ("B",)),
    }


def _pixel_blocks(b: _Builder) -> list[Instruction]:
    """The pixel blocks and the sampler's update."""
    c = b.config
    d, a, depth = c.hidden_size, c.pixel_attn_size, c.pixel_depth
    flat, state = c.patch_pixels * c.pixel_hidden_size, 3 * c.patch_pixels
    positions: Views = {
        f"pixel_{axis}": (f"pixel_{axis}", ("L", c.patch_size, c.pixel_hidden_size // 2))
        for axis in ("columns", "rows")
    }
    rope: Views = {
        f"rope_{part}": (f"pixel_rope_{part}", ("L", c.pixel_head_dim // 2))
        for part in ("cos", "sin")
    }
    noisy: View = ("state", ("B", "L", state))
    b.scaled_buffer(b.rounded.told if b.rounded else None, "s", "B", "L", d)
    condition: View = ("s", ("B", "L", d))
    inner = "pixel_attention"
    previous = c.patch_depth - 1

    def projections(i: int) -> Views:
        for end in ("q", "k", "v", "attended"):
            b.end_buffer("pixel_attention", end, f"pixel_{end}.{i}", "B", "L", a)
        return {name: (f"pixel_{name}.{i}", ("B", "L", a)) for name in ("q", "k", "v")}

    def attend(i: int) -> Run:
        names = (f"pixel_q.{i}", f"pixel_k.{i}", f"pixel_v.{i}", f"pixel_attended.{i}")
        return _attend(b, "pixel_attention", c.pixel_num_heads, a, names, "L", "L")

    program: list[Instruction] = [
        b.run(
            "pixel.0",
            "pixel_first",
            {
                "inject": c.pixel_gate,
                **b.rounding("pixel.0", takes="attention", gives="pixel_attention", pixels=True),
            },
            {
                "x": (f"x.{previous}", ("B", "L", d)),
                "attended": (f"attended.{previous}", ("B", "L", d)),
                "modulation": _rows(0, MODULATION * previous + 2, 4, d),
                "time_embedding": (Operand("time_embedding", ("row", 0)), (d,)),
                "state": noisy,
                **positions,
                **rope,
                **(_latent_inputs(c) if c.pixel_gate else {}),
            },
            {"s": condition, **projections(0)},
            chunk="L",
        ),
        attend(0),
    ]
    for i in range(1, depth + 1):
        common: Views = {
            "s": condition,
            "attended": (f"pixel_attended.{i - 1}", ("B", "L", a)),
        }
        # The first block's pixels are embedded from the state again rather than kept.
        pixels = (
            {"state": noisy, **positions}
            if i == 1
            else {"pixels": (f"pixels.{i - 1}", ("B", "L", flat))}
        )
        if i < depth:
            kept = b.buffer(f"pixels.{i}", b.compute, "B", "L", flat)
            written = "pixels" if i == 1 else "next_pixels"  # there are some to be read by then
            program += [
                b.run(
                    f"pixel.{i}",
                    "pixels",
                    {
                        "embed": i == 1,
                        **b.rounding(f"pixel.{i}", takes=inner, gives=inner, pixels=True),
                    },
                    {**common, **rope, **pixels},
                    {written: (kept, ("B", "L", flat)), **projections(i)},
                    chunk="L",
                    block=i,
                ),
                attend(i),
            ]
            continue
        b.buffer("noise", FLOAT, "B", "L", state)
        b.buffer("next_state", FLOAT, "B", "L", state)
        program += [
            Noise("noise", "step_noise_image", "patchify"),
            b.run(
                "update",
                "update",
                {"embed": i == 1, **b.rounding("update", takes=inner, pixels=True)},
                {
                    **common,
                    **pixels,
                    "state": noisy,
                    "noise": ("noise", ("B", "L", state)),
                    "update": (Operand("update", ("step", 0)), (3,)),
                },
                {"next_state": ("next_state", ("B", "L", state))},
                chunk="L",
            ),
            Copy("next_state", "state"),
        ]
    return program
