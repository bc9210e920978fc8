"""What runtime/cpp/tests compares with: values and judgements of Python, in files."""

import copy
import functools
import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fakes.engines import add_engines
from lean_bundles import lean_copy
from pid_export.bundle import _model
from pid_ref.registry import CHECKPOINTS
from pid_runtime.advice import advice
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.folder import parse_manifest, read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, RULES, FlowShift, Sampler
from pid_runtime.bundle.manifest_check import ALIGNMENT, LARGEST_ARENA
from pid_runtime.bundle.sizes import Sizes, sizes_for
from pid_runtime.bundle.source import Table, read_source
from pid_runtime.errors import PidRuntimeError
from pid_runtime.schedule import check_schedule
from pid_runtime.tables import compute_table
from pid_runtime.tiles import described, tiling_of
from places import ROOT

NETWORKS = {"v1": "flux_2k", "v1.5": "flux_v1pt5", "flux2": "flux2_2k"}
"""Bundles by the name of their folder, and the golden file of their network."""


@functools.cache
def manifest_tests() -> Any:
    """The module tests/runtime/bundle/test_manifest.py: its manifests, and how it breaks them."""
    return module_of("test_manifest")


@functools.cache
def module_of(tests: str) -> Any:
    """A module of tests of the bundle."""
    path = ROOT / "tests" / "runtime" / "bundle" / f"{tests}.py"
    spec = importlib.util.spec_from_file_location(f"bundle_{tests}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MESSAGES = {
    "program sections": "program",
    "options": "option",
    "an instruction": "an object",
    "a name": "a string",
    "even head_dim": "head_dim",
    "divisible by 4": "a multiple of 4",
    "NaN": "JSON",
    "a plain name": "a plain name|to be JSON",  # half a surrogate pair is no JSON to it
    "run with": "run with|an operand for",
    "rows below": "rows",
}
"""What the C++ runtime says where Python's words are others."""


def broken_manifests() -> list[dict[str, Any]]:
    """Manifests that fail a check, and what the complaint has one of."""
    tests = manifest_tests()
    found: list[dict[str, Any]] = []

    def add(name: str, text: str, message: str) -> None:
        with pytest.raises(PidRuntimeError):
            parse_manifest(text)
        messages = MESSAGES.get(message, message).split("|")
        found.append({"name": name, "text": text, "messages": messages})

    for path, value, message in tests.REFUSED:
        add(ascii(f"{path} = {value}")[:80], tests.changed(path, value), message)
    for path, value, message in (
        ("sampler/schedules", {"4": [0, 1, 2, 3]}, "no schedules"),
        ("sampler/steps", 101, "up to max_steps"),
        ("sampler/steps", 0, "up to max_steps"),
        ("buffers/timestep/shape/1", 2, "buffer 'timestep'"),
    ):
        text = tests.changed(path, value, True)
        add(f"any times: {path} = {value}", text, message)
    for path, value, message in tests.REFUSED_LEAN:
        text = tests.changed(path, value, "lean")
        add(ascii(f"lean: {path} = {value}")[:80], text, message)
    for version in ([3, 0], [0, 9], [1], [1, 0, 0], "1.0", None, [True, 0], []):
        add(f"version {version}", tests.changed("format_version", version), "version")
    for member in tests.TREES[False]:
        if member != "engines":
            add(f"no {member}", tests.changed(member, tests.DELETED), "")
    for member in ("engines", "model", "network", "files", "graphs", "buffers", "program"):
        for value in ([], None, 3, "text"):
            add(f"{member} = {value!r}", tests.changed(member, value), "")
    for size in ("Hs", "Ws", "h", "w", "H", "W"):
        text = tests.changed("buffers/s/shape", ["B", size, tests.CONFIG.hidden_size])
        add(f"a shape of {size} alone", text, "")
    shape = list(reversed(tests.TREES[False]["graphs"]["image.0"]["inputs"]["x"]["shape"][1:]))
    text = tests.changed("graphs/image.0/inputs/x/shape", ["B", *shape])
    add("the chunked axis is not the first", text, "to have L first")
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"format": "pid-bundle"}', "\x00", "\xff"):
        add(f"text {text[:20]!r}", text, "")
    return found


def valid_manifests(bundles: list[Path]) -> list[dict[str, Any]]:
    tests = manifest_tests()
    newer = copy.deepcopy(tests.TREES[False])
    newer["format_version"][1] += 7
    newer["codec"] = {"kind": "of a later version"}
    for part in (newer, newer["sampler"], newer["buffers"]["state"], newer["program"]["step"][0]):
        part["comment"] = {"of a": ["later", "version", 1.5, None]}
    next_major = tests.TREES[False] | {"format_version": [2, 1]}
    trees = [*tests.TREES.values(), newer, next_major]
    texts = [json.dumps(tree) for tree in trees]
    texts += [(bundle / MANIFEST_FILE).read_text("utf-8") for bundle in bundles]
    found: list[dict[str, Any]] = []
    for text in texts:
        manifest = parse_manifest(text)
        counts = {"buffers": len(manifest.buffers), "graphs": len(manifest.graphs)}
        counts |= {"step": len(manifest.program["step"]), "times": len(manifest.sampler.times)}
        found.append({"text": text, **counts})
    return found


