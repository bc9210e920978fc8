"""`pid-build` with TensorRT for RTX, which builds without a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
from filelock import FileLock

from lean_bundles import in_slices, largest_sizes
from pid_engines import build, flavors
from pid_engines import profiles as profiling
from pid_engines import tasks as planning
from pid_engines.attention_graph import attention_graph
from pid_engines.build import build_engines
from pid_engines.builder_log import BuilderReport
from pid_engines.child import Child
from pid_engines.cli import main
from pid_engines.engine_set import make_set
from pid_engines.errors import BuildError, BuildInputError
from pid_engines.flavors import find_flavor
from pid_engines.lean import lean_program
from pid_engines.options import BuildOptions, with_plan
from pid_engines.processes import build_all, request_of
from pid_engines.profiles import FEWEST_FP8_KEYS, EnginePlan
from pid_engines.tasks import Task, current_engines, plan_tasks
from pid_engines.worker import BuildResult
from pid_export.arena import Lifetime, lifetimes
from pid_runtime.bundle.engines import (
    EngineSet,
    check_engine_set,
    engine_folder,
    read_engine_sets,
    with_engine_sets,
)
from pid_runtime.bundle.files import file_sha256
from pid_runtime.bundle.flavors import FLAVORS, Flavor
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import SECTIONS, Graph, Manifest, Port, runs_of
from pid_runtime.errors import PidRuntimeError

pytest.importorskip(
    "tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'pid-trt[tensorrt-rtx]'"
)

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]

ARGUMENTS = ("--buckets", "tiny", "--target", "sm89")
"""One bucket and one target: the least there is to build."""


class Built(NamedTuple):
    """A bundle with engines, and what the command that built them printed."""

    bundle: Path
    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        return engine_folder(self.bundle, self.result["engines"])


@pytest.fixture(scope="module")
def built_once(bf16_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The bundle with engines for `ARGUMENTS`: not to be changed."""
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(bf16_bundle, bundle)
    run = subprocess.run(
        [*COMMAND, str(bundle), *ARGUMENTS, "--json"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return Built(bundle, json.loads(run.stdout))


COMMAND = (
    sys.executable,
    "-c",
    "import sys; from pid_engines.cli import main; sys.exit(main(sys.argv[1:]))",
)


@pytest.fixture
def built(built_once: Built, tmp_path: Path) -> Built:
    """A copy of it to be changed."""
    shutil.copytree(built_once.bundle, tmp_path / "bundle")
    return Built(tmp_path / "bundle", built_once.result)


@pytest.fixture
def copy(bf16_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without engines, to be changed."""
    shutil.copytree(bf16_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def options() -> BuildOptions:
    flavor, version = find_flavor("tensorrt-rtx")
    return BuildOptions(flavor, version, ("sm89",), ("tiny",))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def edit_graph(bundle: Path, graph: str, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph's ONNX file, and its hash in the manifest."""
    path = bundle / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    file = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    edit_manifest(bundle, lambda fields: fields["files"].update({path.name: file}))


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a bundle, but for logs and the lock, which stay behind."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log" and path.name != ".lock"
    }


# What is built


def test_result_and_manifest_say_the_same(built_once: Built) -> None:
    bundle, result = built_once
    manifest = read_manifest(bundle)
    name = result["engines"]
    assert name == f"tensorrt-rtx-{result['version']}-sm89"
    engines = read_engine_sets(manifest)[name]
    check_engine_set(bundle, manifest, name, engines)
    assert set(engines.graphs) == set(manifest.graphs)
    assert (engines.flavor, engines.targets) == ("tensorrt-rtx", ("sm89",))
    tiny = engines.buckets["tiny"]
    scratch = [size for each in engines.graphs.values() for e in each for size in e.scratch_bytes]
    weights = [e.weights_bytes for each in engines.graphs.values() for e in each]
    assert tiny.scratch_bytes == max(scratch) and tiny.weights_bytes == sum(weights)
    assert tiny.buffers_bytes == manifest.buckets["tiny"].arena_bytes
    assert tiny.buffers_bytes <= tiny.arena_bytes <= tiny.buffers_bytes + tiny.scratch_bytes
    peak = tiny.weights_bytes + tiny.arena_bytes
    assert tiny.peak_device_bytes == peak and result["peak_device_bytes"] == {"tiny": peak}
    joint, pixel = manifest.network["patch_depth"], manifest.network["pixel_depth"]
    assert result["attentions_fused"] == [joint + pixel, joint + pixel]
    assert 0 < result["seconds"] < 600 and result["peak_rss_bytes"] > 1e8
    stages = {stage["file"]: stage for stage in result["stages"]}
    for each in engines.graphs.values():
        for engine in each:
            stage = stages.pop(engine.file)
            assert stage["weights_bytes"] == engine.weights_bytes and not stage["reused"]
            assert stage["scratch_bytes"] == {"tiny": max(engine.scratch_bytes)}
            assert stage["seconds"] == engine.seconds > 0
    assert stages == {}


def test_weights_of_engines_are_those_of_the_graphs(built_once: Built) -> None:
    manifest = read_manifest(built_once.bundle)
    for graph, engines in read_engine_sets(manifest)[built_once.result["engines"]].graphs.items():
        want = manifest.graphs[graph].weights_bytes
        assert sum(engine.weights_bytes for engine in engines) >= want


def test_files_of_a_build(built_once: Built) -> None:
    names = {stage["file"] for stage in built_once.result["stages"]}
    assert {path.name for path in built_once.folder.iterdir()} == {*names, "logs"}
    logs = {path.stem for path in (built_once.folder / "logs").iterdir()}
    assert logs == {Path(name).stem for name in names}
    own = set(tree(built_once.bundle)) - {
        str((built_once.folder / name).relative_to(built_once.bundle)) for name in names
    }
    assert own == {*read_manifest(built_once.bundle).files, "manifest.json"}


def test_engines_have_the_ports_of_the_manifest(built_once: Built) -> None:
    """As the builder lists them when an engine is done."""
    manifest = read_manifest(built_once.bundle)
    engines = read_engine_sets(manifest)[built_once.result["engines"]].graphs
    dtypes = {"Float": "float32", "BFloat16": "bfloat16", "UInt8": "uint8"}
    for name, graph in manifest.graphs.items():
        (engine,) = engines[name]
        log = (built_once.folder / "logs" / engine.file).with_suffix(".log").read_text()
        listed = log.partition("I/O Tensors:")[2].splitlines()
        found = {line.split(",")[0].split()[1]: line for line in listed if "IOMode:" in line}
        ports = {**graph.inputs, **graph.outputs}
        assert set(found) == set(ports)
        # A profile may be as narrow as one size: the smallest bands of the latent are.
        narrow = any(sizes[0] == sizes[2] for each in engine.profiles for sizes in each.values())
        for port_name, port in ports.items():
            fields = dict(part.split(": ", 1) for part in found[port_name].strip().split(", "))
            assert dtypes[fields["DataType"]] == port.dtype
            for got, want in zip(json.loads(fields["Dimensions"]), port.shape, strict=True):
                if isinstance(want, int) or want == "B":
                    assert got == (1 if want == "B" else want)
                else:
                    assert got == -1 or narrow


def test_a_table_for_people(built: Built, run_command: RunCommand) -> None:
    code, out, err = run_command(main, built.bundle, *ARGUMENTS, "--quiet")
    assert (code, err) == (0, "")
    assert "attention.tiny" in out and "1 of 1" in out and "arena of both" in out
    last = out.splitlines()[-1]
    count = len(built.result["stages"])
    assert f"{count} engines" in last and f"{count} were there already" in last


def test_several_targets_and_a_graph_without_sizes(free_bundle: Path, tmp_path: Path) -> None:
    """The network of free timesteps has a graph without any symbol; it needs no profile."""
    manifest = read_manifest(free_bundle)
    graph = manifest.graphs["timestep"]
    plan = EnginePlan("timestep", "timestep", ({},), (frozenset({"tiny"}),))
    task = Task(plan, "", (), (), False, None)
    flavor, version = find_flavor("tensorrt-rtx")
    several = BuildOptions(flavor, version, ("sm86", "sm89", "sm120"))
    report, result = build_alone(free_bundle, manifest, several, task, tmp_path)
    assert report.weights_bytes >= graph.weights_bytes and len(report.scratch_bytes) == 1
    assert (tmp_path / "timestep.engine").stat().st_size == result.bytes


def build_alone(
    bundle: Path, manifest: Manifest, options: BuildOptions, task: Task, folder: Path
) -> tuple[BuilderReport, BuildResult]:
    """Build one engine into a folder."""
    logs = engine_folder(bundle, options.set_name) / "logs"
    existed = (bundle / "engines").exists()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done: list[float] = []
        results = build_all(bundle, manifest, options, [task], folder, done.append)
    finally:
        if not existed:
            shutil.rmtree(bundle / "engines")
    assert sum(done) == pytest.approx(1)
    return results[task.file]


# The gates


def half_manifest(bundle: Path, tokens: int) -> Manifest:
    """The bundle as if it were in float16, with a bucket `huge` of so many tokens."""
    manifest = read_manifest(bundle)

    def half(ports: dict[str, Port]) -> dict[str, Port]:
        return {
            name: replace(port, dtype=port.dtype.replace("bfloat16", "float16"))
            for name, port in ports.items()
        }

    graphs = {
        name: replace(graph, inputs=half(graph.inputs), outputs=half(graph.outputs))
        for name, graph in manifest.graphs.items()
    }
    huge = replace(manifest.buckets["tiny"], max_tokens=tokens)
    return replace(manifest, precision="fp16", graphs=graphs, buckets={"huge": huge})


def test_half_precision_has_a_bf16_island_where_it_overflows(
    bf16_bundle: Path, options: BuildOptions, tmp_path: Path
) -> None:
    text = read_manifest(bf16_bundle).network["text_max_length"]
    options = replace(options, buckets=("huge",))
    for keys, island in ((65_504, False), (65_505, True)):
        manifest = half_manifest(bf16_bundle, keys - text)
        tasks = {task.plan.graph: task for task in plan_tasks(bf16_bundle, manifest, options)}
        islands = {name for name, task in tasks.items() if task.bf16_island}
        assert islands == ({"attention"} if island else set())
        report, _ = build_alone(bf16_bundle, manifest, options, tasks["attention"], tmp_path)
        assert report.attentions_fused == 1
        log = engine_log(tasks["attention"], bf16_bundle, manifest, options, tmp_path)
        kernel = next(line for line in log.splitlines() if line.startswith("Name: _gemm_mha"))
        assert ("Datatype: BFloat16" in kernel) == island
        assert ("Datatype: Half" in kernel) != island


def engine_log(
    task: Task, bundle: Path, manifest: Manifest, options: BuildOptions, folder: Path
) -> str:
    """What the builder says while it builds an engine."""
    request = request_of(bundle, manifest, options, task, folder)
    log = folder / "log"
    with Child([sys.executable, "-m", "pid_engines.worker"], log=log) as child:
        child.ask(asdict(request))
        child.end()
    return log.read_text()


def test_an_island_needs_bfloat16(bf16_bundle: Path, options: BuildOptions) -> None:
    manifest = half_manifest(bf16_bundle, 66_000)
    old = replace(options, targets=("sm75", "sm89"), buckets=("huge",))
    with pytest.raises(BuildInputError, match=r"at most 65504 keys .* sm75 has none"):
        plan_tasks(bf16_bundle, manifest, old)
    assert plan_tasks(bf16_bundle, half_manifest(bf16_bundle, 60_000), old)


@pytest.mark.slow
def test_fp8_multiplies_8_bit_numbers(
    fp8_bundle: Path, options: BuildOptions, tmp_path: Path
) -> None:
    manifest = read_manifest(fp8_bundle)
    tasks = {task.plan.graph: task for task in plan_tasks(fp8_bundle, manifest, options)}
    for name, fused, products in (("attention", 1, 2), ("image.1", 0, 6)):
        task = tasks[name]
        assert len(task.rounded_products) == products
        report, _ = build_alone(fp8_bundle, manifest, options, task, tmp_path)
        assert report.attentions_fused == fused and report.products_not_fp8 == ()
    (profile,) = tasks["attention"].plan.profiles
    assert profile["S"][0] == FEWEST_FP8_KEYS and profile["Q"][0] == 1


@pytest.mark.slow
def test_fp8_products_in_other_numbers_are_refused(
    fp8_bundle: Path, options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(fp8_bundle)
    tasks = {task.plan.graph: task for task in plan_tasks(fp8_bundle, manifest, options)}
    monkeypatch.setattr(profiling, "FEWEST_FP8_KEYS", 1)  # not fused then
    low = {task.plan.graph: task for task in plan_tasks(fp8_bundle, manifest, options)}
    with pytest.raises(BuildError, match="fuse every attention"):
        build_alone(fp8_bundle, manifest, options, low["attention"], tmp_path)
    image = replace(tasks["image.1"], rounded_products=("node_matmul", "node_of_none"))
    with pytest.raises(BuildError, match=r"8-bit numbers in all 2 .* not in node_of_none; see"):
        build_alone(fp8_bundle, manifest, options, image, tmp_path)


def test_fp8_needs_a_gpu_that_has_it(fp8_twin: Path, options: BuildOptions) -> None:
    old, manifest = replace(options, targets=("sm86", "sm89")), read_manifest(fp8_twin)
    with pytest.raises(BuildInputError, match=r"from sm89 on for an fp8 bundle, but got sm86"):
        plan_tasks(fp8_twin, replace(manifest, precision="fp8"), old)
    plan_tasks(fp8_twin, replace(manifest, precision="fp8"), options)
    with pytest.raises(BuildInputError, match=r"fp16, fp8 or int8, but got fp8-fp32"):
        plan_tasks(fp8_twin, read_manifest(fp8_twin), options)


def test_attention_in_float32_is_not_fused(
    built: Built, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real build that must fail: attention in float32 is a product, a softmax and a product."""

    def in_float32(graph: Graph, *, bf16_island: bool = False) -> bytes:
        model = onnx.load_from_string(attention_graph(graph, bf16_island=True))
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and node.name != "out":
                    attribute.i = onnx.TensorProto.FLOAT
        return model.SerializeToString()

    monkeypatch.setattr(planning, "attention_graph", in_float32)
    forget(built, "attention")
    before = tree(built.bundle)
    with pytest.raises(BuildError, match=r"fuse every attention of .* fused 0 of 1; see .*\.log"):
        build_engines(built.bundle, options)
    assert tree(built.bundle) == before
    done = build_engines(built.bundle, replace(options, allow_unfused=True))
    tiny = done.engines.buckets["tiny"]
    assert tiny.attentions_fused < tiny.attentions
    with pytest.raises(BuildError, match="fuse every attention"):  # not even if it is there already
        build_engines(built.bundle, options)


def forget(built: Built, graph: str) -> None:
    """Make the manifest forget a graph's engines, so that these are built again."""
    edit_manifest(
        built.bundle, lambda raw: raw["engines"][built.result["engines"]]["graphs"].pop(graph)
    )


def fix_length(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 12


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "text"
    for node in model.graph.node:
        node.input[:] = ["text" if name == "caption" else name for name in node.input]


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (fix_length, "expected caption as float32 [B, T, 32], but got float32 [-1, 12, 32]"),
        (rename_input, "expected inputs caption, but got text"),
    ],
)
def test_other_ports_than_the_manifests(
    built: Built, options: BuildOptions, edit: Callable[[onnx.ModelProto], None], part: str
) -> None:
    edit_graph(built.bundle, "caption", edit)
    before = tree(built.bundle)
    with pytest.raises(BuildError) as error:
        build_engines(built.bundle, options)
    assert part in str(error.value) and "caption.log" in str(error.value)
    assert tree(built.bundle) == before


# What is there already


def test_nothing_is_built_twice(built: Built, run_command: RunCommand) -> None:
    before = tree(built.bundle)
    code, out, _ = run_command(main, built.bundle, *ARGUMENTS, "--json")
    result = json.loads(out)
    assert code == 0 and all(stage["reused"] for stage in result["stages"])
    assert tree(built.bundle) == before
    for same in ("peak_device_bytes", "attentions_fused", "buckets", "engines"):
        assert result[same] == built.result[same]


def test_altered_engines_are_built_again(built: Built, options: BuildOptions) -> None:
    altered, missing = built.folder / "patchify.tiny.engine", built.folder / "attention.tiny.engine"
    content = altered.read_bytes()
    altered.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    missing.unlink()
    (built.folder / "other.engine").write_bytes(b"of an earlier build")
    done = build_engines(built.bundle, options)
    assert set(done.plans) - done.reused == {altered.name, missing.name}
    assert not (built.folder / "other.engine").exists()
    manifest = read_manifest(built.bundle)
    check_engine_set(built.bundle, manifest, done.set_name, done.engines)


def test_force(built: Built, options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def plan(*arguments: Any) -> list[Task]:
        return [task for task in real(*arguments) if task.plan.graph == "patchify"]

    real = plan_tasks
    monkeypatch.setattr(build, "plan_tasks", plan)
    monkeypatch.setattr(build, "with_engine_sets", lambda manifest, _: manifest)
    monkeypatch.setattr(build, "_remove_others", lambda folder, names: asked.extend(names))
    assert build_engines(built.bundle, options).reused == {"patchify.tiny.engine"}
    assert build_engines(built.bundle, replace(options, force=True)).reused == set()
    assert asked == ["patchify.tiny"] * 2


def test_unreadable_engines_are_an_error_unless_forced(built: Built, options: BuildOptions) -> None:
    manifest = read_manifest(built.bundle)
    broken = replace(manifest, engines={"old": {"flavor": "tensorrt-rtx", "targets": "all"}})
    with pytest.raises(PidRuntimeError, match="old"):
        build._without_unreadable_sets(broken, force=False)
    assert build._without_unreadable_sets(broken, force=True).engines == {}
    assert build._without_unreadable_sets(manifest, force=True) is manifest


@pytest.mark.parametrize(
    ("edit", "stale"),
    [
        (lambda e: None, 0),
        (lambda e: e.update(version="1.7.1.117"), None),
        (lambda e: e["flags"].update(opt_level=5), None),
        (lambda e: first(e)["profiles"][0].update(Q=[1, 2, 1 << 20]), 1),
        (lambda e: first(e).update(bf16_island=True), 1),
        (lambda e: first(e).update(key="0" * 64), 1),
    ],
)
def test_an_edited_section_makes_engines_stale(
    built_once: Built,
    options: BuildOptions,
    edit: Callable[[dict[str, Any]], object],
    stale: int | None,
) -> None:
    """Those are built again; all of them where it is None."""
    manifest = read_manifest(built_once.bundle)
    engines = json.loads(json.dumps(manifest.engines))
    edit(engines[options.set_name])
    old = read_engine_sets(replace(manifest, engines=engines))[options.set_name]
    tasks = plan_tasks(built_once.bundle, manifest, options)
    found = current_engines(manifest, built_once.folder, old, tasks, allow_unfused=False)
    wanted = {task.file: task.key for task in tasks}
    assert all(engine.key == wanted[file] for file, engine in found.items())
    assert len(tasks) - len(found) == (len(tasks) if stale is None else stale)


def first(engines: dict[str, Any]) -> dict[str, Any]:
    return engines["graphs"]["attention"][0]


def other_graph(manifest: Manifest) -> Manifest:
    file = replace(manifest.files["image.1.onnx"], sha256="0" * 64)
    return replace(manifest, files={**manifest.files, "image.1.onnx": file})


def other_weights(manifest: Manifest) -> Manifest:
    graph = replace(manifest.graphs["image.1"], weights_sha256="0" * 64)
    return replace(manifest, graphs={**manifest.graphs, "image.1": graph})


def other_chunk(manifest: Manifest) -> Manifest:
    bucket = replace(manifest.buckets["tiny"], chunk_tokens=32)
    return replace(manifest, buckets={**manifest.buckets, "tiny": bucket})


@pytest.mark.parametrize(
    ("edit", "change", "stale"),
    [
        (None, {}, 0),
        (other_graph, {}, 1),
        (other_weights, {}, 1),
        (other_chunk, {}, None),
        (lambda manifest: replace(manifest, precision="fp16"), {}, 99),
        (None, {"version": "1.7.1.117"}, 99),
        (None, {"targets": ("sm86",)}, 99),
        (None, {"targets": ("sm86", "sm89")}, 99),
        (None, {"buckets": ("small",)}, 99),
        (None, {"opt_level": 4}, 99),
        (None, {"workspace_bytes": 1 << 30}, 99),
        (None, {"flavor": FLAVORS["tensorrt"]}, 99),
    ],
)
def test_keys_cover_all_an_engine_is_built_from(
    bf16_bundle: Path,
    options: BuildOptions,
    edit: Callable[[Manifest], Manifest] | None,
    change: dict[str, Any],
    stale: int | None,
) -> None:
    manifest = read_manifest(bf16_bundle, verify=False)
    before = [task.key for task in plan_tasks(bf16_bundle, manifest, options)]
    edited = edit(manifest) if edit else manifest
    after = [task.key for task in plan_tasks(bf16_bundle, edited, replace(options, **change))]
    different = sum(a != b for a, b in zip(before, after, strict=True))
    if change.get("buckets"):  # engines for the text do not depend on the bucket
        assert different == len(before) - sum(
            name.startswith(("text", "caption")) for name in manifest.graphs
        )
    elif stale is None:
        assert different == sum(
            task.plan.profiles == ({"L": (1, 32, 32)},)
            for task in plan_tasks(bf16_bundle, edited, options)
        )
    else:
        assert different == (len(before) if stale == 99 else stale)


def test_other_buckets_replace_the_engines(
    built: Built, options: BuildOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not depend on the bucket stays; what nothing refers to any more goes."""

    def copy_bucket(fields: dict[str, Any]) -> None:
        fields["buckets"]["wee"] = fields["buckets"]["tiny"]

    edit_manifest(built.bundle, copy_bucket)
    assert (built.folder / "patchify.tiny.engine").exists()
    done = build_engines(built.bundle, replace(options, buckets=("wee",)))
    assert set(done.plans) - done.reused == {
        f"{graph}.wee.engine"
        for graph, described in read_manifest(built.bundle).graphs.items()
        if described.weights_bytes == 0
    }
    assert not (built.folder / "patchify.tiny.engine").exists()
    assert (built.folder / "patchify.wee.engine").exists()
    assert set(done.engines.buckets) == {"wee"}
    assert "the engines of bucket tiny are replaced by those of wee" in caplog.text
    assert "build --buckets tiny,wee" in caplog.text
    caplog.clear()
    build_engines(built.bundle, replace(options, buckets=("tiny", "wee")))
    assert "are replaced" not in caplog.text


# Several at once, and ends that come early


def test_a_second_builder_waits(
    built: Built, options: BuildOptions, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[build.Build] = []
    thread = threading.Thread(target=lambda: done.append(build_engines(built.bundle, options)))
    with caplog.at_level("INFO"), FileLock(built.bundle / "engines" / ".lock"):
        thread.start()
        for _ in range(600):
            if "waiting for it to end" in caplog.text:
                break
            time.sleep(0.1)
        assert "another pid-build works on" in caplog.text and done == []
    thread.join(60)
    assert len(done) == 1 and len(done[0].reused) == len(done[0].plans)


def with_library(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Give the building processes another `tensorrt_rtx`; this process keeps the real one."""
    (folder / "lib").mkdir()
    (folder / "lib" / "tensorrt_rtx.py").write_text(code)
    paths = [str(folder / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import os; os.abort()", "the builder crashed (SIGABRT)"),
        ("import os; os.kill(os.getpid(), 11)", "the builder crashed (SIGSEGV)"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed, as happens when"),
        ("import os; os._exit(3)", "the builder ended with code 3"),
        ("raise RuntimeError('out of luck')", "the builder ended with code 1"),
        ("print('noise')\nimport os; os.abort()", "the builder crashed (SIGABRT)"),
    ],
)
def test_crashes_are_one_line(
    copy: Path,
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    part: str,
) -> None:
    with_library(monkeypatch, tmp_path, code)
    before = tree(copy)
    text = refusal(main, copy, *ARGUMENTS, "--jobs", 2)
    assert text.startswith("pid-build: cannot build engine ") and part in text
    log = Path(text.rpartition("see ")[2].strip())
    assert log.is_file() and ("luck" not in code or "out of luck" in log.read_text())
    assert tree(copy) == before


def test_an_unknown_operator(built: Built, refusal: Refusal) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Bernoulli"

    edit_graph(built.bundle, "caption", edit)
    before = tree(built.bundle)
    text = refusal(main, built.bundle, *ARGUMENTS)
    assert "cannot build engine caption: cannot parse" in text and "Bernoulli" in text
    assert text.endswith("caption.log\n") and tree(built.bundle) == before


def test_too_small_a_workspace(built: Built, refusal: Refusal) -> None:
    before = tree(built.bundle)
    text = refusal(main, built.bundle, *ARGUMENTS, "--workspace", "1K", "--jobs", 1)
    assert "workspace" in text and ".log" in text and tree(built.bundle) == before


HANG = """
import pathlib, time
pathlib.Path({started!r}).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    started = tmp_path / "started"
    real = Path(sys.modules["tensorrt_rtx"].__file__ or "").parent.parent
    # The command itself imports the library for its version; only its children are to hang.
    code = (
        "import sys\n"
        "if 'worker' not in ' '.join(sys.orig_argv):\n"
        f"    sys.path.remove({str(tmp_path / 'lib')!r}); sys.path.insert(0, {str(real)!r})\n"
        "    del sys.modules['tensorrt_rtx']; import tensorrt_rtx\n"
        "else:\n    " + HANG.format(started=str(started)).strip().replace("\n", "\n    ")
    )
    with_library(monkeypatch, tmp_path, code)
    before = tree(copy)
    process = subprocess.Popen([*COMMAND, str(copy), *ARGUMENTS], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.1)
    children = children_of(process.pid)
    assert children, process.communicate(timeout=5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("pid-build: interrupted\n")
    assert tree(copy) == before
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_what_a_killed_builder_left_is_removed(built: Built, options: BuildOptions) -> None:
    left = built.folder / ".abc.partial"
    left.mkdir()
    (left / "latent.engine").write_text("half")
    build_engines(built.bundle, options)
    assert not left.exists()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--flavor", "rtx"], "expected --flavor to be one of tensorrt-rtx, tensorrt, auto"),
        (["--buckets", "tiny,5k"], "expected buckets of this bundle (tiny, small), but got '5k'"),
        (["--buckets", ""], "but got ''"),
        (["--target", "sm90"], "data-centre GPUs newer than Ampere need --flavor tensorrt"),
        (["--target", "rtx4090"], "sm75, sm80, sm86, sm89, sm120, sm121 or current"),
        (["--target", "sm89,"], "but got ''"),
        (["--target", "sm89,current"], "but got 'current'"),
        (["--target", "sm75,sm89"], "but got sm75, which has no bfloat16"),
        (["--opt-level", "6"], "expected --opt-level from 0 to 5, but got 6"),
        (["--opt-level", "x"], "try pid-build --help"),
        (["--jobs", "0"], "expected --jobs from 1 to 64, but got 0"),
        (["--workspace", "2T"], "expected --workspace as 2G, 512M or bytes, but got '2T'"),
        (["--workspace", "0"], "but got '0'"),
    ],
)
def test_arguments_that_make_no_sense(
    bf16_bundle: Path, refusal: Refusal, arguments: list[str], part: str
) -> None:
    before = tree(bf16_bundle)
    assert part in refusal(main, bf16_bundle, *arguments)
    assert tree(bf16_bundle) == before and not (bf16_bundle / "engines").exists()


def test_float32_is_refused(golden_bundle: Path, refusal: Refusal) -> None:
    assert "export with --precision bf16" in refusal(main, golden_bundle)
    assert not (golden_bundle / "engines").exists()


def test_no_bundle(tmp_path: Path, refusal: Refusal) -> None:
    assert "expected a bundle" in refusal(main, tmp_path)
    assert "expected a bundle" in refusal(main, tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle(copy: Path, refusal: Refusal) -> None:
    path = copy / "caption.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "was altered" in refusal(main, copy, *ARGUMENTS)


def test_no_library(monkeypatch: pytest.MonkeyPatch, copy: Path, refusal: Refusal) -> None:
    def missing(flavor: Flavor) -> Any:
        raise ImportError(flavor.name)

    monkeypatch.setattr(flavors, "load_library", missing)
    assert "pip install 'pid-trt[tensorrt-rtx]'\n" in refusal(
        main, copy, "--flavor", "tensorrt-rtx"
    )
    assert "pip install 'pid-trt[tensorrt]'\n" in refusal(main, copy, "--flavor", "tensorrt")
    both = refusal(main, copy)
    assert "TensorRT for RTX or TensorRT" in both and "[tensorrt-rtx]' or pip install" in both


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(ordinal: int) -> None:
        raise PidRuntimeError("expected an NVIDIA GPU, but found none; buy one")

    monkeypatch.setattr(flavors, "CudaDevice", device)


@pytest.mark.usefixtures("no_gpu")
def test_no_gpu(copy: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(main, copy, "--target", "current")
    assert "expected an NVIDIA GPU, but found none; run pid-build where the GPU is" in text
    monkeypatch.setattr(flavors, "library_version", lambda flavor: "11.4.0")
    for arguments in ([], ["--target", "current"], ["--target", "sm90"]):
        assert "found none" in refusal(main, copy, "--flavor", "tensorrt", *arguments)


def test_a_file_in_the_way(copy: Path, refusal: Refusal) -> None:
    (copy / "engines").write_text("precious")
    text = refusal(main, copy, *ARGUMENTS)
    assert "expected to write" in text and "copy the bundle to where you may write" in text
    assert (copy / "engines").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_bundle_that_must_not_be_written(copy: Path, refusal: Refusal) -> None:
    copy.chmod(0o500)
    assert "Permission denied" in refusal(main, copy, *ARGUMENTS)


def test_no_space(copy: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB of free disk for the engines" in refusal(main, copy, *ARGUMENTS)


@pytest.fixture
def full_disk(copy: Path) -> Iterator[Callable[[int], None]]:
    """A function that gives the bundle's engines a disk of so many kilobytes."""
    engines = copy / "engines"
    engines.mkdir()

    def mount(kilobytes: int) -> None:
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(engines)]
        done = subprocess.run(["mount", *options], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("needs a user who may mount")

    yield mount
    subprocess.run(["umount", str(engines)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [40, 400, 1600])
def test_a_disk_that_fills_up(
    copy: Path, full_disk: Callable[[int], None], refusal: Refusal, kilobytes: int
) -> None:
    full_disk(kilobytes)
    text = refusal(main, copy, *ARGUMENTS, "--jobs", 2)
    assert "no space left on " in text and "free some and run it again" in text
    left = [path for path in (copy / "engines").rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in left} <= {".log", ".lock"}
    assert not read_engine_sets(read_manifest(copy))


def test_attention_over_more_tokens_than_the_builder_counts(
    bf16_bundle: Path, options: BuildOptions
) -> None:
    manifest = read_manifest(bf16_bundle)
    huge = replace(manifest.buckets["tiny"], max_tokens=1_200_000)
    manifest = replace(manifest, buckets={**manifest.buckets, "huge": huge})
    with pytest.raises(BuildInputError) as error:
        plan_tasks(bf16_bundle, manifest, replace(options, buckets=None))
    assert "as TensorRT builds, but bucket huge of 307" in str(error.value)
    assert str(error.value).endswith("build the others with --buckets tiny,small")
    with pytest.raises(BuildInputError, match="; export a smaller one"):
        plan_tasks(bf16_bundle, manifest, replace(options, buckets=("huge",)))
    plan_tasks(bf16_bundle, manifest, options)  # of tiny alone


def test_scratch_lies_where_no_buffer_is_in_use(built_once: Built) -> None:
    manifest = read_manifest(built_once.bundle)
    assert_scratch_lies_apart(manifest, read_engine_sets(manifest)[built_once.result["engines"]])


def assert_scratch_lies_apart(manifest: Manifest, engines: EngineSet) -> None:
    manifest = engines.run_by(manifest)
    bucket = engines.buckets["tiny"]
    sizes = largest_sizes(manifest, bucket)
    alive = lifetimes(manifest.buffers, manifest.program)
    position = 0
    for section in SECTIONS:
        for index, instruction in enumerate(manifest.program[section]):
            used = [e for run in runs_of(instruction) for e in engines.graphs[run.graph]]
            needed = max((max(e.scratch_bytes) for e in used), default=0)
            begin = bucket.scratch_offset(section, index)
            assert begin + needed <= bucket.arena_bytes
            for name, life in alive.items():
                if needed and life.overlaps(Lifetime(position, position)):
                    buffer = manifest.buffers[name]
                    at = bucket.offsets[name]
                    end = at + sizes.bytes(buffer.dtype, buffer.shape)
                    assert end <= begin or begin + needed <= at, (section, index, name)
            position += 1


def test_a_lean_plan_has_shorter_chunks(golden_bundle: Path, options: BuildOptions) -> None:
    """Another set of engines, beside the fast one."""
    manifest = read_manifest(golden_bundle)
    for most, want in ((2000, 1024), (700, 700)):
        small = replace(manifest.buckets["small"], max_tokens=4096, chunk_tokens=most)
        wide = replace(manifest, buckets={"small": small})
        assert with_plan(wide, "fast") == wide
        assert with_plan(wide, "lean").buckets["small"].chunk_tokens == want
    lean = replace(options, plan="lean")
    assert lean.set_name == f"{options.set_name}-lean"


def test_a_lean_set_has_a_program_of_its_own(built_once: Built, options: BuildOptions) -> None:
    """As it would be if its engines took what those of the fast one take."""
    manifest = read_manifest(built_once.bundle)
    fast = read_engine_sets(manifest)[built_once.result["engines"]]
    assert (fast.program, fast.buffers) == ({}, {})
    assert manifest.format_version == (1, 4)
    options = replace(options, plan="lean")
    planned = in_slices(with_plan(manifest, "lean"), 5)
    tasks = plan_tasks(built_once.bundle, planned, options)
    built = {engine.file: engine for each in fast.graphs.values() for engine in each}
    assert {task.file for task in tasks} == built.keys()
    lean = make_set(planned, options, tasks, built)
    changed = with_engine_sets(manifest, {options.set_name: lean})
    assert changed.format_version == (2, 0)
    assert read_engine_sets(changed) == {built_once.result["engines"]: fast, options.set_name: lean}
    assert lean.program == lean_program(manifest).program
    before, tiny = fast.buckets["tiny"], lean.buckets["tiny"]
    assert tiny.buffers_bytes < before.buffers_bytes
    assert (tiny.attentions, tiny.attentions_fused) == (before.attentions, before.attentions_fused)
    assert_scratch_lies_apart(manifest, lean)


@pytest.mark.slow
def test_lean_engines_are_built_and_described(built: Built) -> None:
    run = subprocess.run(
        [*COMMAND, str(built.bundle), *ARGUMENTS, "--plan", "lean", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    manifest = read_manifest(built.bundle)
    sets = read_engine_sets(manifest)
    fast, lean = sets[built.result["engines"]], sets[result["engines"]]
    check_engine_set(built.bundle, manifest, result["engines"], lean)
    assert manifest.format_version == (2, 0)
    assert result["attentions_fused"] == built.result["attentions_fused"]
    assert lean.program == lean_program(manifest).program and fast.program == {}
    assert_scratch_lies_apart(manifest, lean)
