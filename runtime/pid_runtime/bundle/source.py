"""What a buffer is filled from: a position table to compute, or a constant to read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

from pid_runtime.bundle.json_reader import require
from pid_runtime.bundle.sizes import LARGEST_SIZE, Shape
from pid_runtime.errors import PidRuntimeError

Function = Literal["cos", "sin"]


@dataclass(frozen=True)
class Rope2d:
    """A function of the image's rotary angles; see `pid_runtime.tables.rope_2d`."""

    function: Function
    head_dim: int
    reference: float
    extent: float
    theta: float

    @property
    def shape(self) -> Shape:
        return ("L", self.head_dim // 2)


@dataclass(frozen=True)
class Rope1d:
    """A function of the text's rotary angles; see `pid_runtime.tables.rope_1d`."""

    function: Function
    head_dim: int
    theta: float

    @property
    def shape(self) -> Shape:
        return ("T", self.head_dim // 2)


@dataclass(frozen=True)
class PixelAxis:
    """What a pixel's column or row adds; see `pid_runtime.tables.pixel_axis`."""

    axis: Literal["column", "row"]
    size: int
    patch_size: int
    theta: float

    @property
    def shape(self) -> Shape:
        return ("L", self.patch_size, self.size // 2)


@dataclass(frozen=True)
class Constant:
    """A tensor of the weights file."""

    tensor: str


Table = Rope2d | Rope1d | PixelAxis
Source = Table | Constant

TABLES: dict[str, tuple[type[Table], dict[str, Any]]] = {
    "rope_2d_cos": (Rope2d, {"function": "cos"}),
    "rope_2d_sin": (Rope2d, {"function": "sin"}),
    "rope_1d_cos": (Rope1d, {"function": "cos"}),
    "rope_1d_sin": (Rope1d, {"function": "sin"}),
    "pixel_axis": (PixelAxis, {}),
}
"""By the name a manifest gives a table: its class, and the fields that the name stands for."""

_require = partial(require, fix="export the bundle again")


def table_options(name: str) -> list[str]:
    """The options a manifest gives with a table's name."""
    kind, named = TABLES[name]
    return [each.name for each in fields(kind) if each.name not in named]


def encode_source(source: Source | None) -> dict[str, Any]:
    """A source as the manifest's JSON has it."""
    if source is None or isinstance(source, Constant):
        return asdict(source) if source else {}
    values = asdict(source)
    name = next(
        name
        for name, (kind, named) in TABLES.items()
        if kind is type(source) and named.items() <= values.items()
    )
    return {"table": name, **{option: values[option] for option in table_options(name)}}


def read_source(kind: str, raw: Mapping[str, Any], what: str) -> Source | None:
    """The source of a buffer of a kind. what: what to call the buffer in a message.

    Raises `PidRuntimeError` for a table that is unknown or cannot be computed.
    """
    if kind == "constant":
        _require(isinstance(raw.get("tensor"), str), f"a tensor for {what}", "none")
        return Constant(raw["tensor"])
    return _read_table(raw, what) if kind == "table" else None


def _read_table(raw: Mapping[str, Any], what: str) -> Table:
    name = raw.get("table")
    if not isinstance(name, str) or name not in TABLES:
        raise PidRuntimeError(f"expected a table the manifest knows, but got {str(name)[:80]!r}")
    options = table_options(name)
    _require(set(raw) == {"table", *options}, f"options {', '.join(options)} of {what}", raw)
    kind, named = TABLES[name]
    table = kind(**named, **{option: _option(option, raw[option], what) for option in options})
    if isinstance(table, PixelAxis):
        _require(table.size % 4 == 0, f"a size of {what} divisible by 4", table.size)
    elif isinstance(table, Rope1d):
        _require(table.head_dim % 2 == 0, f"an even head_dim of {what}", table.head_dim)
    else:
        usable = table.head_dim % 4 == 0 and table.head_dim > 4
        _require(usable, f"a head_dim of {what} in 8, 12, ..", table.head_dim)
    return table


def _option(option: str, value: Any, what: str) -> Any:
    if option == "axis":
        good = value in ("column", "row")
    elif option in ("reference", "extent", "theta"):
        good = type(value) in (int, float) and 1e-6 <= value <= 1e9
    else:
        good = type(value) is int and 0 < value <= LARGEST_SIZE
    _require(good, f"a usable {option} of {what}", value)
    return value