def mutated_manifests(count: int) -> Iterator[dict[str, Any]]:
    """Manifests with values deleted, replaced, moved or repeated, and Python's judgement."""
    tests, choose = manifest_tests(), random.Random(0)
    scalars = [*range(-1, 20), 64, 256, 1024, 2**24, 2**31, 2**53, 0.5, -1.0, None, True, False]
    scalars += ["", "..", "a/b", "fp16", "float16", "uint8", "state", "x.0", *tests.SYMBOLS]
    values = [*scalars, [], {}, [1], ["B", "L", 16], {"buffer": "state"}]
    for number in range(count):
        kind = choose.choice(list(tests.TREES))
        tree = copy.deepcopy(tests.TREES[kind])
        name = f"{number}:"
        for _ in range(choose.randint(1, 2)):
            place, other = choose.choices(tests.PLACES[kind], k=2)
            how = choose.choice(["replace", "delete", "move", "repeat"])
            value = choose.choice(values)
            name += f" {how} {'/'.join(map(str, place))}"
            try:
                node = tests.follow(tree, place[:-1])
                if how == "replace":
                    node[place[-1]] = value
                elif how == "delete":
                    del node[place[-1]]
                elif how == "move":
                    node[place[-1]] = copy.deepcopy(tests.follow(tree, other))
                else:
                    node.insert(place[-1], copy.deepcopy(node[place[-1]]))
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # an earlier change took that place away, or it is no list
        text = json.dumps(tree)
        try:
            parse_manifest(text)
        except PidRuntimeError:
            yield {"name": name, "text": text, "refused": True}
        else:
            yield {"name": name, "text": text, "refused": False}


def engine_sets(bundle: Path, folder: Path) -> list[dict[str, Any]]:
    """Manifests with engine sets: what is read of them, or what the complaint has one of."""
    tests = module_of("test_engines")
    shutil.copytree(bundle, folder)
    add_engines(folder, "plain")
    add_engines(folder, tests.NAME, is_lean=True)
    manifest = read_manifest(folder, verify=False)
    read = [
        {
            "name": name,
            "step": len(each.run_by(manifest).program["step"]),
            "buffers": len(each.run_by(manifest).buffers),
            "arena": each.buckets["tiny"].arena_bytes,
        }
        for name, each in read_engine_sets(manifest).items()
    ]
    found: list[dict[str, Any]] = [{"text": manifest.to_json(), "sets": read}]
    bad: list[tuple[Any, str]] = tests.BAD_PROGRAMS
    for edit, message in bad:
        changed = tests.edited(manifest, edit)
        with pytest.raises(PidRuntimeError):
            read_engine_sets(changed)
        found.append(
            {"text": changed.to_json(), "messages": MESSAGES.get(message, message).split("|")}
        )
    shutil.rmtree(folder)
    return found


def tables() -> list[dict[str, Any]]:
    """Tables as Python computes them, at some sizes."""
    grids = [(1, 1, 3), (2, 3, 5), (9, 1, 1), (12, 7, 300)]
    sources: list[tuple[dict[str, Any], float]] = []
    for kind in ("cos", "sin"):
        for head_dim, reference in ((8, 64.0), (64, 64.0), (72, 128.0)):
            options = {"head_dim": head_dim, "reference": reference, "extent": 16.0, "theta": 1e4}
            sources.append(({"table": f"rope_2d_{kind}", **options}, 4e-6))
        for head_dim in (2, 64):
            source = {"table": f"rope_1d_{kind}", "head_dim": head_dim, "theta": 1e4}
            sources.append((source, 4e-5))
    for axis in ("column", "row"):
        options = {"size": 8, "patch_size": 4, "theta": 1e4}
        sources.append(({"table": "pixel_axis", "axis": axis, **options}, 1e-7))
    found: list[dict[str, Any]] = []
    for height, width, text in grids:
        named = {"h": height, "w": width, "T": text, "tokens_per_latent": 2, "patch_size": 4}
        sizes = {"Hs": 2 * height, "Ws": 2 * width, "T": text}
        for source, tolerance in sources:
            table = read_source("table", source, "a table")
            assert isinstance(table, Table)
            values = compute_table(table, Sizes(sizes)).ravel().tolist()
            found.append(
                {"source": source, "sizes": named, "values": values, "tolerance": tolerance}
            )
    return found


