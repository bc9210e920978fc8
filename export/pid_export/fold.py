"""The weights of each graph, from a checkpoint: folded, reordered and transposed.

Everything is computed in float32 (products of weights in float64) and rounded once, to the
graph's dtype. What is folded where:

- norm gains into the modulation or the projection that follows; the 1 of (1 + scale) too;
- the softmax scale into the queries' gain;
- the content half of a latent gate through its feature head: gate(feature(z)) = (WH) z + (Wb + c);
- a pixel block's output projection into its expansion, which follows without a nonlinearity;
- a pixel block's attention shift through the compression that follows it;
- rotary pairs from neighbours (2j, 2j + 1) to halves (j, j + n/2), by reordering channels;
- patches from channel-major to pixel-major, the layout of the sampler's state.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pid_export.program import MODULATION, GraphSpec
from pid_ref.config import PidConfig
from pid_ref.network import TimestepEmbedder

Source = Mapping[str, Tensor]
Weights = dict[str, Tensor]


def fold_graph(spec: GraphSpec, source: Source, config: PidConfig) -> Weights:
    """The weights of one graph, named and shaped as its stage's state dict, float32."""
    folder = _Folder(source, config)
    match spec.stage:
        case "latent":
            return folder.latent()
        case "caption":
            return folder.caption()
        case "timestep":
            return folder.timestep()
        case "tokens":
            return folder.tokens(spec.block, spec.stream, spec.options)
        case "pixel_first":
            return folder.pixel_first()
        case "pixels":
            return folder.pixels(spec.block)
        case "update":
            return folder.update()
        case _:
            return {}


def fold_tables(source: Source, config: PidConfig, times: Sequence[float]) -> Weights:
    """Modulation table `[times, 2, 6 * depth, D]` and time embeddings `[times, D]`, float32."""
    folder = _Folder(source, config)
    embedder = TimestepEmbedder(config.hidden_size)
    embedder.load_state_dict({key: folder(f"t_embedder.{key}") for key in embedder.state_dict()})
    with torch.no_grad():
        embedding = embedder(1000 * torch.tensor(times))
        rows = [
            F.linear(F.silu(embedding), folder(f"{name}.weight"), folder(f"{name}.bias"))
            for name in folder.modulation_layers()
        ]
    stacked = torch.stack(rows, dim=1)  # (times, 2 * depth, 6 D)
    table = stacked.reshape(len(times), 2, MODULATION * config.patch_depth, config.hidden_size)
    gain, offset = folder.modulation_affine()
    return {"modulation": (table + offset) * gain, "time_embedding": embedding}


