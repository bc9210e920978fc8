"""The value every buffer of a program should have, taken from a run of the reference network.

This is what stages are verified against: hooks on `PidNet` record what flows between its blocks,
and the few differences of layout (rotary pairs as halves, tokens pixel-major) are applied here.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pid_ref.network import PidNet, patchify
from pid_runtime.manifest import Manifest, Sizes
from pid_runtime.tables import compute_table

Values = dict[str, Tensor]


@torch.no_grad()
def reference_buffers(
    net: PidNet,
    manifest: Manifest,
    sizes: Sizes,
    x: Tensor,
    time: float,
    row: int,
    caption: Tensor,
    latent: Tensor,
    sigma: Tensor,
    noise: Tensor,
    update: Tensor,
    tables: Values,
) -> Values:
    """All buffers of one step at state `x` `[B, 3, H, W]` and time `time`, float32.

    row: the modulation row of that time. tables: the bundle's constants ("modulation", ..).
    Buffers of attentions are whole sequences, text rows first.
    """
    c = net.config
    values: Values = {
        "latent": latent,
        "caption": caption,
        "sigma": sigma,
        "state": patchify(x, c.patch_size).flatten(2),
        "noise": patchify(noise, c.patch_size).flatten(2),
        "update": update[None].expand(sizes.value("N"), -1),
        **tables,
    }
    for name, buffer in manifest.buffers.items():
        if buffer.kind == "table":
            values[name] = torch.from_numpy(compute_table(buffer.source, sizes))
    if not manifest.sampler.times:
        values["timestep"] = torch.full((sizes.value("N"), 1), 1000 * time)
    with _recorded(net, values, sizes) as record:
        timestep = torch.full((x.shape[0],), 1000.0 * time)
        velocity = net(x, timestep, caption, latent, sigma)
    record()
    values["velocity"] = patchify(velocity, c.patch_size).flatten(2)
    factors = update.double()
    values["next_state"] = (
        factors[0] * values["state"]
        + factors[1] * values["velocity"]
        + factors[2] * values["noise"]
    ).float()
    values["image"] = x.clamp(-1, 1)
    values["image_bytes"] = ((values["image"] + 1) * 127.5).round().permute(0, 2, 3, 1)
    return values


@contextmanager
def _recorded(net: PidNet, values: Values, sizes: Sizes) -> Iterator[Callable[[], None]]:
    """Hooks that fill `values` while the network runs; the yielded call adds what follows from them."""
    c = net.config
    hooks: list[Any] = []

    def on(module: nn.Module, record: Callable[[tuple[Any, ...], Any], None]) -> None:
        hooks.append(module.register_forward_hook(lambda _m, args, out: record(args, out)))

    def keep_attention(prefix: str, index: int, head_dim: int, text: int) -> Any:
        halves = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])

        def record(args: tuple[Any, ...], out: Any) -> None:
            q, k, v = args
            q, k = q[..., halves] / math.sqrt(head_dim), k[..., halves]
            parts = {"q": q[:, text:], "k": k, "v": v, "attended": out[:, text:]}
            for name, value in parts.items():
                values[f"{prefix}{name}.{index}"] = value.flatten(2)

        return record

    on(net.lq_proj, lambda _args, out: values.update(latent_tokens=out))
    for i, block in enumerate(net.patch_blocks):
        last = i == c.patch_depth - 1

        def tokens(args: tuple[Any, ...], _out: Any, i: int = i) -> None:
            values[f"x.{i}"] = args[0]
            values.setdefault(f"y.{i}", args[1])

        on(block, tokens)
        # The last block's queries and output hold the image alone.
        text = sizes.value("T") if last else 0
        on(block.attn.attention, keep_attention("", i, c.head_dim, text))
    for i, block in enumerate(net.pixel_blocks):

        def pixels(args: tuple[Any, ...], _out: Any, i: int = i) -> None:
            values["s"] = args[1]
            values[f"pixels.{i}"] = args[0].flatten(2)

        on(block, pixels)
        on(block.attn.attention, keep_attention("pixel_", i, c.pixel_head_dim, 0))
    try:
        yield lambda: None
    finally:
        for hook in hooks:
            hook.remove()
