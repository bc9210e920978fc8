"""The engines section of a manifest: read, written, chosen from, and compared with the bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.engines import add_engines
from pid_runtime.bundle.engines import (
    check_engine_set,
    choose_engine_set,
    engine_folder,
    read_engine_sets,
    with_engine_sets,
)
from pid_runtime.bundle.folder import parse_manifest, read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from pid_runtime.bundle.sizes import sizes_for
from pid_runtime.errors import PidRuntimeError
from pid_runtime.interpreter import graph_calls

EditBundle = Callable[..., Path]
NAME = "tensorrt-rtx-1.7.1.116-sm86-sm89"


@pytest.fixture
def bundle(edit_bundle: EditBundle) -> Path:
    folder = edit_bundle()
    add_engines(folder, NAME)
    return folder


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle, verify=False)


def edited(manifest: Manifest, edit: Callable[[dict[str, Any]], object]) -> Manifest:
    """The manifest with its engine set as an edit of the JSON leaves it."""
    engines = json.loads(json.dumps(manifest.engines))
    edit(engines[NAME])
    return replace(manifest, engines=engines)


def first(engines: dict[str, Any], graph: str = "attention") -> dict[str, Any]:
    return engines["graphs"][graph][0]


# the section


def test_sets_are_read_as_they_were_written(edit_bundle: EditBundle) -> None:
    bundle = edit_bundle()
    written = add_engines(bundle, NAME)
    text = (bundle / MANIFEST_FILE).read_text()
    assert read_engine_sets(parse_manifest(text)) == {NAME: written}
    assert json.loads(text)["engines"][NAME]["graphs"]["image.0"][0]["bf16_island"] is False


def test_a_set_with_a_program_of_its_own(edit_bundle: EditBundle) -> None:
    """It makes a bundle of version 2, and is run in place of the bundle's."""
    bundle = edit_bundle()
    before = read_manifest(bundle, verify=False)
    plain, own = add_engines(bundle, "plain"), add_engines(bundle, NAME, is_lean=True)
    text = (bundle / MANIFEST_FILE).read_text()
    manifest = parse_manifest(text)
    assert read_engine_sets(manifest) == {"plain": plain, NAME: own}
    assert json.loads(text)["format_version"] == [2, 0]
    assert not json.loads(text)["engines"]["plain"].keys() & {"buffers", "program"}
    run = own.run_by(manifest)
    assert (run.program, run.buffers) == (own.program, own.buffers)
    assert run.program != before.program == manifest.program == plain.run_by(manifest).program
    without = replace(manifest, engines={"plain": manifest.engines["plain"]})
    assert without.format_version == (1, 4)


BAD_PROGRAMS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda e: e["program"].pop("step"), "program sections"),
    (lambda e: e.pop("program"), "a scratch of|an offset of"),
    (lambda e: e.update(program={}), "a scratch of|an offset of"),
    (lambda e: e.update(program=[]), "an object"),
    (lambda e: e.pop("buffers"), "buffer"),
    (lambda e: e["buffers"].pop("s"), "expected a buffer the manifest knows, but got 's'"),
    (lambda e: e["buffers"]["state"].update(kind="input"), "buffer 'state'"),
    (lambda e: e["program"]["step"].pop(), "a scratch of"),
    (lambda e: e["program"]["step"][-1]["do"][0].update(run="x"), "graph the manifest knows"),
    (lambda e: e["program"]["step"][-1].update(each="T"), "a copy of slices|to be a slice"),
    (lambda e: e["buckets"]["tiny"].update(chunk_tokens=60), "in the arena"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_PROGRAMS)
