"""Sources of buffers: what a manifest has, as values and back; refusals are in test_manifest."""

from typing import Any

import pytest

from pid_runtime.bundle.source import (
    TABLES,
    Constant,
    PixelAxis,
    Rope1d,
    Rope2d,
    Source,
    encode_source,
    read_source,
    table_options,
)
from pid_runtime.errors import PidRuntimeError

ROPE = {"head_dim": 8, "reference": 64.0, "extent": 16.0, "theta": 1e4}
SOURCES: list[tuple[str, dict[str, Any], Source | None, Any]] = [
    ("table", {"table": "rope_2d_cos", **ROPE}, Rope2d("cos", 8, 64.0, 16.0, 1e4), ("L", 4)),
    ("table", {"table": "rope_2d_sin", **ROPE}, Rope2d("sin", 8, 64.0, 16.0, 1e4), ("L", 4)),
    (
        "table",
        {"table": "rope_1d_sin", "head_dim": 6, "theta": 100.0},
        Rope1d("sin", 6, 100.0),
        ("T", 3),
    ),
    (
        "table",
        {"table": "pixel_axis", "axis": "row", "size": 12, "patch_size": 16, "theta": 1e4},
        PixelAxis("row", 12, 16, 1e4),
        ("L", 16, 6),
    ),
    ("constant", {"tensor": "table.modulation"}, Constant("table.modulation"), None),
    ("temporary", {}, None, None),
]


@pytest.mark.parametrize(("kind", "raw", "source", "shape"), SOURCES)
def test_sources_are_read_and_written(
    kind: str, raw: dict[str, Any], source: Source | None, shape: Any
) -> None:
    assert read_source(kind, raw, "buffer") == source
    written = encode_source(source)
    assert written == raw and list(written) == list(raw)
    assert getattr(source, "shape", None) == shape


def test_options_are_the_fields_without_what_the_name_says() -> None:
    assert table_options("rope_1d_cos") == ["head_dim", "theta"]
    assert {name for name in TABLES if "function" in table_options(name)} == set()


def test_an_unknown_table() -> None:
    assert "rope_3d_cos" not in TABLES
    with pytest.raises(PidRuntimeError, match="expected a table the manifest knows, but got"):
        read_source("table", {"table": "rope_3d_cos"}, "buffer")