FREE = Sampler(4, 100, (), {})
SHIFTED = Sampler(25, 100, (), {}, "dpm++2m", 5.0, FlowShift(6.0, 2048))
KNOWN = Sampler(2, 2, (0.9, 0.4), {"1": (0,), "2": (0, 1)})


def schedules() -> list[dict[str, Any]]:
    """Schedules as Python makes them, or why it does not."""
    found: list[dict[str, Any]] = []
    cases: list[tuple[Sampler, dict[str, Any]]] = [
        (KNOWN, {}),
        (KNOWN, {"steps": 1, "rule": "dpm++2m"}),
        (KNOWN, {"steps": 3}),
        (KNOWN, {"times": (1.0, 0.5, 0.0)}),
        (FREE, {}),
        (FREE, {"steps": 2}),
        (FREE, {"times": (0.5, 0.0), "steps": 2}),
        (replace(FREE, max_steps=1), {"times": (0.5, 0.2, 0.0)}),
        *((FREE, {"times": (1.0, 0.866, 0.3, 0.0), "rule": rule}) for rule in RULES),
        *((FREE, {"times": times}) for times in ((0.5, 0.7, 0.0), (1.5, 0.0), (0.5, 0.1))),
        (SHIFTED, {}),
        (SHIFTED, {"steps": 7, "size": (2048, 2048)}),
        (SHIFTED, {"steps": 100, "size": (4096, 1024), "rule": "sde"}),
        (SHIFTED, {"steps": 1}),
        (SHIFTED, {"steps": 101}),
        (SHIFTED, {"times": (0.97, 0.7, 0.3, 0.0)}),
    ]
    for sampler, options in cases:
        given = {**options, "sampler": asdict(sampler)}
        if "rule" in options:
            given["rule"] = RULES.index(options["rule"])  # those of pid_rule
        try:
            made = check_schedule(sampler, **options)
        except PidRuntimeError as error:
            found.append({**given, "message": str(error)})
            continue
        wanted = {
            "rows": made.rows,
            "rule": made.rule,
            "times": made.times,
            "moments": [] if made.moments is None else made.moments[:, 0].tolist(),
            "mixes": made.mixes.tolist(),
            "predictions": made.predictions.tolist(),
            "updates": made.updates.tolist(),
        }
        found.append({**given, "wanted": wanted})
    return found


def tilings() -> list[dict[str, Any]]:
    """How Python cuts pictures, or why it does not."""
    base = manifest_tests().MANIFESTS[False]
    network = {**base.network, "patch_size": 16, "text_max_length": 12, "text_dim": 32}
    (bucket,) = list(base.buckets.values())[:1]
    found: list[dict[str, Any]] = []

    def add(max_tokens: int, height: int, width: int, tile: Any, **more: Any) -> None:
        overlap = more.pop("overlap", None)
        manifest = replace(
            base,
            model=more,
            network=network,
            tokens_per_latent=2,
            buckets={"only": replace(bucket, max_tokens=max_tokens)},
        )
        given = {"max_tokens": max_tokens, "height": height, "width": width, **more}
        given["tile"] = {"auto": (-1, -1), None: (0, 0)}.get(tile, tile)
        if overlap is not None:
            given["overlap"] = overlap
        try:
            tiling = tiling_of(manifest, height, width, tile, overlap)
        except PidRuntimeError as error:
            found.append({**given, "message": str(error)})
            return
        wanted = tiling and {
            "latent": tiling.latent,
            "rows": tiling.rows.starts,
            "columns": tiling.columns.starts,
            "reason": tiling.reason,
            "text": described(tiling, 32),
            "weights": tiling.rows.weights(len(tiling.rows.starts) - 1, 3).tolist(),
        }
        found.append({**given, "wanted": wanted})

    add(18_816, 128, 128, (2176, 2176), overlap=256)
    add(18_816, 60, 60, (640, 640))
    add(1024, 8, 6, (192, 256))
    add(1024, 16, 16, "auto")
    add(1024, 16, 16, None)
    for height, width in ((17, 16), (40, 40), (16, 200), (511, 30), (512, 512), (100, 100)):
        for overlap in (0, 96, 200, 7 * 32, None):
            add(1024, height, width, "auto", overlap=overlap)
    for tile, overlap in (
        ((288, 32), None),
        ((100, 64), None),
        ((0, 64), None),
        ((-1, 64), None),
        ((64, 64), 32),
        ((128, 128), None),
        ((128, 128), 20),
        ((128, 128), -32),
        (None, 32),
    ):
        add(1024, 8, 8, tile, overlap=overlap)
    add(1024, 40, 40, (640, 640))
    add(1024, 1, 513, "auto")
    for overlap in (0, 32):  # tiles of one pixel of the latent, and none
        add(4, 3, 5, "auto", overlap=overlap)
    sizes = [[2048, 2048], [2688, 1536], [1536, 2688], [2304, 1728], [1000, 1000]]
    for side in (32, 64, 65, 128, 200):
        add(65_536, side, side, "auto", trained_sizes=sizes, variant="2k")
    for variant in ("2k", "2kto4k"):
        add(65_536, 128, 128, "auto", trained_sizes=[[3584, 3584]], variant=variant)
    return found


