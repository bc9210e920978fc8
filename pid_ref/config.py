"""Every dimension of a PiD network, named."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from pid_ref.errors import PidInputError

Padding = Literal["zeros", "replicate"]
Gate = Literal["channel", "token"]
Version = Literal["v1", "v1.5"]

LARGEST = 1 << 21
"""No dimension of a network is larger."""


@dataclass(frozen=True)
class PidConfig:
    """The shape of one PiD network. The defaults are the released v1 decoder for FLUX latents.

    Symbols used in shapes: B batch, H x W output pixels, P patch size, Hs = H/P, Ws = W/P,
    L = Hs*Ws patch tokens, T text tokens, D hidden size, d pixel hidden size, A pixel attention
    size, C latent channels, r latent hidden size.
    """

    latent_channels: int = 16
    """C, channels of the latent as it is given to the decoder."""
    latent_down: int = 8
    """Pixels of the encoded image per latent pixel, along each axis."""
    scale: int = 4
    """Output pixels per pixel of the encoded image, along each axis."""
    latent_unpatchify: int = 1
    """Side of the patches the latent is packed in; 2 turns 4c channels at 1/16 into c at 1/8."""
    latent_hidden: int = 512
    """r, width of the latent branch's convolutions."""
    latent_res_blocks: int = 4
    """Residual blocks of the latent branch, after its two plain convolutions."""
    latent_padding: Padding = "zeros"
    """Border rule of the latent branch's convolutions: zeros in v1, replicate in v1.5."""
    latent_interval: int = 2
    """A latent feature is injected before every patch block whose index divides by this."""
    latent_gate: Gate = "channel"
    """One gate value per token and channel (v1) or one per token (v1.5)."""
    pixel_gate: bool = False
    """Whether the latent is also injected in front of the pixel blocks (v1.5)."""
    hidden_size: int = 1536
    """D, width of a patch token."""
    num_heads: int = 24
    """Attention heads of a patch block; D must divide by it."""
    patch_depth: int = 14
    """Number of patch (MMDiT) blocks."""
    patch_size: int = 16
    """P, side of a patch in output pixels."""
    pixel_hidden_size: int = 16
    """d, width of a pixel in the pixel blocks; divisible by 4."""
    pixel_attn_size: int = 1152
    """A, width of the pixel blocks' attention."""
    pixel_num_heads: int = 16
    """Attention heads of a pixel block; A must divide by it."""
    pixel_depth: int = 2
    """Number of pixel (PiT) blocks."""
    text_dim: int = 2304
    """Width of the caption embedding."""
    text_max_length: int = 300
    """Most text tokens a caption embedding may have."""
    rope_reference: int = 1024
    """Side in pixels of the image whose token grid the 2-D rotary embedding is scaled from."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(PidConfig).items():
            _check_field(name, kind, getattr(self, name))
        for name, divisor in (
            ("hidden_size", 4 * self.num_heads),
            ("pixel_attn_size", 4 * self.pixel_num_heads),
            ("pixel_hidden_size", 4),
            ("latent_channels", self.latent_unpatchify**2),
            ("latent_hidden", 4),
            ("rope_reference", self.patch_size),
        ):
            value = getattr(self, name)
            if value % divisor:
                raise PidInputError(
                    f"expected {name} to be a multiple of {divisor}, but got {value}"
                )
        if min(self.head_dim, self.pixel_head_dim) < 8:
            raise PidInputError(
                "expected attention heads at least 8 wide, which the rotary embedding needs, "
                f"but got {self.head_dim} and {self.pixel_head_dim}"
            )
        grid = self.latent_down % self.latent_unpatchify
        if grid or self.latent_ratio < 1 or self.latent_grid_down * self.scale % self.patch_size:
            raise PidInputError(
                f"expected scale x latent_down / latent_unpatchify to be a multiple of patch_size "
                f"{self.patch_size}, but got {self.scale} x {self.latent_down} / "
                f"{self.latent_unpatchify}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head of a patch block's attention."""
        return self.hidden_size // self.num_heads

    @property
    def pixel_head_dim(self) -> int:
        """Width of one head of a pixel block's attention."""
        return self.pixel_attn_size // self.pixel_num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of a patch block's gated MLP, two thirds of 4 D."""
        return int(2 * 4 * self.hidden_size / 3)

    @property
    def patch_pixels(self) -> int:
        """Pixels in one patch, P*P."""
        return self.patch_size**2

    @property
    def num_injections(self) -> int:
        """How many patch blocks have a latent feature injected in front of them."""
        return -(-self.patch_depth // self.latent_interval)

    @property
    def latent_grid_down(self) -> int:
        """Pixels of the encoded image per pixel of the unpacked latent."""
        return self.latent_down // self.latent_unpatchify

    @property
    def latent_ratio(self) -> int:
        """Patch tokens per pixel of the unpacked latent, along each axis."""
        return self.latent_grid_down * self.scale // self.patch_size

    @property
    def size_multiple(self) -> int:
        """Both H and W are multiples of this many pixels: one latent pixel's worth."""
        return self.latent_down * self.scale

    @property
    def tokens_per_latent(self) -> int:
        """Patch tokens per latent pixel, along each axis."""
        return self.size_multiple // self.patch_size

    def latent_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width of the latent of an image of `height` x `width` pixels.

        None unless both are positive multiples of `size_multiple`.
        """
        h, w = height // self.size_multiple, width // self.size_multiple
        fits = min(h, w) > 0 and (h * self.size_multiple, w * self.size_multiple) == (height, width)
        return (h, w) if fits else None

    @property
    def version(self) -> Version:
        """Generation of the network, told by the gate in front of the pixel blocks."""
        return "v1.5" if self.pixel_gate else "v1"

    @classmethod
    def from_json(cls, text: str, base: "PidConfig | None" = None) -> "PidConfig":
        """Read a configuration written with this class's field names.

        base: has the fields that are absent; the defaults of the class when None.
        Raises `PidInputError` for text that is no JSON object, or a field that does not exist.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PidInputError(
                f"expected network dimensions as JSON, but got {error}; mend the file"
            ) from None
        if not isinstance(fields, dict):
            raise PidInputError(
                f"expected a JSON object of network dimensions, but got {repr(fields)[:80]}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise PidInputError(
                    f"expected network dimensions ({', '.join(known)}), but got {name[:80]!r}"
                )
        return dataclasses.replace(base or cls(), **fields)

    @classmethod
    def from_upstream(cls, arguments: dict[str, Any]) -> "PidConfig":
        """Translate the public implementation's constructor arguments (as in the golden files)."""
        return cls(
            latent_channels=arguments["lq_latent_channels"],
            latent_down=arguments.get("latent_spatial_down_factor", 8),
            scale=arguments["sr_scale"],
            latent_unpatchify=arguments["lq_latent_unpatchify_factor"],
            latent_hidden=arguments["lq_hidden_dim"],
            latent_res_blocks=arguments.get("lq_num_res_blocks", 4),
            latent_padding=arguments["lq_conv_padding_mode"],
            latent_interval=arguments["lq_interval"],
            latent_gate="token" if arguments["lq_gate_type"].endswith("per_token") else "channel",
            pixel_gate=arguments["pit_lq_inject"],
            hidden_size=arguments["hidden_size"],
            num_heads=arguments["num_groups"],
            patch_depth=arguments["patch_depth"],
            patch_size=arguments["patch_size"],
            pixel_hidden_size=arguments["pixel_hidden_size"],
            pixel_attn_size=arguments["pixel_attn_hidden_size"],
            pixel_num_heads=arguments["pixel_num_groups"],
            pixel_depth=arguments["pixel_depth"],
            text_dim=arguments["txt_embed_dim"],
            text_max_length=arguments["txt_max_length"],
            rope_reference=arguments.get("rope_ref_h", 1024),
        )


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Raise `PidInputError` when a dimension is not of its type, or out of range."""
    if choices := get_args(kind):
        if value not in choices:
            wanted = " or ".join(map(repr, choices))
            raise PidInputError(f"expected {name} to be {wanted}, but got {value!r}")
        return
    smallest = 0 if name == "latent_res_blocks" or kind is bool else 1
    if type(value) is not kind or not smallest <= value <= LARGEST:
        wanted = "true or false" if kind is bool else f"an integer from {smallest} to {LARGEST}"
        raise PidInputError(f"expected {name} to be {wanted}, but got {repr(value)[:80]}")
