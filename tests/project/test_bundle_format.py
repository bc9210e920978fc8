"""docs/bundle-format.md and its schema against bundles as they are written and read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pid_ref.registry import SPACES
from pid_runtime.backends.stages import STAGES, Dimensions
from pid_runtime.bundle import manifest_check
from pid_runtime.bundle.json_reader import NAME
from pid_runtime.bundle.manifest import FORMAT_VERSIONS, MANIFEST_FILE, PRECISIONS, SECTIONS
from pid_runtime.bundle.sizes import ITEM_BYTES
from pid_runtime.bundle.source import TABLES, table_options
from places import ROOT

TEXT = (ROOT / "docs" / "bundle-format.md").read_text("utf-8")
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "bundle.schema.json").read_text("utf-8"))
VECTORS, EXAMPLE = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.S))
MACHINE_DEPENDENT = {"bytes", "sha256", "weights_sha256", "producer", "arena_bytes", "offsets"}
"""Members whose values change with the exporter's versions."""

Tree = dict[str, Any]


def complaints(manifest: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.json_path for error in validator.iter_errors(manifest)]


def manifest_of(bundle: Path) -> Tree:
    return json.loads((bundle / MANIFEST_FILE).read_text("utf-8"))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_exported_manifests_keep_to_the_schema(golden_bundle: Path, free_bundle: Path) -> None:
    for bundle in (golden_bundle, free_bundle):
        assert complaints(manifest_of(bundle)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "zip"),
        ("format_version", [3, 0]),
        ("format_version", [1]),
        ("precision", "fp9"),
        ("network", {}),
        ("tokens_per_latent", 0),
        ("sampler/times/0", 1.5),
        ("sampler/schedules/4", []),
        ("files", {}),
        ("files/..", {"bytes": 0, "sha256": "0" * 64}),
        ("files/manifest.json", {"bytes": 0, "sha256": "0" * 64}),
        ("files/latent.onnx/sha256", "0" * 63),
        ("files/latent.onnx/bytes", -1),
        ("graphs/latent/file", "../latent.onnx"),
        ("graphs/latent/inputs/latent/dtype", "int8"),
        ("graphs/latent/inputs/latent/shape", []),
        ("buffers/latent/kind", "scratch"),
        ("buffers/latent/shape/0", "Q"),
        ("buffers/latent/shape/0", "step"),
        ("buffers/latent/shape/1", 0),
        ("buffers/latent/shape/1", -16),
        ("buffers/modulation/source", {}),
        ("buffers/modulation/shape/0", "N"),
        ("buffers/rope_cos/source/head_dim", 4),
        ("buffers/rope_cos/source/table", "rope_3d_cos"),
        ("buffers/rope_cos/source/more", 1),
        ("buckets", {}),
        ("buckets/tiny/chunk_tokens", 0),
        ("buckets/tiny/offsets/state", 128),
        ("buckets/tiny/arena_bytes", 2**50),
        ("program/epilogue", []),
        ("program/step/0", {}),
        ("program/step/0", {"loop": 3}),
        ("program/step/0/copy", "state"),
        ("program/step/0/inputs/x", {"buffer": "y.0", "start": ["B"]}),
        ("program/step/0/inputs/x", {"buffer": "y.0", "start": [-1]}),
        ("program/step/0/inputs/x", 3),
        ("program/step/2/dims/Q", "row"),
        ("engines", []),
    ],
)
def test_broken_manifests_do_not(golden_bundle: Path, path: str, value: Any) -> None:
    manifest = manifest_of(golden_bundle)
    *parents, last = path.split("/")
    node: Any = manifest
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    key: Any = int(last) if isinstance(node, list) else last
    node[key] = value
    assert complaints(manifest)


@pytest.mark.parametrize("member", SCHEMA["required"])
def test_every_member_is_required(golden_bundle: Path, member: str) -> None:
    manifest = manifest_of(golden_bundle)
    del manifest[member]
    assert complaints(manifest) == ["$"]