def edited(bundle: Path, copy_to: Path, edit: Callable[[Any], object]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle, copy_to)
    path = copy_to / MANIFEST_FILE
    tree = json.loads(path.read_text("utf-8"))
    edit(tree)
    path.write_text(json.dumps(tree), "utf-8")
    return copy_to


def bucket_of(tree: Any, tokens: int) -> dict[str, Any]:
    """A bucket of a manifest, in which every buffer has a place of its own."""
    manifest = parse_manifest(json.dumps(tree))
    sizes = sizes_for(
        manifest.network, manifest.tokens_per_latent, manifest.sampler.max_steps, tokens
    )
    row = sizes.extended({"h": "w", "w": "h", "Hs": "Ws", "Ws": "Hs", "H": "W", "W": "H"})
    offsets: dict[str, int] = {}
    end = 0
    for name, buffer in manifest.buffers.items():
        offsets[name] = end
        size = max(each.bytes(buffer.dtype, buffer.shape) for each in (sizes, row))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    tokens_and_bytes = {"max_tokens": tokens, "chunk_tokens": tokens, "arena_bytes": end}
    return {**tokens_and_bytes, "offsets": offsets}


def huge_bucket(tree: Any) -> dict[str, Any]:
    """A bucket that holds so much that a batch of 512 has no address."""
    tokens = 1 << 24
    while (bucket := bucket_of(tree, tokens))["arena_bytes"] > LARGEST_ARENA:
        tokens //= 2
    assert 512 * bucket["arena_bytes"] > 1 << 47
    return bucket


def make_huge(tree: Any) -> None:
    """Let that be the only bucket."""
    tree["buckets"] = {"huge": huge_bucket(tree)}


def make_short(tree: Any) -> None:
    """Let no other bucket hold more than 2 x 2 pixels of the latent."""
    tree["buckets"] = {"tiny": bucket_of(tree, 16), "huge": huge_bucket(tree)}


def advice_cases() -> list[dict[str, Any]]:
    """Models and sizes, and what Python says of them."""
    models: list[dict[str, Any]] = [
        {},
        {"variant": "2kto4k", "variants": "2k"},
        {"trained_sizes": [[64, 64]], "scale": 4.5},
    ]
    models += (_model(each.config, each, {}) for each in CHECKPOINTS.values())
    sizes = [(2048, 2048), (4096, 4096), (4864, 4864), (3072, 4096), (2688, 1792), (512, 2048)]
    return [
        {
            "model": model,
            "width": width,
            "height": height,
            "sigma": sigma,
            "has_caption": has_caption,
            "lines": advice(model, (width, height), sigma, has_caption=has_caption),
        }
        for model in models
        for width, height in sizes
        for sigma, has_caption in ((0.5, True), (0.875, False))
    ]


def write_data(
    folder: Path, golden_bundle: Path, free_bundle: Path, export_network: Callable[..., Path]
) -> None:
    """Write all of it, and the bundles that both runtimes decode."""
    shutil.copytree(golden_bundle, folder / "v1")
    shutil.copytree(free_bundle, folder / "any_times")
    for name, network in NETWORKS.items():
        if name != "v1":
            export_network(folder / "exported", network).rename(folder / name)
    lean_copy(golden_bundle, folder / "lean", 5)
    edited(golden_bundle, folder / "huge", make_huge)

    def exchange(tree: Any) -> None:
        tree["graphs"]["unpatchify"]["file"] = tree["graphs"]["latent"]["file"]
        tree["graphs"]["unpatchify"].pop("contrib_file", None)

    edited(golden_bundle, folder / "wrong_graph", exchange)
    edited(golden_bundle, folder / "short", make_short)

    def shift(tree: Any) -> None:
        tree["sampler"] |= {"rule": "dpm++2m", "guidance": 5, "steps": 6}
        tree["sampler"]["flow_shift"] = {"shift": 6.0, "size": 2048}

    edited(free_bundle, folder / "undistilled", shift)
    bundles = [
        folder / name
        for name in (*NETWORKS, "any_times", "lean", "huge", "short", "undistilled", "wrong_graph")
    ]
    for name, content in (
        ("valid_manifests", valid_manifests(bundles)),
        ("broken_manifests", broken_manifests()),
        ("engine_sets", engine_sets(golden_bundle, folder / "engines")),
        ("tables", tables()),
        ("advice", advice_cases()),
        ("schedules", schedules()),
        ("tilings", tilings()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    with (folder / "mutated_manifests.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in mutated_manifests(400))
