"""The value every buffer of a program should have, taken from a run of the reference network.

This is what stages are verified against: hooks on `PidNet` record what flows between its blocks,
and the few differences of layout (rotary pairs as halves, tokens pixel-major) are applied here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pid_export.fold import fold_tables, rotary_halves
from pid_ref.network import PidNet, patchify
from pid_runtime.bundle.sizes import Sizes

Values = dict[str, Tensor]


@torch.no_grad()
def reference_buffers(
    net: PidNet,
    sizes: Sizes,
    x: Tensor,
    time: float,
    caption: Tensor,
    latent: Tensor,
    sigma: Tensor,
    noise: Tensor,
    update: Tensor,
) -> Values:
    """All buffers of one step at state `x` `[1, 3, H, W]` and time `time`, float32.

    noise: `[1, 3, H, W]`, what the step adds; update: `[3]`, the sampler's factors.
    """
    c = net.config
    rows = sizes.value("N")
    tables = fold_tables(net.state_dict(), c, [time])
    values: Values = {
        "latent": latent,
        "caption": caption,
        "sigma": sigma,
        "state_image": x,
        "noise_image": noise,
        "state": patchify(x, c.patch_size).flatten(2),
        "noise": patchify(noise, c.patch_size).flatten(2),
        "update": update[None].expand(rows, -1),
        "timestep": torch.full((rows, 1), 1000 * time),
        "modulation": tables["modulation"].expand(rows, -1, -1, -1),
        "time_embedding": tables["time_embedding"].expand(rows, -1),
        "image": x.clamp(-1, 1),
    }
    values["image_bytes"] = ((values["image"] + 1) * 127.5).round().permute(0, 2, 3, 1).contiguous()
    hooks = _record(net, values, sizes.value("T"))
    try:
        velocity = net(x, torch.tensor([1000.0 * time]), caption, latent, sigma)
    finally:
        for hook in hooks:
            hook.remove()
    velocity = patchify(velocity, c.patch_size).flatten(2).double()
    factors = update.double()
    state = factors[0] * values["state"] + factors[1] * velocity + factors[2] * values["noise"]
    values["next_state"] = state.float()
    return {name: value.contiguous() for name, value in values.items()}


def _record(net: PidNet, values: Values, text_tokens: int) -> list[RemovableHandle]:
    """Hooks that fill `values` while the network runs."""
    c = net.config
    hooks: list[RemovableHandle] = []

    def on(module: nn.Module, record: Callable[[tuple[Any, ...], Any], None]) -> None:
        hooks.append(module.register_forward_hook(lambda _m, args, out: record(args, out)))

    def attention(prefix: str, index: int, head_dim: int, skipped: int) -> None:
        halves = rotary_halves(head_dim)

        def record(args: tuple[Any, ...], out: Any) -> None:
            q, k, v = args
            q, k = q[..., halves] / math.sqrt(head_dim), k[..., halves]
            parts = {"q": q[:, skipped:], "k": k, "v": v, "attended": out[:, skipped:]}
            for name, value in parts.items():
                values[f"{prefix}{name}.{index}"] = value.flatten(2)

        owner = net.pixel_blocks[index] if prefix else net.patch_blocks[index]
        on(owner.get_submodule("attn.attention"), record)

    on(net.lq_proj, lambda _args, out: values.update(latent_tokens=out))
    for i, block in enumerate(net.patch_blocks):

        def tokens(args: tuple[Any, ...], _out: Any, i: int = i) -> None:
            values[f"x.{i}"], values[f"y.{i}"] = args[:2]

        on(block, tokens)
        # The last block's queries and output hold the image alone.
        attention("", i, c.head_dim, text_tokens if i == c.patch_depth - 1 else 0)
    for i, block in enumerate(net.pixel_blocks):

        def pixels(args: tuple[Any, ...], _out: Any, i: int = i) -> None:
            values[f"pixels.{i}"], values["s"] = args[0].flatten(2), args[1]

        on(block, pixels)
        attention("pixel_", i, c.pixel_head_dim, 0)
    return hooks
