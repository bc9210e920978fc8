"""The PiD network in plain PyTorch, with the parameter names of the released checkpoints.

This is what every other form of the decoder is compared with, so it is written to be read:
one module per block of the paper, nothing folded, nothing hoisted. Shapes use the symbols of
`PidConfig`. Source of the formulas: PiD (arXiv 2605.23902) and the layout of its weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_ref.config import Padding, PidConfig
from pid_ref.errors import PidInputError

ROPE_EXTENT = 16.0
"""2-D rotary positions run from 0 to this, whatever the size of the grid."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) in float32 over the last axis, cast back, times `weight`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
        return normed.to(x.dtype) * self.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive normalisation's affine part."""
    return x * (1 + scale) + shift


# Positions


def rope_angles_2d(height: int, width: int, head_dim: int, reference: int) -> Tensor:
    """Angles of the 2-D rotary embedding, float32 `[height * width, head_dim / 2]`.

    `height`, `width` and `reference` count tokens. Pair 2j turns by x and pair 2j + 1 by y, both
    at frequency theta'^(-4j / head_dim), with theta' scaled per axis by the NTK-aware rule
    theta * (n / reference)^(a / (a - 2)), a = head_dim / 2.
    """
    axis_dim = head_dim // 2

    def axis(count: int) -> Tensor:
        theta = 10000.0 * (count / reference) ** (axis_dim / (axis_dim - 2))
        powers = torch.arange(0, head_dim, 4)[: head_dim // 4].float() / head_dim
        frequencies = 1.0 / theta**powers
        return torch.outer(torch.linspace(0, ROPE_EXTENT, count), frequencies)

    x = axis(width)[None, :, :].expand(height, -1, -1)
    y = axis(height)[:, None, :].expand(-1, width, -1)
    return torch.stack([x, y], dim=-1).reshape(height * width, head_dim // 2)


def rope_angles_1d(length: int, head_dim: int) -> Tensor:
    """Angles of the text's rotary embedding, float32 `[length, head_dim / 2]`, theta 10000."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return torch.outer(torch.arange(length).float(), frequencies)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (2j, 2j + 1) of `x` `[B, S, heads, head_dim]` by `angles` `[S, head_dim / 2]`."""
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def pixel_positions(height: int, width: int, size: int) -> Tensor:
    """Sine-cosine position of every pixel, float64 `[height, width, size]`.

    The first half comes from the column, the second from the row; each half is sin then cos of
    position * 10000^(-k / (size / 4)).
    """
    quarter = size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float64), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = axis(width)[None, :, :].expand(height, -1, -1)
    rows = axis(height)[:, None, :].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1)


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """`[B, c, H, W]` to `[B, L, P*P, c]`: tokens row-major, pixels row-major in their patch."""
    batch, channels, height, width = image.shape
    p = patch_size
    grid = image.reshape(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p, channels)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of `patchify`: `[B, L, P*P, c]` to `[B, c, H, W]`."""
    batch, _, _, channels = tokens.shape
    p = patch_size
    grid = tokens.reshape(batch, height // p, width // p, p, p, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


# Embedders


class Projection(nn.Module):
    """A linear layer under the name `proj`, as the checkpoints call their embedders."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TextEmbedder(Projection):
    """Caption embedding `[B, T, text_dim]` to `[B, T, D]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.norm = RMSNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class TimestepEmbedder(nn.Module):
    """Timestep `[B]`, already multiplied by 1000, to `[B, D]`."""

    FEATURES = 256
    MAX_PERIOD = 10.0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.FEATURES // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        # A float32 exp differs in its last bit from processor to processor, an image then by 2e-4.
        frequencies = (-math.log(self.MAX_PERIOD) * k / half).double().exp().float()
        angles = t.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


# Latent branch


class LatentResBlock(nn.Module):
    """Pre-activation residual block of the latent branch."""

    def __init__(self, size: int, padding: Padding) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(size, size, 3, padding=1, padding_mode=padding)

        self.block = nn.Sequential(
            nn.GroupNorm(4, size), nn.SiLU(), conv(), nn.GroupNorm(4, size), nn.SiLU(), conv()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class LatentGate(nn.Module):
    """Add a latent feature to the tokens as far as its content and noise level allow.

    x + sigmoid(content_proj([x, feature]) - exp(log_alpha) * sigma) * feature
    """

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(5.0)))
        self.content_proj = nn.Linear(2 * size, outputs)

    def forward(self, x: Tensor, feature: Tensor, sigma: Tensor) -> Tensor:
        content = self.content_proj(torch.cat([x, feature], dim=-1))
        noise = self.log_alpha.float().exp() * sigma.float()
        gate = torch.sigmoid(content - noise[:, None, None]).to(x.dtype)
        return x + gate * feature


class LatentBranch(nn.Module):
    """Latent `[B, C, h, w]` to r-wide tokens, and from them the features that are injected."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        r, padding = config.latent_hidden, config.latent_padding
        self.unpatchify = config.latent_unpatchify
        self.ratio = config.latent_ratio
        channels = config.latent_channels // config.latent_unpatchify**2
        self.latent_proj = nn.Sequential(
            nn.Conv2d(channels, r, 3, padding=1, padding_mode=padding),
            nn.SiLU(),
            nn.Conv2d(r, r, 3, padding=1, padding_mode=padding),
            *(LatentResBlock(r, padding) for _ in range(config.latent_res_blocks)),
        )
        self.output_heads = nn.ModuleList(
            nn.Linear(r, config.hidden_size) for _ in range(config.num_injections)
        )
        gate_outputs = config.hidden_size if config.latent_gate == "channel" else 1
        self.gate_modules = nn.ModuleList(
            LatentGate(config.hidden_size, gate_outputs) for _ in range(config.num_injections)
        )
        if config.pixel_gate:
            self.pit_head = nn.Linear(r, config.hidden_size)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `[B, C, h, w]` to tokens `[B, L, r]`."""
        if self.unpatchify > 1:  # channel = c * u * u + row * u + column
            latent = F.pixel_shuffle(latent, self.unpatchify)
        if self.ratio > 1:
            latent = F.interpolate(latent, scale_factor=float(self.ratio), mode="nearest")
        return self.latent_proj(latent).flatten(2).transpose(1, 2)


# Patch blocks


class Attention(nn.Module):
    """Scaled dot-product attention, `[B, S, heads, head_dim]` in and out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class JointAttention(nn.Module):
    """Attention over the sequence [text, image], each stream with its own projections."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        head_dim = size // heads
        self.qkv_x = nn.Linear(size, 3 * size, bias=False)
        self.qkv_y = nn.Linear(size, 3 * size, bias=False)
        self.q_norm_x, self.k_norm_x = RMSNorm(head_dim), RMSNorm(head_dim)
        self.q_norm_y, self.k_norm_y = RMSNorm(head_dim), RMSNorm(head_dim)
        self.attention = Attention()
        self.proj_x = nn.Linear(size, size)
        self.proj_y = nn.Linear(size, size)

    def forward(
        self, x: Tensor, y: Tensor, x_angles: Tensor, y_angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        q_x, k_x, v_x = self.qkv_x(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_y, k_y, v_y = self.qkv_y(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_x, k_x = (
            rotate_pairs(norm(z), x_angles)
            for norm, z in ((self.q_norm_x, q_x), (self.k_norm_x, k_x))
        )
        q_y, k_y = (
            rotate_pairs(norm(z), y_angles)
            for norm, z in ((self.q_norm_y, q_y), (self.k_norm_y, k_y))
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q_y, q_x), (k_y, k_x), (v_y, v_x)))
        out_y, out_x = self.attention(q, k, v).flatten(2).split([y.shape[1], x.shape[1]], dim=1)
        return self.proj_x(out_x), self.proj_y(out_y)


class GatedMLP(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, size, bias=False)
        self.w3 = nn.Linear(size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PatchBlock(nn.Module):
    """One MMDiT block: joint attention, then an MLP for each stream, adaptively normalised."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm_x1, self.norm_y1 = RMSNorm(size), RMSNorm(size)
        self.attn = JointAttention(size, config.num_heads)
        self.norm_x2, self.norm_y2 = RMSNorm(size), RMSNorm(size)
        self.mlp_x = GatedMLP(size, config.mlp_hidden)
        self.mlp_y = GatedMLP(size, config.mlp_hidden)
        self.adaLN_modulation_img = nn.Sequential(nn.Linear(size, 6 * size))
        self.adaLN_modulation_txt = nn.Sequential(nn.Linear(size, 6 * size))

    def forward(
        self, x: Tensor, y: Tensor, condition: Tensor, x_angles: Tensor, y_angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image `[B, L, D]` and text `[B, T, D]` tokens under the condition `[B, D]`."""
        mod_x = self.adaLN_modulation_img(condition)[:, None].chunk(6, dim=-1)
        mod_y = self.adaLN_modulation_txt(condition)[:, None].chunk(6, dim=-1)
        out_x, out_y = self.attn(
            modulate(self.norm_x1(x), mod_x[0], mod_x[1]),
            modulate(self.norm_y1(y), mod_y[0], mod_y[1]),
            x_angles,
            y_angles,
        )
        x, y = x + mod_x[2] * out_x, y + mod_y[2] * out_y
        x = x + mod_x[5] * self.mlp_x(modulate(self.norm_x2(x), mod_x[3], mod_x[4]))
        y = y + mod_y[5] * self.mlp_y(modulate(self.norm_y2(y), mod_y[3], mod_y[4]))
        return x, y


# Pixel blocks


class PixelAttention(nn.Module):
    """Self-attention of a pixel block over the L patch tokens, `[B, L, A]`."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size // heads), RMSNorm(size // heads)
        self.attention = Attention()
        self.proj = nn.Linear(size, size)

    def forward(self, z: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(z).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate_pairs(self.q_norm(q), angles), rotate_pairs(self.k_norm(k), angles)
        return self.proj(self.attention(q, k, v).flatten(2))


class PixelMLP(nn.Module):
    """fc2(gelu(fc1 x)), with the exact (erf) GELU."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PixelBlock(nn.Module):
    """One PiT block: pixels `[B, L, P*P, d]`, attended to as one compressed vector per patch."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        d, flat = config.pixel_hidden_size, config.pixel_hidden_size * config.patch_pixels
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * flat))
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.compress_to_attn = nn.Linear(flat, config.pixel_attn_size)
        self.attn = PixelAttention(config.pixel_attn_size, config.pixel_num_heads)
        self.expand_from_attn = nn.Linear(config.pixel_attn_size, flat)
        self.mlp = PixelMLP(d)

    def forward(self, x: Tensor, s: Tensor, angles: Tensor) -> Tensor:
        """Pixels `[B, L, P*P, d]` under the per-token condition `[B, L, D]`."""
        pixels = x.shape[2]
        modulation = self.adaLN_modulation(s).unflatten(-1, (pixels, -1))  # (B, L, P*P, 6d)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        z = self.compress_to_attn(modulate(self.norm1(x), shift_a, scale_a).flatten(2))
        x = x + gate_a * self.expand_from_attn(self.attn(z, angles)).unflatten(-1, (pixels, -1))
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Pixels `[.., d]` to velocity `[.., 3]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(size)
        self.linear = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


# The network


class PidNet(nn.Module):
    """Predicts the velocity of a noisy image from a latent and a caption embedding."""

    def __init__(self, config: PidConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.pixel_embedder = Projection(3, config.pixel_hidden_size)
        self.s_embedder = Projection(3 * config.patch_pixels, size)
        self.t_embedder = TimestepEmbedder(size)
        self.y_embedder = TextEmbedder(config.text_dim, size)
        self.y_pos_embedding = nn.Parameter(torch.zeros(1, config.text_max_length, size))
        self.patch_blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.patch_depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(config) for _ in range(config.pixel_depth))
        self.final_layer = FinalLayer(config.pixel_hidden_size)
        self.lq_proj = LatentBranch(config)
        if config.pixel_gate:
            self.pit_lq_gate = LatentGate(size, 1)

    def check_inputs(self, x: Tensor, caption: Tensor, latent: Tensor) -> None:
        """Raise `PidInputError` unless the shapes of image, caption and latent belong together."""
        c = self.config
        if x.ndim != 4 or x.shape[1] != 3:
            raise PidInputError(
                f"expected an image of shape (B, 3, H, W), but got {tuple(x.shape)}"
            )
        batch, _, height, width = x.shape
        size = c.latent_size(height, width)
        if size is None:
            raise PidInputError(
                f"expected H and W to be multiples of {c.size_multiple}, but got {height}x{width}"
            )
        wanted = (batch, c.latent_channels, *size)
        if tuple(latent.shape) != wanted:
            raise PidInputError(
                f"expected a latent of shape {wanted} for a {height}x{width} image, "
                f"but got {tuple(latent.shape)}"
            )
        if caption.ndim != 3 or caption.shape[0] != batch or caption.shape[2] != c.text_dim:
            raise PidInputError(
                f"expected a caption embedding of shape ({batch}, T, {c.text_dim}), "
                f"but got {tuple(caption.shape)}"
            )
        if not 1 <= caption.shape[1] <= c.text_max_length:
            raise PidInputError(
                f"expected 1 to {c.text_max_length} caption tokens, but got {caption.shape[1]}"
            )

    def forward(
        self, x: Tensor, timestep: Tensor, caption: Tensor, latent: Tensor, sigma: Tensor
    ) -> Tensor:
        """Velocity `[B, 3, H, W]` at the noisy image `x` `[B, 3, H, W]`.

        timestep: `[B]`, 1000 t with t in [0, 1] (1 is noise). caption: `[B, T, text_dim]`.
        latent: `[B, C, h, w]`, normalised, H = h * latent_down * scale. sigma: `[B]`, noise
        level of the latent in [0, 1]. Raises `PidInputError` when the shapes do not match.
        """
        self.check_inputs(x, caption, latent)
        c = self.config
        height, width = x.shape[-2:]
        s = self.condition(x, timestep, caption, latent, sigma)
        patches = patchify(x, c.patch_size)  # (B, L, P*P, 3)
        positions = pixel_positions(height, width, c.pixel_hidden_size).to(x)
        pixels = self.pixel_embedder(patches)
        pixels = pixels + patchify(positions.permute(2, 0, 1)[None], c.patch_size)
        angles = self._angles(height, width, c.pixel_head_dim).to(x.device)
        for block in self.pixel_blocks:
            pixels = block(pixels, s, angles)
        return unpatchify(self.final_layer(pixels), height, width, c.patch_size)

    def condition(
        self, x: Tensor, timestep: Tensor, caption: Tensor, latent: Tensor, sigma: Tensor
    ) -> Tensor:
        """What the patch blocks tell the pixel blocks, `[B, L, D]`; arguments as in `forward`."""
        c = self.config
        height, width = x.shape[-2:]
        x_angles = self._angles(height, width, c.head_dim).to(x.device)
        y_angles = rope_angles_1d(caption.shape[1], c.head_dim).to(x.device)

        t_emb = self.t_embedder(timestep)
        condition = F.silu(t_emb)
        y = self.y_embedder(caption) + self.y_pos_embedding[:, : caption.shape[1]]
        latent_tokens = self.lq_proj(latent)

        patches = patchify(x, c.patch_size).transpose(2, 3)  # (B, L, 3, P*P)
        tokens = self.s_embedder(patches.flatten(2))
        for index, block in enumerate(self.patch_blocks):
            if index % c.latent_interval == 0:
                k = index // c.latent_interval
                feature = self.lq_proj.output_heads[k](latent_tokens)
                tokens = self.lq_proj.gate_modules[k](tokens, feature, sigma)
            tokens, y = block(tokens, y, condition, x_angles, y_angles)

        s = F.silu(t_emb[:, None] + tokens)
        if c.pixel_gate:
            s = self.pit_lq_gate(s, self.lq_proj.pit_head(latent_tokens), sigma)
        return s

    def _angles(self, height: int, width: int, head_dim: int) -> Tensor:
        """Of the patch tokens of an image of `height` x `width` pixels."""
        p = self.config.patch_size
        return rope_angles_2d(height // p, width // p, head_dim, self.config.rope_reference // p)
