"""The manifest: what is read, what is refused, and that what is accepted stays in its arena."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lean_bundles import lean
from pid_export.bundle import STEP_COUNTS, ExportOptions, _buckets, _sampler, network_of
from pid_export.program import build_program
from pid_ref.config import PidConfig
from pid_ref.sampler import timesteps
from pid_runtime.backends.graphs import Call, PlannedCall, in_order
from pid_runtime.bundle import folder
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.folder import (
    MANIFEST_MAX_BYTES,
    parse_manifest,
    read_constants,
    read_manifest,
)
from pid_runtime.bundle.manifest import (
    FORMAT_VERSIONS,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Bucket,
    Buffer,
    File,
    Graph,
    Manifest,
)
from pid_runtime.bundle.manifest_check import check_manifest
from pid_runtime.bundle.sizes import ITEM_BYTES
from pid_runtime.decoder import Bundle
from pid_runtime.errors import PidRuntimeError
from pid_runtime.interpreter import even_slices

CONFIG = PidConfig(
    latent_channels=4,
    latent_hidden=8,
    latent_res_blocks=1,
    hidden_size=16,
    num_heads=2,
    patch_depth=3,
    pixel_hidden_size=4,
    pixel_attn_size=16,
    pixel_num_heads=2,
    text_dim=6,
    text_max_length=5,
)
TIMES = (timesteps(1)[0], *timesteps(4)[:-1])
BUCKETS = (("tiny", 32), ("small", 64))

Tree = dict[str, Any]
Place = tuple[str | int, ...]


def small_manifest(arbitrary_timesteps: bool = False) -> Manifest:
    """The manifest of a bundle of `CONFIG`, whose files are empty."""
    options = ExportOptions(
        buckets=BUCKETS, chunk_tokens=20, arbitrary_timesteps=arbitrary_timesteps
    )
    times = () if arbitrary_timesteps else TIMES
    program = build_program(CONFIG, "fp32", len(times) or None)
    sampler = _sampler(options, times)
    empty = File(0, "0" * 64)
    manifest = Manifest(
        producer="tests",
        model={"name": "custom"},
        precision="fp32",
        network=network_of(CONFIG),
        tokens_per_latent=2,
        sampler=sampler,
        files={WEIGHTS_FILE: empty, **{f"{name}.onnx": empty for name in program.graphs}},
        graphs={
            name: Graph(f"{name}.onnx", g.stage, g.options, g.inputs, g.outputs, 0, "0" * 64)
            for name, g in program.graphs.items()
        },
        buffers=program.buffers,
        buckets=_buckets(CONFIG, program, options, sampler.max_steps),
        program=program.sections,
    )
    check_manifest(manifest)
    return manifest


Kind = bool | Literal["lean"]
"""Whether a bundle takes any timesteps; or it takes none, and its program is lean."""

MANIFESTS: dict[Kind, Manifest] = {
    False: small_manifest(),
    True: small_manifest(arbitrary_timesteps=True),
    "lean": lean(small_manifest()),
}
TREES: dict[Kind, Tree] = {key: json.loads(each.to_json()) for key, each in MANIFESTS.items()}


def constants_of(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Zeros for every constant."""
    return {
        name: np.zeros([int(size) for size in buffer.shape], np.float32)
        for name, buffer in manifest.buffers.items()
        if buffer.kind == "constant"
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with files of the right names and hashes, though not with graphs."""
    manifest = MANIFESTS[False]
    tensors = {f"table.{name}": values for name, values in constants_of(manifest).items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    tree = copy.deepcopy(TREES[False])
    for name in manifest.files:
        path = tmp_path / name
        if name != WEIGHTS_FILE:
            path.write_bytes(name.encode())
        tree["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write(tmp_path, tree)
    return tmp_path


def write(bundle: Path, tree: Tree) -> None:
    (bundle / MANIFEST_FILE).write_text(json.dumps(tree), "utf-8")


def refuse(call: Callable[[], object], message: str | None = None) -> None:
    """Expect one line of complaint."""
    with pytest.raises(PidRuntimeError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def changed(path: str, value: Any, kind: Kind = False) -> str:
    """The small manifest as text, with the value at a path such as "sampler/steps" changed."""
    tree = copy.deepcopy(TREES[kind])
    *parents, last = path.split("/")
    node: Any = tree
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    key: Any = int(last) if isinstance(node, list) else last
    if value is DELETED:
        del node[key]
    else:
        node[key] = value
    return json.dumps(tree)


DELETED = object()

# Reading


@pytest.mark.parametrize("kind", MANIFESTS)
def test_round_trip(kind: Kind) -> None:
    manifest = MANIFESTS[kind]
    assert parse_manifest(manifest.to_json()) == manifest


def test_reads_a_bundle(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.buffers == MANIFESTS[False].buffers
    constants = read_constants(bundle, manifest)
    assert set(constants) == {"modulation", "time_embedding"}


def test_golden_bundle_reads_and_round_trips(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle)
    assert parse_manifest(manifest.to_json()) == manifest
    assert read_constants(golden_bundle, manifest)


def test_unknown_members_of_a_newer_minor_version_are_left_out() -> None:
    tree = copy.deepcopy(TREES[False])
    tree["format_version"][1] += 7
    later = {"comment": "of a later version"}
    for part in (tree, tree["sampler"], tree["files"][WEIGHTS_FILE], tree["buckets"]["tiny"]):
        part |= later
    for part in (tree["buffers"]["state"], tree["graphs"]["latent"], tree["program"]["step"][0]):
        part |= later
    assert parse_manifest(json.dumps(tree)) == MANIFESTS[False]


def test_an_older_minor_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FORMAT_VERSIONS", ((1, 5), (2, 3)))
    assert parse_manifest(json.dumps(TREES[False])) == MANIFESTS[False]


def test_version_2_is_read_and_written_where_it_is_needed_alone() -> None:
    old, new = FORMAT_VERSIONS
    tree = TREES[False] | {"format_version": new}
    manifest = parse_manifest(json.dumps(tree))
    assert manifest == MANIFESTS[False]
    assert tuple(json.loads(manifest.to_json())["format_version"]) == old == (1, 4)
    buffers = {**manifest.buffers, "later": Buffer("float8_e4m3fn", ("B", "L", 8), "temporary")}
    later = replace(manifest, buffers=buffers)
    assert tuple(json.loads(later.to_json())["format_version"]) == new == (2, 0)


@pytest.mark.parametrize("version", [[3, 0], [0, 9], [1], [1, 0, 0], "1.0", None, [True, 0], []])
def test_other_versions_are_refused(version: Any) -> None:
    refuse(lambda: parse_manifest(changed("format_version", version)), "version")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": "pid-bundle"}',
        '{"format": "another", "format_version": [1, 0]}',
        '{"format": "pid-bundle", "format_version": [1, 0]}',
        '{"format": "pid-bundle", "format_version": [1, 1' + "0" * 5000 + "]}",
    ],
)
def test_no_manifest(text: str) -> None:
    refuse(lambda: parse_manifest(text))


# Files


def test_no_bundle(tmp_path: Path) -> None:
    refuse(lambda: read_manifest(tmp_path), "expected a bundle")
    refuse(lambda: read_manifest(tmp_path / "absent"), "expected a bundle")


def test_manifest_that_is_no_text(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).write_bytes(b"\xff\xfe")
    refuse(lambda: read_manifest(bundle), "expected a bundle")


def test_manifest_of_absurd_size(bundle: Path) -> None:
    with (bundle / MANIFEST_FILE).open("r+b") as file:
        file.truncate(MANIFEST_MAX_BYTES + 1)
    refuse(lambda: read_manifest(bundle), "at most")


def test_missing_file(bundle: Path) -> None:
    (bundle / "latent.onnx").unlink()
    refuse(lambda: read_manifest(bundle), r"has no file latent\.onnx")


def test_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "latent.onnx").unlink()
    (bundle / "latent.onnx").mkdir()
    refuse(lambda: read_manifest(bundle), r"has no file latent\.onnx")


def test_truncated_file(bundle: Path) -> None:
    path = bundle / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    for verify in (False, True):
        refuse(lambda verify=verify: read_manifest(bundle, verify), "bytes, but it has")


def test_altered_file(bundle: Path) -> None:
    path = bundle / "latent.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refuse(lambda: read_manifest(bundle), "was altered")
    read_manifest(bundle, verify=False)


def test_weights_without_the_constants(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    save_file({"other": np.zeros(1, np.float32)}, bundle / WEIGHTS_FILE)
    refuse(lambda: read_constants(bundle, manifest), "cannot read constants")
    (bundle / WEIGHTS_FILE).write_bytes(b"no safetensors")
    refuse(lambda: read_constants(bundle, manifest), "cannot read constants")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_constants_of_another_shape(bundle: Path, dtype: Any) -> None:
    manifest = read_manifest(bundle)
    wrong = {f"table.{name}": np.zeros((2, 3), dtype) for name in constants_of(manifest)}
    save_file(wrong, bundle / WEIGHTS_FILE)
    refuse(lambda: read_constants(bundle, manifest), "expected constant")


# Contents: one line per check, as docs/bundle-format.md lists them

TABLE = "buffers/rope_cos/source"

REFUSED = [
    # structure
    ("producer", DELETED, "producer"),
    ("producer", 3, "a string"),
    ("precision", "fp9", "precision"),
    ("tokens_per_latent", 0, "tokens_per_latent"),
    ("tokens_per_latent", True, "an integer"),
    ("tokens_per_latent", 2.0, "an integer"),
    ("sampler", [], "an object"),
    ("buckets/tiny/arena_bytes", 2**53, "an integer"),
    ("sampler/times/0", math.nan, "NaN"),
    ("graphs/latent/options", None, "an object"),
    # files
    ("graphs/latent/file", "absent.onnx", "file"),
    ("graphs/latent/file", "../latent.onnx", "file"),
    ("files/..", {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/.hidden", {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/a\\b", {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/", {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/\ud800", {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/" + "n" * 200, {"bytes": 0, "sha256": "0" * 64}, "a plain name"),
    ("files/manifest.json", {"bytes": 0, "sha256": "0" * 64}, "does not list itself"),
    ("files/weights.safetensors", DELETED, "weights.safetensors"),
    ("files/latent.onnx/sha256", "A" * 64, "SHA-256"),
    ("files/latent.onnx/sha256", "0\n0", "SHA-256"),
    ("graphs/latent/weights_sha256", "", "SHA-256"),
    ("files/latent.onnx/bytes", -1, "an integer"),
    # network
    ("network/patch_size", DELETED, "patch_size"),
    ("network/text_max_length", 0, "text_max_length"),
    ("network/latent_channels", "4", "latent_channels"),
    ("network/text_dim", 2**40, "text_dim"),
    # sampler
    ("sampler/max_steps", 4, "as many times"),
    ("sampler/max_steps", 0, "steps"),
    ("sampler/max_steps", 10**6, "steps"),
    ("sampler/times/1", 1.5, "times in"),
    ("sampler/times/1", 0, "times in"),
    ("sampler/schedules/4/0", 5, "rows below"),
    ("sampler/schedules/4/0", 4, "descending"),
    ("sampler/schedules/4", [1, 2], "4 rows"),
    ("sampler/schedules/0", [], "rows below"),
    ("sampler/steps", 3, "schedule"),
    # buffers
    ("buffers/x.0/dtype", "float64", "dtype"),
    ("buffers/x.0/kind", "scratch", "a known kind"),
    ("buffers/x.0/shape", [], "1 to 8 axes"),
    ("buffers/x.0/shape", [1] * 9, "1 to 8 axes"),
    ("buffers/x.0/shape/2", 0, "positive sizes"),
    ("buffers/x.0/shape/2", -16, "an integer"),
    ("buffers/x.0/shape/2", 2**40, "positive sizes"),
    ("buffers/x.0/shape/2", "row", "known sizes"),
    ("buffers/x.0/shape/2", "Q", "known sizes"),
    ("buffers/x.0/shape/2", "B", "first axis"),
    ("buffers/latent", DELETED, "latent"),
    ("buffers/latent/shape/1", 5, "buffer 'latent'"),
    ("buffers/caption/dtype", "float16", "buffer 'caption'"),
    ("buffers/sigma/kind", "temporary", "buffer 'sigma'"),
    ("buffers/update/shape", [4, 3], "buffer 'update'"),
    ("buffers/state/shape/2", 3, "buffer 'state'"),
    ("buffers/image_bytes/dtype", "float32", "buffer 'image_bytes'"),
    ("buffers/x.0/kind", "input", "inputs and schedules"),
    ("buffers/modulation/source", {}, "tensor"),
    ("buffers/modulation/dtype", "float16", "float32"),
    ("buffers/modulation/shape/0", "N", "fixed shape"),
    # tables
    (f"{TABLE}/table", "rope_3d_cos", "table"),
    (f"{TABLE}/table", DELETED, "table"),
    (f"{TABLE}/theta", DELETED, "options"),
    (f"{TABLE}/more", 1, "options"),
    (f"{TABLE}/theta", 0, "usable theta"),
    (f"{TABLE}/reference", "64", "usable reference"),
    (f"{TABLE}/extent", True, "usable extent"),
    (f"{TABLE}/head_dim", 4, "head_dim"),
    (f"{TABLE}/head_dim", 10, "head_dim"),
    (f"{TABLE}/head_dim", 16, "as its table"),
    ("buffers/rope_cos/dtype", "float16", "as its table"),
    ("buffers/text_rope_cos/source/head_dim", 9, "even head_dim"),
    ("buffers/pixel_rows/source/axis", "depth", "usable axis"),
    ("buffers/pixel_rows/source/size", 6, "divisible by 4"),
    ("buffers/pixel_rows/source/patch_size", 8, "as its table"),
    # graphs and program
    ("graphs/latent/inputs/latent/dtype", "int8", "dtype"),
    ("graphs/latent/inputs/latent/shape", [], "axes"),
    ("graphs/latent/inputs/latent/shape/2", "Q", "known sizes"),
    ("graphs/latent/inputs/more", {"dtype": "float32", "shape": [1]}, "run with"),
    ("graphs/latent/outputs/latent", {"dtype": "float32", "shape": [1]}, "other outputs"),
    ("graphs/latent", DELETED, "graph"),
    ("program/step", DELETED, "program sections"),
    ("program/epilogue", [], "program sections"),
    ("program/step/0", {"loop": 3}, "run, copy, noise or each"),
    ("program/step/0", {"copy": "state", "to": "state", "noise": "x"}, "run, copy, noise or each"),
    ("program/step/0", [], "an instruction"),
    ("program/step/0/run", "absent", "graph"),
    ("program/step/0/run", {}, "a string"),
    ("program/step/0/inputs/x", "absent", "buffer"),
    ("program/step/0/inputs/x", DELETED, "run with"),
    ("program/step/0/inputs/x", 3, "an object"),
    ("program/step/0/inputs/x", {"buffer": "y.0", "start": [0]}, "start"),
    ("program/step/0/inputs/x", {"buffer": "y.0", "start": [0, 0, "B"]}, "known index"),
    ("program/step/0/inputs/x", {"buffer": "y.0", "start": [0, 0, -1]}, "an integer"),
    ("program/step/0/inputs/x", {"buffer": "y.0", "start": [0, 1, 0]}, "inside buffer"),
    ("program/step/0/inputs/x", {"buffer": "y.0", "start": [0, 0, "step"]}, "inside buffer"),
    ("program/step/0/inputs/x", "image_bytes", "to be float32"),
    ("program/step/0/outputs/q", "text_rope_cos", "one a program writes"),
    ("program/step/0/outputs/q", "update", "one a program writes"),
    ("program/step/1/chunk", "B", "cut along a size"),
    ("program/step/1/chunk", "T", "cut along T"),
    ("program/step/1/chunk", 20, "a name"),
    ("program/step/2/dims", {"Q": "row", "S": "S"}, "sizes for graph"),
    ("program/step/2/dims", {"Q": "B", "S": "S"}, "sizes for graph"),
    ("program/step/2/dims", {"Q": "S", "S": "S", "B": "L"}, "sizes for graph"),
    ("program/step/2/dims", {"S": "S"}, "known sizes"),
    ("program/step/2/dims", {"Q": "Q", "S": "S"}, "sizes for graph"),
    ("program/step/-1/copy", "noise_image", "buffer like it"),
    ("program/step/-1/to", "latent", "one a program writes"),
    ("program/prologue/2/graph", "latent", "run with"),
    ("program/prologue/2/graph", "absent", "graph"),
    ("program/prologue/2/image", "image_bytes", "noise image"),
    ("program/prologue/2/noise", "s", "state's shape"),
    ("program/prologue", [{"noise": "state", "image": "image", "graph": "patchify"}] * 2, "one"),
    ("program/image", [{"noise": "state", "image": "image", "graph": "patchify"}], "noise in"),
    # buckets
    ("buckets", {}, "a bucket"),
    ("buckets/tiny/max_tokens", 3, "4 to"),
    ("buckets/tiny/max_tokens", 2**30, "tokens"),
    ("buckets/tiny/max_tokens", 2000, "in the arena"),
    ("buckets/tiny/chunk_tokens", 0, "chunk_tokens"),
    ("buckets/tiny/chunk_tokens", 33, "chunk_tokens"),
    ("buckets/tiny/offsets/state", DELETED, "an offset"),
    ("buckets/tiny/offsets/more", 0, "an offset"),
    ("buckets/tiny/offsets/state", 128, "aligned"),
    ("buckets/tiny/offsets/state", 2**30, "in the arena"),
    ("buckets/tiny/arena_bytes", 1024, "in the arena"),
    ("buckets/tiny/arena_bytes", 10**9, "bytes or less"),
    ("buckets/tiny/arena_bytes", 2**50, "1 TiB"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_broken_manifests_are_refused(path: str, value: Any, message: str) -> None:
    refuse(lambda: parse_manifest(changed(path, value)), message)


UPDATE = "program/step/-1"
COPY = {"copy": "state", "to": "noise"}

REFUSED_LEAN = [
    ("buffers/x.1/shape", ["B", 3, "C"], "to have C first"),
    ("buffers/x.1/shape", ["B", "C", "L"], "to have C first"),
    ("buffers/x.1/shape", ["B", "C", "C"], "to have C first"),
    ("buffers/x.1/shape", ["C", "B", 16], "first axis"),
    ("buffers/pixels.1/shape", ["B", "C", 1023], "inside buffer"),
    ("buffers/x.1/shape", ["B", "C", 15], "a copy of slices"),
    ("buffers/x.1/kind", "output", "temporary"),
    ("buffers/state/shape/1", "C", "buffer 'state'"),
    ("graphs/update/inputs/pixels/shape/1", "C", "known sizes"),
    (f"{UPDATE}/each", "B", "each slice of a size"),
    (f"{UPDATE}/each", "C", "each slice of a size"),
    (f"{UPDATE}/each", "step", "each slice of a size"),
    (f"{UPDATE}/each", "T", "to be a slice"),
    (f"{UPDATE}/each", 3, "a string"),
    (f"{UPDATE}/do", DELETED, "'do'"),
    (f"{UPDATE}/do", [], "something to do"),
    (f"{UPDATE}/do", {}, "a list"),
    (f"{UPDATE}/do/0", {"each": "L", "do": [COPY]}, "run or copy"),
    (f"{UPDATE}/do/0", {"noise": "noise", "image": "image", "graph": "patchify"}, "run or copy"),
    (f"{UPDATE}/do/0/chunk", "L", "no slices of 'pixel.1'"),
    (f"{UPDATE}/do/0/dims", {"L": "S"}, "as it is"),
    (f"{UPDATE}/do/0/run", "absent", "graph"),
    (f"{UPDATE}/do/0/run", "caption", "run with"),
    (f"{UPDATE}/do/0/outputs/pixels", {"buffer": "pixels.1", "start": [0, 0, 0]}, "a slice"),
    (f"{UPDATE}/do/1/inputs/pixels", "absent", "buffer"),
    (f"{UPDATE}/do/2/copy", "x.1", "a copy of slices"),
    (f"{UPDATE}/do/2/copy", "absent", "buffer"),
    (f"{UPDATE}/do/2/to", "image", "a copy of slices"),
    (f"{UPDATE}/do/2/to", "latent", "one a program writes"),
    (f"{UPDATE}/do/2", {"copy": "image", "to": "noise_image"}, "a copy of slices"),
    ("program/step/0/inputs/x", "x.1", "to be a slice"),
    ("program/step/2", {"copy": "x.1", "to": "x.2"}, "buffer like it"),
    ("program/step/2/inputs/k", "x.1", "to be a slice"),
    ("buckets/tiny/chunk_tokens", 32, "in the arena"),
]
"""Of a lean program."""


@pytest.mark.parametrize(("path", "value", "message"), REFUSED_LEAN)
def test_broken_lean_manifests_are_refused(path: str, value: Any, message: str) -> None:
    refuse(lambda: parse_manifest(changed(path, value, "lean")), message)


@pytest.mark.parametrize("change", [{"chunk": None}, {"dims": {"Q": "L"}}])
def test_a_run_for_each_slice_may_say_what_changes_nothing(change: Tree) -> None:
    tree = copy.deepcopy(TREES["lean"])
    tree["program"]["step"][-1]["do"][0] |= change
    decode_everywhere(parse_manifest(json.dumps(tree)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sampler/schedules", {"4": [0, 1, 2, 3]}, "no schedules"),
        ("sampler/steps", 101, "up to max_steps"),
        ("buffers/timestep/shape/1", 2, "buffer 'timestep'"),
        ("program/timestep/0/inputs/timestep/start/0", "row", ""),
    ],
)
def test_broken_manifests_of_any_times(path: str, value: Any, message: str) -> None:
    text = changed(path, value, True)
    if message:
        refuse(lambda: parse_manifest(text), message)
    else:
        parse_manifest(text)


def test_shapes_are_measured_at_every_aspect_ratio() -> None:
    tree = copy.deepcopy(TREES[False])
    for size in ("Hs", "Ws", "h", "w", "H", "W"):
        # One of the two is 1 in a column of tokens, so this only shows in the other direction.
        tree["buffers"]["s"]["shape"] = ["B", size, CONFIG.hidden_size]
        refuse(lambda: parse_manifest(json.dumps(tree)))


def test_chunked_axis_comes_first() -> None:
    tree = copy.deepcopy(TREES[False])
    shape = tree["graphs"]["image.0"]["inputs"]["x"]["shape"]
    shape[1:] = reversed(shape[1:])
    refuse(lambda: parse_manifest(json.dumps(tree)), "to have L first")


# Buckets and slices


def test_the_smallest_bucket_that_holds_the_tokens() -> None:
    manifest = MANIFESTS[False]
    assert manifest.bucket_for(1)[0] == manifest.bucket_for(32)[0] == "tiny"
    assert manifest.bucket_for(33)[0] == manifest.bucket_for(64)[0] == "small"
    refuse(lambda: manifest.bucket_for(65), "at most 0.0164 megapixels")


@given(count=st.integers(1, 1 << 24), largest=st.integers(1 << 10, 1 << 24))
def test_slices_are_few_even_and_whole(count: int, largest: int) -> None:
    slices = even_slices(count, largest)
    sizes = [end - begin for begin, end in slices]
    assert slices[0][0] == 0 and slices[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(slices))
    assert len(slices) == -(-count // largest)
    assert max(sizes) <= largest and max(sizes) - min(sizes) <= 1


# What is accepted stays in its arena


class Watcher:
    """Graphs, loaded ones too, and memory that only watch where they are to read and write."""

    def __init__(self, manifest: Manifest, whole_batches: bool) -> None:
        self.manifest = manifest
        self.whole_batches = whole_batches
        self.batches_gain = False
        self.prepared: set[str] = set()

    blending = None

    def load(self) -> None:
        pass

    def memory(self) -> "Watcher":
        return self

    def graphs(self, memory: Any) -> "Watcher":
        return self

    def bucket_for(self, tokens: int) -> Bucket:
        return self.manifest.bucket_for(tokens)[1]

    def prepare(self, calls: Iterable[PlannedCall], needed_bytes: int, batch: int) -> None:
        self.prepared = {graph for graph, _ in calls}
        assert needed_bytes >= 0 and batch > 0

    def allocate(self, size_bytes: int) -> int:
        return size_bytes

    def tensor(self, block: int, offset_bytes: int, dtype: str, shape: tuple[int, ...]) -> Any:
        size = ITEM_BYTES[dtype] * math.prod(shape)
        assert offset_bytes >= 0 and size > 0 and offset_bytes + size <= block
        assert offset_bytes % ITEM_BYTES[dtype] == 0
        return dtype, shape

    def write(self, tensor: Any, source: Any) -> None:
        assert np.asarray(source).size == math.prod(tensor[1])

    def read(self, tensor: Any) -> NDArray[Any]:
        return np.zeros(tensor[1], tensor[0])

    def clone(self, tensor: Any) -> Any:
        return tensor

    def copy(self, source: Any, target: Any) -> None:
        assert source == target

    def fill_zero(self, tensor: Any) -> None:
        assert tensor[0] == "float32"

    def is_finite(self, tensor: Any) -> bool:
        assert tensor[0] == "float32"
        return True

    def fill_normal(self, tensor: Any, seed: int, draw: int, start: int = 0) -> None:
        assert tensor[0] == "float32"

    def synchronize(self) -> None:
        pass

    def bind(self, graph: str, tensors: Mapping[str, Any], scratch: Any) -> Callable[[], None]:
        known = self.manifest.graphs[graph]
        assert graph in self.prepared
        ports = {**known.inputs, **known.outputs}
        assert set(tensors) == set(ports)
        assert all(tensors[name][0] == port.dtype for name, port in ports.items())
        for name, port in ports.items() if not self.whole_batches else ():
            assert port.shape[0] != "B" or tensors[name][1][0] == 1
        return lambda: None

    def sequence(self, name: str, calls: Sequence[Call]) -> Call:
        return in_order(calls)

    def close(self) -> None:
        pass


def decode_everywhere(
    manifest: Manifest, most_steps: int = 3, *, whole_batches: bool = True
) -> None:
    """Decode the extreme shapes of every bucket, batched and not, watched.

    most_steps: of a bundle that takes any times. whole_batches: of the graphs.
    """
    network, sampler = manifest.network, manifest.sampler
    watcher = Watcher(manifest, whole_batches)
    decoder = Bundle(Path(), manifest, watcher, constants_of(manifest)).decoder()
    steps = min(sampler.max_steps, most_steps)
    times = None if sampler.times else np.linspace(1, 0, steps + 1).tolist()
    for bucket in manifest.buckets.values():
        most = bucket.max_tokens // manifest.tokens_per_latent**2
        for batch, height, width, text in (
            (1, most, 1, network["text_max_length"]),
            (2, 1, most, 1),
            (3, 1, 1, network["text_max_length"]),
        ):
            latent = np.zeros((batch, network["latent_channels"], height, width), np.float32)
            caption = np.zeros((1, text, network["text_dim"]), np.float32)
            p = network["patch_size"] * manifest.tokens_per_latent
            noise = np.zeros((batch, 3, height * p, width * p), np.float32)
            rule: Literal["sde", "ode"] = "sde" if batch == 1 else "ode"
            decoder.decode(latent, caption, times=times, rule=rule, output="uint8")
            decoder.decode(latent, caption, times=times, rule=rule, noise=noise)


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.parametrize("whole_batches", [False, True])
def test_a_valid_program_stays_in_its_arena(kind: Kind, whole_batches: bool) -> None:
    decode_everywhere(MANIFESTS[kind], most_steps=100, whole_batches=whole_batches)


def places_in(node: Any, place: Place = ()) -> list[Place]:
    """Every place in a JSON document below `place`."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    found: list[Place] = []
    for key, value in items:
        found += [(*place, key), *places_in(value, (*place, key))]
    return found


PLACES = {key: places_in(tree) for key, tree in TREES.items()}
SYMBOLS = ["B", "T", "h", "w", "Hs", "Ws", "H", "W", "L", "S", "N", "C", "row", "step", "Q"]
SCALARS = st.one_of(
    st.integers(-1, 70),
    st.sampled_from([256, 1024, 2**24, 2**31, 2**53, 10**30, 0.5, 1e308, math.nan, -1.0]),
    st.sampled_from([None, True, False, "", "..", "a/b", "fp16", "float16", "uint8", *SYMBOLS]),
    st.text(max_size=3),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A manifest with a few values deleted, replaced, moved or repeated, as text."""
    kind = draw(st.sampled_from(list(TREES)))
    tree = copy.deepcopy(TREES[kind])
    places = st.sampled_from(PLACES[kind])
    for _ in range(draw(st.integers(1, 3))):
        place, other = draw(places), draw(places)
        how = draw(st.sampled_from(["replace", "delete", "move", "repeat"]))
        value = draw(VALUES)
        try:
            node = follow(tree, place[:-1])
            if how == "replace":
                node[place[-1]] = value
            elif how == "delete":
                del node[place[-1]]
            elif how == "move":
                node[place[-1]] = copy.deepcopy(follow(tree, other))
            else:
                node.insert(place[-1], copy.deepcopy(node[place[-1]]))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change took that place away, or it is no list
    return json.dumps(tree)


def follow(node: Any, place: Place) -> Any:
    for key in place:
        node = node[key]
    return node


@settings(max_examples=60, deadline=None)
@given(text=mutated())
def test_mutated_manifests_are_refused_or_stay_in_their_arena(text: str) -> None:
    is_refused_or_stays_in_its_arena(text)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(text=mutated())
def test_a_thousand_mutated_manifests(text: str) -> None:
    is_refused_or_stays_in_its_arena(text)


def is_refused_or_stays_in_its_arena(text: str) -> None:
    try:
        manifest = parse_manifest(text)
    except PidRuntimeError:
        refuse(lambda: parse_manifest(text))
        return
    assert parse_manifest(manifest.to_json()) == manifest
    decode_everywhere(manifest)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | VALUES.map(json.dumps))
def test_any_text_is_read_or_refused(text: str) -> None:
    refuse(lambda: parse_manifest(text))


def test_steps_of_the_small_manifest() -> None:
    """The tests above visit every schedule an export knows."""
    assert set(MANIFESTS[False].sampler.schedules) == {str(steps) for steps in STEP_COUNTS}