def test_bad_programs_are_refused(
    edit_bundle: EditBundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    bundle = edit_bundle()
    add_engines(bundle, NAME, is_lean=True)
    with pytest.raises(PidRuntimeError, match=message) as caught:
        read_engine_sets(edited(read_manifest(bundle, verify=False), edit))
    assert "\n" not in str(caught.value)


def test_a_set_joins_those_that_are_there(bundle: Path) -> None:
    add_engines(bundle, "other", flavor="tensorrt", version="11.4.0.106")
    sets = read_engine_sets(read_manifest(bundle, verify=False))
    assert list(sets) == [NAME, "other"]
    manifest = read_manifest(bundle, verify=False)
    fewer = replace(sets[NAME], targets=("sm86",))
    again = read_engine_sets(with_engine_sets(manifest, {NAME: fewer}))
    assert again == {NAME: fewer, "other": sets["other"]}


def test_unknown_members_and_flavours_are_ignored(manifest: Manifest) -> None:
    def edit(engines: dict[str, Any]) -> None:
        engines["colour"] = "green"
        first(engines)["colour"] = ["green"]
        engines["buckets"]["tiny"]["colour"] = 1

    assert read_engine_sets(edited(manifest, edit)) == read_engine_sets(manifest)
    later = edited(manifest, lambda engines: engines.update(flavor="photonic", graphs=7))
    assert read_engine_sets(later) == {}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.pop("version"), "a member 'version' in engines"),
        (lambda e: e.update(flavor=3), "expected a string in engines"),
        (lambda e: e.update(targets=[]), "expected targets of engines"),
        (lambda e: e.update(targets=["8.6"]), "expected targets such as sm86"),
        (lambda e: e["graphs"].update(nothing=[]), "expected graphs of the bundle"),
        (lambda e: e["buckets"].update(vast=e["buckets"]["tiny"]), "expected buckets of the"),
        (lambda e: first(e).update(file="../x"), "expected a plain file name"),
        (lambda e: first(e).update(sha256="A" * 64), "expected SHA-256 hashes"),
        (lambda e: first(e).update(bytes=-1), "expected an integer of at least 0"),
        (lambda e: first(e).update(bf16_island=0), "expected true or false"),
        (lambda e: first(e).update(attentions_fused=1), "expected at most 0 fused"),
        (lambda e: first(e).update(profiles=[]), "expected profiles of"),
        (lambda e: first(e).update(profiles=[{"L": [1, 2, 3]}]), "expected profiles over sizes"),
        (lambda e: first(e).update(profiles=[{"Q": [1, 2]}]), "expected smallest, best and"),
        (lambda e: first(e).update(profiles=[{"Q": [2, 1, 3]}]), "expected smallest, best and"),
        (lambda e: first(e).update(scratch_bytes=[1, 2]), "expected scratch per profile"),
    ],
)
def test_bad_sections_are_refused(
    manifest: Manifest, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(PidRuntimeError, match=message) as caught:
        read_engine_sets(edited(manifest, edit))
    assert "\n" not in str(caught.value)


def test_a_name_is_no_path(manifest: Manifest) -> None:
    moved = replace(manifest, engines={"../rtx": manifest.engines[NAME]})
    with pytest.raises(PidRuntimeError, match="expected a plain name"):
        read_engine_sets(moved)


# selection


def test_the_first_engine_that_holds_the_sizes_runs(manifest: Manifest) -> None:
    engines = read_engine_sets(manifest)[NAME]

    def chosen(**values: int) -> tuple[str, int]:
        engine, profile = engines.engine_for("attention", {"B": 1, **values})
        return engine.file, profile

    assert chosen(Q=1, S=76) == ("attention.tiny.engine", 0)
    assert chosen(Q=77, S=76) == ("attention.small.engine", 0)
    assert chosen(Q=1036, S=1036) == ("attention.small.engine", 0)
    with pytest.raises(PidRuntimeError) as caught:
        chosen(Q=1037, S=1036)
    assert "graph 'attention' for Q=1037, S=1036, but" in str(caught.value)
    assert "buckets tiny, small; build the bucket with pid-build --buckets" in str(caught.value)


def test_the_first_profile_that_holds_the_sizes_runs(manifest: Manifest) -> None:
    engines = read_engine_sets(manifest)[NAME]
    bands = tuple({"h": (1, 2, most), "w": (1, 2, 90 // most)} for most in (9, 30, 90))
    banded = replace(engines.graphs["latent"][0], profiles=bands, scratch_bytes=(1, 2, 3))
    engines = replace(engines, graphs={**engines.graphs, "latent": (banded,)})
    for (h, w), profile in {(9, 10): 0, (10, 3): 1, (30, 1): 1, (31, 1): 2}.items():
        assert engines.engine_for("latent", {"h": h, "w": w, "L": 9}) == (banded, profile)
    with pytest.raises(PidRuntimeError, match="graph 'latent' for h=31, w=2, but"):
        engines.engine_for("latent", {"h": 31, "w": 2, "L": 9})


def test_every_call_of_a_bucket_has_an_engine(manifest: Manifest) -> None:
    engines = read_engine_sets(manifest)[NAME]
    for name, bucket in manifest.buckets.items():
        sizes = sizes_for(manifest.network, manifest.tokens_per_latent, 5, bucket.max_tokens)
        files = {
            engines.engine_for(graph, values)[0].file
            for graph, values in graph_calls(manifest, bucket, sizes)
        }
        assert {file.removesuffix(".engine").removesuffix(f".{name}") for file in files} == set(
            manifest.graphs
        )


@pytest.mark.parametrize(
    ("versions", "target", "chosen"),
    [
        ({"tensorrt-rtx": "1.7.1.116"}, "sm86", "tensorrt-rtx"),
        ({"tensorrt-rtx": "1.7.1.116"}, "sm120", "rtx-new"),
        ({"tensorrt": "11.4.0.106"}, "sm86", "trt"),
        ({"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}, "sm86", "tensorrt-rtx"),
    ],
)
def test_the_set_for_library_and_gpu_is_chosen(
    manifest: Manifest, versions: dict[str, str], target: str, chosen: str
) -> None:
    rtx = read_engine_sets(manifest)[NAME]
    sets = {
        "tensorrt-rtx": rtx,
        "rtx-new": replace(rtx, targets=("sm120",)),
        "trt": replace(rtx, flavor="tensorrt", version="11.4.0.106"),
    }
    assert choose_engine_set(Path("b"), sets, versions, target) == chosen
    assert choose_engine_set(Path("b"), sets, versions, target, chosen) == chosen


def test_what_does_not_run_here_says_why(manifest: Manifest) -> None:
    sets = read_engine_sets(manifest)

    def refused(versions: dict[str, str], target: str, name: str | None = None) -> str:
        with pytest.raises(PidRuntimeError) as caught:
            choose_engine_set(Path("b"), sets, versions, target, name)
        return str(caught.value)

    assert refused({"tensorrt-rtx": "1.7.1.116"}, "sm120") == (
        f"expected b to have engines for tensorrt-rtx 1.7.1.116 on sm120, but {NAME} was built "
        "for sm86, sm89; build them: pid-build b --flavor tensorrt-rtx --target sm120"
    )
    assert "build them: pid-build b --flavor tensorrt --target sm90" in refused(
        {"tensorrt-rtx": "1.7.1.116"}, "sm90"
    )
    assert f"{NAME} was built by tensorrt-rtx 1.7.1.116, not 1.8.0.1" in refused(
        {"tensorrt-rtx": "1.8.0.1"}, "sm86"
    )
    missing = refused({"tensorrt": "11.4.0.106"}, "sm86", NAME)
    assert "needs the tensorrt-rtx library, which is not installed" in missing
    assert "--flavor tensorrt-rtx --target sm86" in missing
    assert "engines of b (" in refused({"tensorrt-rtx": "1.7.1.116"}, "sm86", "nothing")


def test_later_versions_run_compatible_engines(manifest: Manifest) -> None:
    engines = read_engine_sets(manifest)[NAME]
    assert engines.runs_with("1.7.1.116") and not engines.runs_with("1.7.1.117")
    compatible = replace(engines, flags={"version_compatible": True})
    for version, runs in {
        "1.7.1.116": True,
        "1.10.0.1": True,
        "1.7.1.9": False,
        "2.0": False,
    }.items():
        assert compatible.runs_with(version) is runs


# staleness


def stale(bundle: Path, manifest: Manifest, *, verify: bool = True) -> str:
    with pytest.raises(PidRuntimeError) as caught:
        check_engine_set(bundle, manifest, NAME, read_engine_sets(manifest)[NAME], verify)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(f"pid-build {bundle} --flavor tensorrt-rtx --target sm86,sm89")
    return message


def test_engines_of_the_bundle_as_it_is_are_current(bundle: Path, manifest: Manifest) -> None:
    check_engine_set(bundle, manifest, NAME, read_engine_sets(manifest)[NAME])


def test_a_changed_graph_makes_engines_stale(bundle: Path, manifest: Manifest) -> None:
    file = manifest.graphs["image.1"].file
    files = {**manifest.files, file: replace(manifest.files[file], sha256="1" * 64)}
    message = stale(bundle, replace(manifest, files=files))
    assert "graph 'image.1' (image.1.onnx) has changed since they were built" in message


def test_changed_weights_make_engines_stale(bundle: Path, manifest: Manifest) -> None:
    graph = replace(manifest.graphs["image.1"], weights_sha256="1" * 64)
    message = stale(bundle, replace(manifest, graphs={**manifest.graphs, "image.1": graph}))
    assert "the weights of graph 'image.1' have changed since they were built" in message


def test_altered_missing_and_cut_files_are_found(bundle: Path, manifest: Manifest) -> None:
    file = engine_folder(bundle, NAME) / "text.0.engine"
    blob = file.read_bytes()
    file.write_bytes(blob[:-1] + b"?")
    assert f"{file} was altered" in stale(bundle, manifest)
    check_engine_set(bundle, manifest, NAME, read_engine_sets(manifest)[NAME], verify=False)
    file.write_bytes(blob + b"?")
    for verify in (True, False):
        message = stale(bundle, manifest, verify=verify)
        assert f"{file} has {len(blob) + 1} bytes instead of {len(blob)}" in message
    file.unlink()
    assert f"{file} is missing" in stale(bundle, manifest)


def test_a_graph_without_engines_is_found(bundle: Path, manifest: Manifest) -> None:
    lacking = edited(manifest, lambda engines: engines["graphs"].pop("update"))
    assert "have none for graph 'update'" in stale(bundle, lacking)