def test_a_later_minor_version_may_add_members(golden_bundle: Path) -> None:
    manifest = manifest_of(golden_bundle)
    manifest["format_version"] = [1, 9]
    places = [manifest, manifest["sampler"], manifest["buffers"]["state"]]
    for place in [*places, manifest["program"]["step"][0], manifest["buckets"]["tiny"]]:
        place["comment"] = "of a later version"
    assert complaints(manifest) == []


def test_the_schema_says_what_the_reader_says() -> None:
    parts = SCHEMA["$defs"]
    assert parts["name"]["pattern"] == f"^{NAME.pattern}$"
    assert set(parts["dtype"]["enum"]) == set(ITEM_BYTES)
    assert parts["buffer"]["properties"]["kind"]["enum"] == list(manifest_check.BUFFER_KINDS)
    assert set(parts["size_symbol"]["enum"]) == manifest_check.BUFFER_SYMBOLS
    assert parts["size"]["maximum"] == manifest_check.LARGEST_SIZE
    assert SCHEMA["properties"]["precision"]["enum"] == list(PRECISIONS)
    assert list(SCHEMA["properties"]["program"]["properties"]) == list(SECTIONS)
    bucket = SCHEMA["properties"]["buckets"]["additionalProperties"]["properties"]
    assert bucket["arena_bytes"]["maximum"] == manifest_check.LARGEST_ARENA
    assert bucket["offsets"]["additionalProperties"]["multipleOf"] == manifest_check.ALIGNMENT
    assert SCHEMA["properties"]["sampler"]["properties"]["max_steps"]["maximum"] == (
        manifest_check.LARGEST_STEPS
    )


# The page


def test_the_page_is_about_these_versions() -> None:
    versions = " and ".join(f"{major}.{minor}" for major, minor in FORMAT_VERSIONS)
    assert TEXT.startswith(f"# The bundle format, versions {versions}\n")
    assert EXAMPLE["format_version"] == list(FORMAT_VERSIONS[0])
    assert SCHEMA["properties"]["format_version"]["prefixItems"][0]["enum"] == [
        major for major, _ in FORMAT_VERSIONS
    ]


def named() -> Iterator[str]:
    yield from (*ITEM_BYTES, *PRECISIONS, *SECTIONS, *TABLES, *STAGES)
    yield from (*manifest_check.BUFFER_KINDS, *manifest_check.INDEX_SYMBOLS)
    yield from manifest_check.BUFFER_SYMBOLS
    yield from (option for name in TABLES for option in table_options(name))
    yield from Dimensions.__dataclass_fields__
    yield from SCHEMA["properties"]


def test_everything_has_its_place_on_the_page() -> None:
    assert [name for name in sorted(set(named())) if f"`{name}`" not in TEXT] == []
    assert [space for space in SPACES if f"| {space}" not in TEXT] == []


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_vectors_are_the_golden_ones() -> None:
    golden = json.loads((ROOT / "tests" / "golden" / "philox.json").read_text("utf-8"))
    assert {key: value for key, value in golden.items() if key != "about"} == VECTORS


def test_the_example_is_part_of_a_bundle(golden_bundle: Path) -> None:
    assert unlike(EXAMPLE, manifest_of(golden_bundle)) == []


def unlike(part: Any, whole: Any, place: str = "$") -> list[str]:
    """Where `part` has something that `whole` does not; a list of instructions may have fewer."""
    if isinstance(part, dict) and isinstance(whole, dict):
        found: list[str] = []
        for key, value in part.items():
            if key in MACHINE_DEPENDENT:
                found += [] if key in whole else [f"{place}.{key}"]
            else:
                found += unlike(value, whole.get(key), f"{place}.{key}")
        return found
    if place == "$.program.step":
        return [str(instruction) for instruction in part if instruction not in whole]
    return [] if part == whole else [place]