def rotary_halves(head_dim: int) -> Tensor:
    """Channels of a head in an order that moves its rotary pairs (2j, 2j + 1) to two halves."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])


class _Folder:
    def __init__(self, source: Source, config: PidConfig) -> None:
        self.source, self.config = source, config

    def __call__(self, name: str) -> Tensor:
        return self.source[name].detach().float()

    def linear(self, name: str, bias: bool = True) -> Weights:
        weights = {"weight": self(f"{name}.weight").T}
        if bias:
            weights["bias"] = self(f"{name}.bias")
        return weights

    # Once per decode

    def latent(self) -> Weights:
        prefix = "lq_proj.latent_proj"
        weights: Weights = {}
        places = {"conv_in": "0", "conv_mid": "2"}
        for i in range(self.config.latent_res_blocks):
            for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 5)):
                places[f"blocks.{i}.{ours}"] = f"{i + 3}.block.{theirs}"
        for ours, theirs in places.items():
            for part in ("weight", "bias"):
                weights[f"{ours}.{part}"] = self(f"{prefix}.{theirs}.{part}")
        return weights

    def caption(self) -> Weights:
        return {
            **_prefixed("proj", self.linear("y_embedder.proj")),
            "norm": self("y_embedder.norm.weight"),
            "position": self("y_pos_embedding")[0],
        }

    def modulation_layers(self) -> list[str]:
        return [
            f"patch_blocks.{i}.adaLN_modulation_{stream}.0"
            for stream in ("img", "txt")
            for i in range(self.config.patch_depth)
        ]

    def modulation_affine(self) -> tuple[Tensor, Tensor]:
        """Gain and offset of the table's rows: scales become gain * (1 + scale)."""
        c = self.config
        shape = (2, c.patch_depth, MODULATION, c.hidden_size)
        gain, offset = torch.ones(shape), torch.zeros(shape)
        offset[:, :, (1, 4)] = 1
        for s, stream in enumerate("xy"):
            for i in range(c.patch_depth):
                for row, norm in ((1, 1), (4, 2)):
                    gain[s, i, row] = self(f"patch_blocks.{i}.norm_{stream}{norm}.weight")
        return gain.flatten(1, 2), offset.flatten(1, 2)

    def timestep(self) -> Weights:
        gain, offset = self.modulation_affine()
        weights = {
            **_prefixed("mlp_in", self.linear("t_embedder.mlp.0")),
            **_prefixed("mlp_out", self.linear("t_embedder.mlp.2")),
            "gain": gain,
            "offset": offset,
        }
        for i, name in enumerate(self.modulation_layers()):
            weights |= _prefixed(f"rows.{i}", self.linear(name))
        return weights

    # Patch blocks

    def tokens(self, index: int, stream: str, options: Mapping[str, bool]) -> Weights:
        c = self.config
        weights: Weights = {}
        if options.get("embed"):
            proj = self("s_embedder.proj.weight").unflatten(1, (3, c.patch_pixels))
            weights["embed.weight"] = proj.transpose(1, 2).flatten(1).T
            weights["embed.bias"] = self("s_embedder.proj.bias")
        if not options["first"]:
            weights |= _prefixed("leave", self.leave(index - 1, stream))
        if options.get("inject"):
            k = index // c.latent_interval
            gate = self.gate(f"lq_proj.gate_modules.{k}", f"lq_proj.output_heads.{k}")
            weights |= _prefixed("gate", gate)
        attn = f"patch_blocks.{index}.attn"
        weights |= _prefixed(
            "enter",
            self.enter(
                self(f"{attn}.qkv_{stream}.weight"),
                self(f"{attn}.q_norm_{stream}.weight"),
                self(f"{attn}.k_norm_{stream}.weight"),
                c.num_heads,
                queries=not options.get("last"),
            ),
        )
        return weights

    def leave(self, index: int, stream: str) -> Weights:
        block = f"patch_blocks.{index}"
        weights = _prefixed("proj", self.linear(f"{block}.attn.proj_{stream}"))
        for name in ("w1", "w2", "w3"):
            weights |= _prefixed(name, self.linear(f"{block}.mlp_{stream}.{name}", bias=False))
        return weights

    def gate(self, gate: str, head: str) -> Weights:
        d = self.config.hidden_size
        feature, bias = self(f"{head}.weight").double(), self(f"{head}.bias").double()
        content = self(f"{gate}.content_proj.weight")
        of_latent = content[:, d:].double()
        return {
            **_prefixed("feature", self.linear(head)),
            "content.weight": content[:, :d].T,
            "content_latent.weight": (of_latent @ feature).T.float(),
            "content_latent.bias": (of_latent @ bias).float() + self(f"{gate}.content_proj.bias"),
            "alpha": self(f"{gate}.log_alpha").exp().reshape(1),
        }

    def enter(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, heads: int, queries: bool = True
    ) -> Weights:
        """Projections to q, k, v, with every head's rotary pairs moved to its two halves."""
        q, k, v = qkv.chunk(3)
        head_dim = len(q_gain)
        halves = rotary_halves(head_dim)

        def reordered(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (heads, head_dim))[:, halves].flatten(0, 1)

        gains = [q_gain[halves] / math.sqrt(head_dim), k_gain[halves]]
        parts = [reordered(q), reordered(k)]
        if not queries:
            gains, parts = gains[1:], parts[1:]
        return {
            "qk.weight": torch.cat(parts).T,
            "v.weight": v.T,
            "rope.weight": torch.stack(gains)[:, None],
        }

    # Pixel blocks

    def pixel_embed(self) -> Weights:
        return _prefixed("embed.proj", self.linear("pixel_embedder.proj"))

    def pixel_modulation(self, index: int) -> list[Weights]:
        """The six modulation layers, each `[D, P * P * d]`, taken out of the pixel-major rows."""
        d = self.config.pixel_hidden_size
        layer = f"pixel_blocks.{index}.adaLN_modulation.0"
        weight = self(f"{layer}.weight").unflatten(0, (-1, MODULATION, d))
        bias = self(f"{layer}.bias").unflatten(0, (-1, MODULATION, d))
        layers: list[Weights] = []
        for part in range(MODULATION):
            w, b = weight[:, part], bias[:, part]
            if part in (1, 4):  # a scale: gain * (1 + scale)
                gain = self(f"pixel_blocks.{index}.norm{1 if part == 1 else 2}.weight")
                w, b = w * gain[:, None], (b + 1) * gain
            layers.append({"weight": w.flatten(0, 1).T, "bias": b.flatten()})
        return layers

    def enter_pixel(self, index: int) -> Weights:
        block = f"pixel_blocks.{index}"
        shift, scale = self.pixel_modulation(index)[:2]
        compress = self.linear(f"{block}.compress_to_attn")
        through = compress["weight"].double()
        enter = self.enter(
            self(f"{block}.attn.qkv.weight"),
            self(f"{block}.attn.q_norm.weight"),
            self(f"{block}.attn.k_norm.weight"),
            self.config.pixel_num_heads,
        )
        return {
            **_prefixed("scale", scale),
            "compress.weight": compress["weight"],
            "shift.weight": (shift["weight"].double() @ through).float(),
            "shift.bias": (shift["bias"].double() @ through).float() + compress["bias"],
            **_prefixed("enter", enter),
        }

    def leave_pixel(self, index: int) -> Weights:
        block = f"pixel_blocks.{index}"
        expand, proj = self(f"{block}.expand_from_attn.weight"), self(f"{block}.attn.proj.weight")
        bias = expand.double() @ self(f"{block}.attn.proj.bias").double()
        weights: Weights = {
            "expand.weight": (expand.double() @ proj.double()).T.float(),
            "expand.bias": bias.float() + self(f"{block}.expand_from_attn.bias"),
        }
        names = ("gate_attention", "shift", "scale", "gate_mlp")
        for name, layer in zip(names, self.pixel_modulation(index)[2:], strict=True):
            weights |= _prefixed(name, layer)
        for name in ("fc1", "fc2"):
            weights |= _prefixed(name, self.linear(f"{block}.mlp.{name}"))
        return weights

    def pixel_first(self) -> Weights:
        weights = _prefixed("leave", self.leave(self.config.patch_depth - 1, "x"))
        if self.config.pixel_gate:
            weights |= _prefixed("gate", self.gate("pit_lq_gate", "lq_proj.pit_head"))
        return {**weights, **self.pixel_embed(), **_prefixed("enter", self.enter_pixel(0))}

    def pixels(self, index: int) -> Weights:
        weights = self.pixel_embed() if index == 1 else {}
        return {
            **weights,
            **_prefixed("leave", self.leave_pixel(index - 1)),
            **_prefixed("enter", self.enter_pixel(index)),
        }

    def update(self) -> Weights:
        last = self.config.pixel_depth - 1
        weights = self.pixel_embed() if last == 0 else {}
        gain, linear = self("final_layer.norm.weight"), self("final_layer.linear.weight")
        return {
            **weights,
            **_prefixed("leave", self.leave_pixel(last)),
            "velocity.weight": (linear * gain).T,
            "velocity.bias": self("final_layer.linear.bias"),
        }


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
