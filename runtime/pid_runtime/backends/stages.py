"""The stages of a bundle as PyTorch modules: what the graphs compute, in readable form.

The exporter traces these modules into ONNX and the torch backend runs them as they are. Between
two attentions every token is on its own, so the network is cut there: per-token stages, which the
interpreter may run on any slice of L, alternate with attention stages, which see the whole
sequence. Activations and matrix weights have the bundle's compute dtype; norms, modulation,
rotary tables, the latent's residuals, pixels within a stage, the velocity and the sampler are
float32.

Shapes: B batch, L patch tokens of this call, T text tokens, D hidden size, H heads, r latent
hidden size, P patch size, d pixel hidden size, A pixel attention size. Rotary pairs are the two
halves of a head (the exporter reorders the channels), so that a rotation needs no strided access.

A stage may round to 8 bits, as its option `rounding` names (`Rounding`); see
`pid_runtime.backends.rounding`. Where it may round stand modules that otherwise do nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_runtime.backends.operations import operation
from pid_runtime.backends.rounding import (
    FP8,
    INT8,
    Quantized,
    Rounded,
    RoundedLinear,
    is_rounded,
    quantize,
    rounded,
)
from pid_runtime.bundle.manifest import PRECISIONS
from pid_runtime.errors import PidRuntimeError

EPSILON = 1e-6


@dataclass(frozen=True)
class Dimensions:
    """Sizes a stage is built from; `network` of the manifest."""

    hidden_size: int
    num_heads: int
    mlp_hidden: int
    text_dim: int
    text_max_length: int
    patch_size: int
    patch_depth: int
    pixel_hidden_size: int
    pixel_attn_size: int
    pixel_num_heads: int
    pixel_depth: int
    latent_channels: int
    latent_unpatchify: int
    latent_ratio: int
    latent_hidden: int
    latent_res_blocks: int
    latent_padding: Literal["zeros", "replicate"]
    latent_gate: Literal["channel", "token"]


class Linear(nn.Module):
    """x @ weight + bias, with `weight` `[inputs, outputs]` as a matrix product wants it."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        rows = torch.addmm(self.bias, x.flatten(0, -2), self.weight)  # one Gemm in ONNX
        return rows.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Rounding:
    """What a stage rounds to 8 bits."""

    weights: bool = False
    """Large matrices, to integers: nothing else then."""
    products: bool = False
    """Both operands of large matrix products."""
    attended: bool = False
    """What comes from attention, which then comes as 8-bit numbers."""
    projected: bool = False
    """Queries, keys and values, which then leave as 8-bit numbers."""
    told: bool = False
    """What tokens tell their pixels, which then is in 8-bit numbers between stages."""

    @classmethod
    def of(cls, names: Sequence[str]) -> "Rounding":
        """From a stage's option."""
        return cls(**dict.fromkeys(names, True))

    def linear(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Module:
        """A product, rounded or not."""
        if (self.weights or self.products) and is_rounded(inputs, outputs):
            stored = INT8 if self.weights else FP8
            return RoundedLinear(inputs, outputs, dtype, stored, bias)
        return Linear(inputs, outputs, dtype, bias)

    def operand(self, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
        """What goes into products of so many inputs, and outputs at most."""
        rounded = self.products and is_rounded(inputs, outputs)
        return Rounded(dtype) if rounded else nn.Identity()

    def from_attention(self, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
        """What was attended, on its way into a product."""
        return Rounded(dtype) if self.attended else self.operand(inputs, outputs, dtype)

    def condition(self, n: Dimensions, dtype: torch.dtype) -> nn.Module:
        """What tokens tell their pixels, on its way into products."""
        flat = n.patch_size**2 * n.pixel_hidden_size
        return Rounded(dtype) if self.told else self.operand(n.hidden_size, flat, dtype)

    def for_pixels(self, dtype: torch.dtype) -> nn.Module:
        """The same, on its way to other stages."""
        return Quantized(dtype) if self.told else nn.Identity()

    def for_attention(self, dtype: torch.dtype) -> nn.Module:
        """Queries, keys or values."""
        return Quantized(dtype) if self.projected else nn.Identity()


NO_ROUNDING = Rounding()


def normalize(x: Tensor) -> Tensor:
    """RMS-normalise the last axis, in float32; gains are folded into what follows."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON)


class HeadNormRope(nn.Module):
    """Normalise every head, then turn it by position; for queries and keys at once, or keys alone.

    The gains hold the softmax scale for the queries.
    """

    def __init__(self, parts: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.parts, self.heads = parts, heads
        self.weight = nn.Parameter(torch.empty(parts, 1, head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """`[B, L, parts * H * head_dim]`, tables `[L, head_dim / 2]`; parts `[B, L, H * ..]`."""
        z = x.unflatten(-1, (self.parts, self.heads, -1))  # (B, L, parts, H, head_dim)
        first, second = (normalize(z) * self.weight).chunk(2, dim=-1)
        cos, sin = cos[:, None, None], sin[:, None, None]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return [part.flatten(2) for part in turned.to(x.dtype).unbind(2)]


class LatentGate(nn.Module):
    """Add a latent feature to the tokens: x + sigmoid(content - alpha * sigma) * feature."""

    def __init__(self, n: Dimensions, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.feature = Linear(n.latent_hidden, n.hidden_size, dtype)
        self.content = Linear(n.hidden_size, outputs, dtype, bias=False)
        self.content_latent = Linear(n.latent_hidden, outputs, dtype)
        self.alpha = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
        """`x` `[B, L, D]`, `latent` `[B, L, r]`, `sigma` `[B]` float32; `[B, L, D]`."""
        content = self.content(x) + self.content_latent(latent)
        gate = torch.sigmoid(content.float() - (self.alpha * sigma)[:, None, None])
        return (x.float() + gate * self.feature(latent).float()).to(x.dtype)


# Once per decode


class Patchify(nn.Module):
    """An image `[B, 3, Hs, P, Ws, P]` (that is `[B, 3, H, W]`) to tokens `[B, Hs, Ws, P, P, 3]`."""

    def forward(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 4, 3, 5, 1).contiguous()


class Unpatchify(nn.Module):
    """Tokens `[B, Hs, Ws, P, P, 3]` to an image `[B, 3, Hs, P, Ws, P]`, clamped to [-1, 1]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.permute(0, 5, 1, 3, 2, 4).clamp(-1, 1).contiguous()


class UnpatchifyBytes(nn.Module):
    """Tokens `[B, Hs, Ws, P, P, 3]` to uint8 `[B, Hs, P, Ws, P, 3]`, that is `[B, H, W, 3]`."""

    def forward(self, tokens: Tensor) -> Tensor:
        pixels = tokens.permute(0, 1, 3, 2, 4, 5).clamp(-1, 1)
        return torch.round((pixels + 1) * 127.5).to(torch.uint8).contiguous()


class Caption(nn.Module):
    """Caption embedding `[B, T, text_dim]` float32 to text tokens `[B, T, D]`."""

    def __init__(self, n: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.proj = Linear(n.text_dim, n.hidden_size, dtype)
        self.norm = nn.Parameter(torch.empty(n.hidden_size))
        self.position = nn.Parameter(torch.empty(n.text_max_length, n.hidden_size))

    def forward(self, caption: Tensor) -> Tensor:
        y = normalize(self.proj(caption.to(self.dtype))) * self.norm
        return (y + self.position[: caption.shape[1]]).to(self.dtype)


class Conv(nn.Module):
    """3x3 convolution that keeps height and width."""

    def __init__(self, inputs: int, outputs: int, padding: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == "replicate":
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=1)


GROUPS, GROUP_EPSILON = 4, 1e-5
"""Of group normalisation."""


@operation(
    "group_norm(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    lambda x, weight, bias: torch.empty_like(x),
)
def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Group normalisation `[B, C, h, w]` in float32; weight, bias: `[C]` float32.

    An operation, since the exporter writes it in a way that spares memory.
    """
    return F.group_norm(x.float(), GROUPS, weight, bias, GROUP_EPSILON).to(x.dtype)


class GroupNorm(nn.Module):
    """`group_norm` with weights of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias)


class LatentResBlock(nn.Module):
    """Pre-activation residual block of `[B, r, h, w]` float32."""

    def __init__(self, n: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        r, self.dtype = n.latent_hidden, dtype
        self.norm1, self.conv1 = GroupNorm(r), Conv(r, r, n.latent_padding, dtype)
        self.norm2, self.conv2 = GroupNorm(r), Conv(r, r, n.latent_padding, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x).to(self.dtype)))
        return x + self.conv2(F.silu(self.norm2(h))).float()


class Latent(nn.Module):
    """Latent `[B, C, h, w]` float32 to latent tokens `[B, Hs, Ws, r]`."""

    def __init__(self, n: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.unpatchify, self.ratio = dtype, n.latent_unpatchify, n.latent_ratio
        r = n.latent_hidden
        channels = n.latent_channels // n.latent_unpatchify**2
        self.conv_in = Conv(channels, r, n.latent_padding, dtype)
        self.conv_mid = Conv(r, r, n.latent_padding, dtype)
        self.blocks = nn.ModuleList(LatentResBlock(n, dtype) for _ in range(n.latent_res_blocks))

    def forward(self, latent: Tensor) -> Tensor:
        x = latent.to(self.dtype)
        if self.unpatchify > 1:
            x = F.pixel_shuffle(x, self.unpatchify)
        if self.ratio > 1:  # nearest neighbour
            b, c, h, w = x.shape
            x = x[:, :, :, None, :, None].expand(-1, -1, -1, self.ratio, -1, self.ratio)
            x = x.reshape(b, c, h * self.ratio, w * self.ratio)
        x = self.conv_mid(F.silu(self.conv_in(x))).float()
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 2, 3, 1).to(self.dtype).contiguous()


class Timestep(nn.Module):
    """One timestep `[1]` (1000 t) to the modulation table, for networks not tied to known times.

    Outputs the modulation rows `[2, 6 * depth, D]` (streams image and text; shift, scale, gate of
    attention, then of the MLP, block after block; scales include 1 and the norm's gain) and the
    timestep embedding `[D]`, float32.
    """

    FEATURES = 256
    MAX_PERIOD = 10.0

    def __init__(self, n: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        size, self.depth, self.dtype = n.hidden_size, n.patch_depth, dtype
        self.mlp_in, self.mlp_out = (
            Linear(256, size, torch.float32),
            Linear(size, size, torch.float32),
        )
        # Rounded once: in float32 an exp, or what it is of, turns angles of 1000 by 6e-5 and more.
        half = self.FEATURES // 2
        k = torch.arange(half, dtype=torch.float32, device="cpu")
        self.frequencies = (-math.log(self.MAX_PERIOD) * k / half).double().exp().float()
        self.rows = nn.ModuleList(Linear(size, 6 * size, dtype) for _ in range(2 * n.patch_depth))
        self.gain = nn.Parameter(torch.empty(2, 6 * n.patch_depth, size))
        self.offset = nn.Parameter(torch.empty(2, 6 * n.patch_depth, size))

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angles = timestep * self.frequencies.to(timestep.device)
        features = torch.cat([angles.cos(), angles.sin()])
        embedding = self.mlp_out(F.silu(self.mlp_in(features[None])))
        condition = F.silu(embedding)
        rows = torch.cat([row(condition.to(self.dtype)).float() for row in self.rows])
        rows = rows.reshape(2, 6 * self.depth, -1)
        return (rows + self.offset) * self.gain, embedding[0]


# The step: attention


ATTENTION_ENDS = ("q", "k", "v", "attended")
"""What goes into an attention, and comes out."""


class Attention(nn.Module):
    """softmax(q k^T) v per head; queries come scaled.

    `q` `[B, Q, H * head_dim]`, `k` and `v` `[B, S, H * head_dim]`; `[B, Q, H * head_dim]`.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ends = nn.ModuleDict({name: nn.Identity() for name in ATTENTION_ENDS})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.ends["q"](q), self.ends["k"](k), self.ends["v"](v)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.ends["attended"](out.transpose(1, 2).flatten(2))


class RoundedAttention(nn.Module):
    """Attention of 8-bit numbers, to such: as `Attention`, but for what is rounded.

    Tensors come and leave as `rounding.FP8`, or as floats, which are then rounded here. The weights
    are rounded as well, before they are divided by their sum, when the largest of each query is 1:
    that is how fused kernels can, which do not know the sum yet.
    """

    QUERIES: int = 1024
    """That are attended at a time, where nothing is traced: all weights are in memory."""

    def __init__(self, heads: int, dtype: torch.dtype, scales: Mapping[str, float]) -> None:
        """scales: of `ATTENTION_ENDS`, and of "weights"."""
        super().__init__()
        self.heads = heads
        self.scales = {
            name: torch.tensor(scale, dtype=dtype, device="cpu") for name, scale in scales.items()
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scales = {name: scale.to(q.device) for name, scale in self.scales.items()}
        given = {"q": q, "k": k, "v": v}
        q8, k8, v8 = (
            rounded(x, scales[name]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in given.items()
        )
        queries = [q8] if torch.compiler.is_exporting() else q8.split(self.QUERIES, dim=2)
        parts: list[Tensor] = []
        for part in queries:
            scores = (part @ k8.transpose(2, 3)).float()
            weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            mean = (rounded(weights.to(part.dtype), scales["weights"]) @ v8).float()
            mean = mean / weights.sum(dim=-1, keepdim=True)
            parts.append(mean.to(part.dtype).transpose(1, 2).flatten(2))
        attended = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if q.dtype == FP8:
            return quantize(attended, scales["attended"])
        return rounded(attended, scales["attended"])


# The step: tokens between attentions


class EnterAttention(nn.Module):
    """Project tokens `[B, L, size]` to q, k, v `[B, L, heads]`, or to k, v alone."""

    def __init__(
        self,
        inputs: int,
        size: int,
        heads: int,
        dtype: torch.dtype,
        rounding: Rounding,
        queries: bool = True,
    ) -> None:
        super().__init__()
        names = ("q", "k") if queries else ("k",)
        self.tokens = rounding.operand(inputs, len(names) * size, dtype)
        self.qk = rounding.linear(inputs, len(names) * size, dtype, bias=False)
        self.v = rounding.linear(inputs, size, dtype, bias=False)
        self.rope = HeadNormRope(len(names), heads, size // heads)
        self.leave = nn.ModuleDict({name: rounding.for_attention(dtype) for name in (*names, "v")})

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        z = self.tokens(z)
        projected = [*self.rope(self.qk(z), cos, sin), self.v(z)]
        return [leave(x) for leave, x in zip(self.leave.values(), projected, strict=True)]


class LeaveBlock(nn.Module):
    """The second half of an MMDiT block for one stream: take in the attention, then the MLP."""

    def __init__(self, n: Dimensions, dtype: torch.dtype, rounding: Rounding) -> None:
        super().__init__()
        size, hidden = n.hidden_size, n.mlp_hidden
        self.attended = rounding.from_attention(size, size, dtype)
        self.proj = rounding.linear(size, size, dtype)
        self.tokens = rounding.operand(size, hidden, dtype)
        self.w1 = rounding.linear(size, hidden, dtype, bias=False)
        self.w3 = rounding.linear(size, hidden, dtype, bias=False)
        self.hidden = rounding.operand(hidden, size, dtype)
        self.w2 = rounding.linear(hidden, size, dtype, bias=False)

    def forward(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """`x`, `attended` `[B, L, D]`; `modulation` `[4, D]` gate, shift, scale, gate."""
        wide = x.float() + modulation[0] * self.proj(self.attended(attended)).float()
        z = self.tokens((normalize(wide) * modulation[2] + modulation[1]).to(x.dtype))
        out = self.w2(self.hidden(F.silu(self.w1(z)) * self.w3(z)))
        return (wide + modulation[3] * out.float()).to(x.dtype)


class Tokens(nn.Module):
    """Tokens of one stream from the attention of one block to that of the next.

    Takes in the previous block's attention (unless `first`), injects the latent (if `inject`) and
    enters the next block, for its keys and values alone if `last`. `modulation` `[6, D]`
    is the previous block's gate, shift, scale, gate, then the next one's shift and scale; the
    first stage has only the last two. Outputs x (unless it came in unchanged or is not needed
    again), q (unless `last`), k, v.
    """

    def __init__(
        self,
        n: Dimensions,
        dtype: torch.dtype,
        *,
        first: bool,
        embed: bool = False,
        inject: bool = False,
        last: bool = False,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:
        super().__init__()
        size = n.hidden_size
        self.dtype = dtype
        self.returns_x = embed or not (first or last)
        self.embed = Linear(3 * n.patch_size**2, size, dtype) if embed else None
        self.leave = None if first else LeaveBlock(n, dtype, rounding)
        gate_outputs = size if n.latent_gate == "channel" else 1
        self.gate = LatentGate(n, gate_outputs, dtype) if inject else None
        self.enter = EnterAttention(size, size, n.num_heads, dtype, rounding, queries=not last)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        attended: Tensor | None = None,
        latent_tokens: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        attention = _inputs_of(self.leave, attended=attended)
        latent = _inputs_of(self.gate, latent_tokens=latent_tokens, sigma=sigma)
        if self.embed is not None:
            x = self.embed(x.to(self.dtype))  # noisy pixels (B, L, P * P * 3) to (B, L, D)
        if self.leave is not None:
            x = self.leave(x, *attention, modulation[:4])
        if self.gate is not None:
            x = self.gate(x, *latent)
        z = (normalize(x) * modulation[-1] + modulation[-2]).to(x.dtype)
        projected = self.enter(z, rope_cos, rope_sin)
        return (x, *projected) if self.returns_x else tuple(projected)


class PixelEmbed(nn.Module):
    """Noisy pixels `[B, L, P * P * 3]` to `[B, L, P * P, d]`, float32, with their positions."""

    def __init__(self, n: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.patch_size = dtype, n.patch_size
        self.proj = Linear(3, n.pixel_hidden_size, dtype)

    def forward(self, state: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        """Tables `[L, P, d / 2]`: what each pixel column, and row, of a patch adds."""
        p = self.patch_size
        columns = columns[:, None].expand(-1, p, -1, -1)
        rows = rows[:, :, None].expand(-1, -1, p, -1)
        position = torch.cat([columns, rows], dim=-1).flatten(1, 2)  # (L, P * P, d)
        pixels = self.proj(state.unflatten(-1, (p * p, 3)).to(self.dtype))
        return pixels.float() + position


class EnterPixelBlock(nn.Module):
    """The first half of a PiT block: modulate the pixels and compress each patch to q, k, v.

    compress(z scale + shift) = compress(z scale) + compress(shift): the shift is made compressed,
    which is a quarter of the work.
    """

    def __init__(self, n: Dimensions, dtype: torch.dtype, rounding: Rounding) -> None:
        super().__init__()
        flat, size = n.patch_size**2 * n.pixel_hidden_size, n.pixel_attn_size
        self.scale = rounding.linear(n.hidden_size, flat, dtype)
        self.pixels = rounding.operand(flat, size, dtype)
        self.compress = rounding.linear(flat, size, dtype, bias=False)
        self.shift = rounding.linear(n.hidden_size, size, dtype)
        self.enter = EnterAttention(size, size, n.pixel_num_heads, dtype, rounding)

    def forward(self, pixels: Tensor, s: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """`pixels` `[B, L, P * P, d]`, `s` `[B, L, D]`; q, k, v `[B, L, A]`."""
        z = self.pixels((normalize(pixels).flatten(2) * self.scale(s).float()).to(s.dtype))
        return self.enter(self.compress(z) + self.shift(s), cos, sin)


class LeavePixelBlock(nn.Module):
    """The second half of a PiT block: take in the attention, then the MLP on every pixel."""

    def __init__(self, n: Dimensions, dtype: torch.dtype, rounding: Rounding) -> None:
        super().__init__()
        d = n.pixel_hidden_size
        flat = n.patch_size**2 * d
        self.attended = rounding.from_attention(n.pixel_attn_size, flat, dtype)
        self.expand = rounding.linear(n.pixel_attn_size, flat, dtype)
        self.gate_attention = rounding.linear(n.hidden_size, flat, dtype)
        self.shift = rounding.linear(n.hidden_size, flat, dtype)
        self.scale = rounding.linear(n.hidden_size, flat, dtype)
        self.gate_mlp = rounding.linear(n.hidden_size, flat, dtype)
        self.fc1, self.fc2 = Linear(d, 4 * d, dtype), Linear(4 * d, d, dtype)

    def forward(self, pixels: Tensor, s: Tensor, attended: Tensor) -> Tensor:
        """`pixels` `[B, L, P * P, d]`, `s` `[B, L, D]`, `attended` `[B, L, A]`; float32."""
        shape = pixels.shape[2:]
        attention = self.gate_attention(s).float() * self.expand(self.attended(attended)).float()
        wide = pixels.float() + attention.unflatten(-1, shape)
        scale, shift = (m(s).float().unflatten(-1, shape) for m in (self.scale, self.shift))
        z = (normalize(wide) * scale + shift).to(s.dtype)
        out = self.fc2(F.gelu(self.fc1(z))).float()
        return wide + self.gate_mlp(s).float().unflatten(-1, shape) * out


class PixelFirst(nn.Module):
    """From the last patch block's attention to the first pixel block's: s, q, k, v.

    `modulation` `[4, D]`: the last patch block's gate, shift, scale, gate; `time_embedding` `[D]`.
    """

    def __init__(
        self,
        n: Dimensions,
        dtype: torch.dtype,
        *,
        inject: bool,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:
        super().__init__()
        self.leave = LeaveBlock(n, dtype, rounding)
        self.gate = LatentGate(n, 1, dtype) if inject else None
        self.embed = PixelEmbed(n, dtype)
        self.s = rounding.condition(n, dtype)
        self.results = nn.ModuleDict({"s": rounding.for_pixels(dtype)})
        self.enter = EnterPixelBlock(n, dtype, rounding)

    def forward(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Tensor,
        time_embedding: Tensor,
        state: Tensor,
        pixel_columns: Tensor,
        pixel_rows: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        latent_tokens: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        latent = _inputs_of(self.gate, latent_tokens=latent_tokens, sigma=sigma)
        tokens = self.leave(x, attended, modulation)
        s = F.silu(tokens.float() + time_embedding).to(x.dtype)
        if self.gate is not None:
            s = self.gate(s, *latent)
        pixels = self.embed(state, pixel_columns, pixel_rows)
        s = self.results["s"](s)
        return (s, *self.enter(pixels, self.s(s), rope_cos, rope_sin))


class _AfterPixelAttention(nn.Module):
    """What the stages after a pixel block's attention begin with."""

    def __init__(
        self,
        n: Dimensions,
        dtype: torch.dtype,
        *,
        embed: bool,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:
        super().__init__()
        self.embed = PixelEmbed(n, dtype) if embed else None
        self.s = rounding.condition(n, dtype)
        self.leave = LeavePixelBlock(n, dtype, rounding)
        self.d = n.pixel_hidden_size


class Pixels(_AfterPixelAttention):
    """From one pixel block's attention to the next one's: pixels, q, k, v.

    The embedded pixels are cheaper to make again than to keep: the stage after the first
    attention (`embed`) takes `state` and the position tables in place of `pixels`.
    """

    def __init__(
        self,
        n: Dimensions,
        dtype: torch.dtype,
        *,
        embed: bool,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:
        super().__init__(n, dtype, embed=embed, rounding=rounding)
        self.enter = EnterPixelBlock(n, dtype, rounding)

    def forward(
        self,
        s: Tensor,
        attended: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        pixels: Tensor | None = None,
        state: Tensor | None = None,
        pixel_columns: Tensor | None = None,
        pixel_rows: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        tables = {"pixel_columns": pixel_columns, "pixel_rows": pixel_rows}
        entering = _pixels(self.embed, self.d, pixels, state=state, **tables)
        s = self.s(s)
        leaving = self.leave(entering, s, attended)
        kept = leaving.flatten(2).to(s.dtype)
        return (kept, *self.enter(leaving, s, rope_cos, rope_sin))


class Update(_AfterPixelAttention):
    """From the last pixel block's attention to the next state of the sampler.

    state' = update[0] state + update[1] velocity + update[2] noise, all float32.
    """

    def __init__(
        self,
        n: Dimensions,
        dtype: torch.dtype,
        *,
        embed: bool,
        rounding: Rounding = NO_ROUNDING,
    ) -> None:
        super().__init__(n, dtype, embed=embed, rounding=rounding)
        self.velocity = Linear(n.pixel_hidden_size, 3, torch.float32)

    def forward(
        self,
        s: Tensor,
        attended: Tensor,
        state: Tensor,
        noise: Tensor,
        update: Tensor,
        pixels: Tensor | None = None,
        pixel_columns: Tensor | None = None,
        pixel_rows: Tensor | None = None,
    ) -> Tensor:
        tables = {"pixel_columns": pixel_columns, "pixel_rows": pixel_rows}
        embedded = state if self.embed is not None else None
        entering = _pixels(self.embed, self.d, pixels, state=embedded, **tables)
        s = self.s(s)
        leaving = self.leave(entering, s, attended)
        velocity = self.velocity(normalize(leaving)).flatten(2)
        return update[0] * state + update[1] * velocity + update[2] * noise


def _pixels(
    embed: PixelEmbed | None, size: int, pixels: Tensor | None, **of_embed: Tensor | None
) -> Tensor:
    """Pixels `[B, L, P * P, d]`, embedded from the state or as an earlier stage left them."""
    inputs = _inputs_of(embed, **of_embed)
    if embed is not None and pixels is None:
        return embed(*inputs)
    if embed is None and pixels is not None:
        return pixels.unflatten(-1, (-1, size))
    raise PidRuntimeError(
        "expected a pixel stage to get either pixels, or state, pixel_columns and pixel_rows, but "
        "the program does not give it one of these; export the bundle again"
    )


def _inputs_of(part: nn.Module | None, **inputs: Tensor | None) -> list[Tensor]:
    """The inputs that a stage takes because it has a part; none where it lacks that part.

    Raises `PidRuntimeError` for others: the stage would leave out an attention, or a gate.
    """
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    wanted = list(inputs) if part is not None else []
    if list(given) != wanted:
        raise PidRuntimeError(
            f"expected a stage to get {' and '.join(wanted) or 'no ' + ' or '.join(inputs)}, but "
            f"the program gives it {' and '.join(given) or 'none'}; export the bundle again"
        )
    return list(given.values())


STAGES: dict[str, type[nn.Module]] = {
    "patchify": Patchify,
    "unpatchify": Unpatchify,
    "unpatchify_bytes": UnpatchifyBytes,
    "latent": Latent,
    "caption": Caption,
    "timestep": Timestep,
    "attention": Attention,
    "tokens": Tokens,
    "pixel_first": PixelFirst,
    "pixels": Pixels,
    "update": Update,
}
"""Every stage by the name the manifest gives it."""

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "float8_e4m3fn": FP8,
}


def build_stage(
    kind: str, options: dict[str, Any], network: Dimensions, precision: str
) -> nn.Module:
    """The module of one graph, with uninitialised weights; `precision` is one of `PRECISIONS`."""
    stage, dtype = STAGES[kind], DTYPES[PRECISIONS[precision]]
    if "fp8_scales" in options:
        return RoundedAttention(options["heads"], dtype, options["fp8_scales"])
    if stage in (Patchify, Unpatchify, UnpatchifyBytes, Attention):
        return stage(**options)
    if "rounding" in options:
        options = {**options, "rounding": Rounding.of(options["rounding"])}
    return stage(network, dtype, **options)
