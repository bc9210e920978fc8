"""The C++ runtime: built, tested by CTest, and compared with Python's.

Its own tests (runtime/cpp/tests) get what they compare with from here, in a folder. Everything is
skipped where what it is built with cannot be had.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from pid_engines.child import Child, ChildError
from pid_export.bundle import _model
from pid_export.golden_guided import TOLERANCE as GUIDED_TOLERANCE
from pid_export.golden_guided import export_guided, read_guided
from pid_ref.registry import CHECKPOINTS
from pid_runtime.advice import advice
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.folder import parse_manifest, read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, RULES, FlowShift, Sampler
from pid_runtime.bundle.manifest_check import ALIGNMENT, LARGEST_ARENA
from pid_runtime.bundle.sizes import Sizes, sizes_for
from pid_runtime.bundle.source import Table, read_source
from pid_runtime.command import decode_cli
from pid_runtime.command.latent_files import LatentForm, open_latent_file
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import image_noise
from pid_runtime.schedule import Rule, check_schedule
from pid_runtime.tables import compute_table
from pid_runtime.tiles import described, tiling_of
from places import GOLDEN, ROOT

BUILD = ROOT / "build" / "cpp"
TOLERANCE = 1e-5

NETWORKS = {"v1": "flux_2k", "v1.5": "flux_v1pt5", "flux2": "flux2_2k"}
"""Bundles by the name of their folder, and the golden file of their network."""

GUIDED = sorted((GOLDEN / "guided").glob("*.safetensors"))
"""Golden files of undistilled decodes."""

Floats = NDArray[np.float32]

# What it is built with


def tool(name: str) -> str:
    """A program of the virtual environment or the system; the test is skipped without it."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"no {name}: pip install cmake ninja, and install a C++17 compiler")
    return found


def run(*command: object, environment: Mapping[str, str] | None = None) -> str:
    """Output of a command that must succeed, with these variables added to its environment."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def get_dependencies(folder: Path, onnxruntime: object) -> tuple[int, str]:
    """Exit code and complaints of get_dependencies.sh."""
    script = ROOT / "runtime" / "cpp" / "tools" / "get_dependencies.sh"
    command = (tool("bash"), str(script), str(folder), str(onnxruntime))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


@pytest.fixture(scope="session")
def dependencies() -> Path:
    """A folder for CMAKE_PREFIX_PATH."""
    for name in ("cmake", "ninja", "c++"):
        tool(name)
    folder = BUILD / "dependencies"
    code, error = get_dependencies(folder, sys.executable)
    if code:
        reason = (error or f"exit code {code}").splitlines()[-1]
        pytest.skip(f"what the C++ runtime is built with cannot be had: {reason}")
    return folder


def build(
    folder: Path,
    dependencies: object,
    options: Mapping[str, str],
    *targets: str,
    source: Path = ROOT,
) -> Path:
    """Configure and build in `folder`: all, or some targets."""
    settings = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_PREFIX_PATH": str(dependencies),
        **options,
    }
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    configure = (tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *defines)
    if subprocess.run(configure, capture_output=True, check=False).returncode:
        # Its settings may be those of an older checkout, or of one in another place.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        run(*configure)
    chosen = ("--target", *targets) if targets else ()
    run(tool("cmake"), "--build", folder, *chosen)
    return folder


@pytest.fixture(scope="session")
def release(dependencies: Path) -> Path:
    """The build folder of the library, its tests and the command, free of warnings."""
    options = {
        "PID_WARNINGS_AS_ERRORS": "ON",
        "PID_BUILD_CLI": "ON",
        # By itself CMake does not tell an installed library of a folder inside the sources.
        "CMAKE_INSTALL_RPATH": str(dependencies / "lib"),
    }
    return build(BUILD / "release", dependencies, options)


def executable(folder: Path, name: str) -> Path:
    (found,) = (p for p in folder.rglob(name) if p.is_file() and os.access(p, os.X_OK))
    return found


# What it is tested with


@functools.cache
def manifest_tests() -> Any:
    """The module tests/runtime/bundle/test_manifest.py: its manifests, and how it breaks them."""
    path = ROOT / "tests" / "runtime" / "bundle" / "test_manifest.py"
    spec = importlib.util.spec_from_file_location("manifest_tests", path)
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
        text = tests.changed(path, value, arbitrary=True)
        add(f"any times: {path} = {value}", text, message)
    for version in ([2, 0], [0, 9], [1], [1, 0, 0], "1.0", None, [True, 0], []):
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
    trees = [*tests.TREES.values(), newer]
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
        arbitrary = choose.random() < 0.5
        tree = copy.deepcopy(tests.TREES[arbitrary])
        name = f"{number}:"
        for _ in range(choose.randint(1, 2)):
            place, other = choose.choices(tests.PLACES[arbitrary], k=2)
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


@pytest.fixture(scope="session")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    golden_bundle: Path,
    free_bundle: Path,
    export_network: Callable[..., Path],
) -> Path:
    """What runtime/cpp/tests reads, and the bundles that both runtimes decode."""
    folder = tmp_path_factory.mktemp("cpp")
    shutil.copytree(golden_bundle, folder / "v1")
    shutil.copytree(free_bundle, folder / "any_times")
    for name, network in NETWORKS.items():
        if name != "v1":
            export_network(folder / "exported", network).rename(folder / name)
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
        for name in (*NETWORKS, "any_times", "huge", "short", "undistilled", "wrong_graph")
    ]
    for name, content in (
        ("valid_manifests", valid_manifests(bundles)),
        ("broken_manifests", broken_manifests()),
        ("tables", tables()),
        ("advice", advice_cases()),
        ("schedules", schedules()),
        ("tilings", tilings()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    with (folder / "mutated_manifests.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in mutated_manifests(400))
    return folder


# Tests of its own


def ctest(folder: Path, data: Path, environment: Mapping[str, str] | None = None) -> None:
    command = (tool("ctest"), "--test-dir", folder, "--output-on-failure", "--no-tests=error")
    output = run(*command, environment={"PID_TEST_DATA": str(data), **(environment or {})})
    assert "100% tests passed" in output and "Skipped" not in output, output


def test_unit_and_api_tests(release: Path, data: Path) -> None:
    ctest(release, data)


def clang_with_libfuzzer(folder: Path) -> dict[str, str]:
    """Settings for Clang, if there is one with its sanitizers."""
    source = folder / "fuzzer.cpp"
    source.write_text(
        'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    )
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", str(source), "-o", f"{folder}/a"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return {"PID_SANITIZE": "address,undefined"}
    return {
        "PID_SANITIZE": "address,undefined,fuzzer-no-link",
        "CMAKE_C_COMPILER": "clang",
        "CMAKE_CXX_COMPILER": "clang++",
    }


SANITIZED = {"CMAKE_BUILD_TYPE": "Debug", "CMAKE_CXX_FLAGS_DEBUG": "-g1"}
"""Enough for the lines of a finding."""


@pytest.fixture(scope="session")
def sanitized(dependencies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static build with AddressSanitizer and UndefinedBehaviorSanitizer, and fuzz targets."""
    options = clang_with_libfuzzer(tmp_path_factory.mktemp("clang"))
    folder = BUILD / ("sanitized-clang" if "CMAKE_CXX_COMPILER" in options else "sanitized")
    options |= {
        **SANITIZED,
        "BUILD_SHARED_LIBS": "OFF",
        "PID_BUILD_CLI": "OFF",
        "PID_BUILD_FUZZERS": "ON",
        "PID_WARNINGS_AS_ERRORS": "ON",
    }
    tests = ("pid_unit_tests", "pid_api_tests", "pid_two_decoders")
    return build(folder, dependencies, options, *tests, "fuzz_manifest", "fuzz_safetensors")


def test_with_address_and_undefined_behavior_sanitizers(sanitized: Path, data: Path) -> None:
    # What is slow without optimisation, the fuzz targets do as well.
    slow = "-Manifests.Mutated*:Noise.IsStandardNormal"
    asan = "allocator_may_return_null=1:detect_leaks=1"
    ctest(sanitized, data, {"ASAN_OPTIONS": asan, "GTEST_FILTER": slow})


@pytest.mark.parametrize("target", ["manifest", "safetensors"])
def test_fuzz(sanitized: Path, data: Path, tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if target == "manifest":
        small = json.dumps(manifest_tests().TREES[False])
        (corpus / "small").write_text(small)
        (corpus / "bundle").write_bytes((data / "v1" / MANIFEST_FILE).read_bytes())
    else:
        save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.uint8)}, corpus / "two")
        save_file({"latent": np.zeros((1, 2, 1, 1), np.float16)}, corpus / "latent")
    limits = ("-max_total_time=5", "-runs=20000", "-max_len=200000", "-seed=1")
    # Not the peak of resident memory: a process begins with that of the one that forked it.
    memory = ("-rss_limit_mb=0", "-malloc_limit_mb=1024")
    output = run(executable(sanitized, f"fuzz_{target}"), corpus, *limits, *memory)
    assert re.search(r"Done \d+ (runs|in)", output), output


# What it is built with, given in other ways


@pytest.fixture(scope="session")
def archive(dependencies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release archive of ONNX Runtime, unpacked: as it is laid out."""
    folder = tmp_path_factory.mktemp("onnxruntime-linux-x64")
    shutil.copytree(dependencies / "include" / "onnxruntime", folder / "include")
    (folder / "lib").mkdir()
    for library in (dependencies / "lib").glob("libonnxruntime*"):
        shutil.copy(library, folder / "lib", follow_symlinks=False)
    return folder


def folder_without_headers(dependencies: Path, folder: Path) -> Path:
    """A copy of the dependencies, as of one who has never had ONNX Runtime's headers by apt."""
    shutil.copytree(dependencies, folder, symlinks=True)
    for path in ("include/onnxruntime", "share/doc/libonnxruntime-dev"):
        shutil.rmtree(folder / path)
    for library in folder.glob("lib/libonnxruntime*"):
        library.unlink()
    return folder


def test_dependencies_stand_alone(dependencies: Path, archive: Path, tmp_path: Path) -> None:
    folder = folder_without_headers(dependencies, tmp_path / "folder")
    assert get_dependencies(folder, archive) == (0, "")
    want = (archive / "include" / "onnxruntime_c_api.h").read_bytes()
    assert (folder / "include" / "onnxruntime" / "onnxruntime_c_api.h").read_bytes() == want
    for made in (folder, dependencies):
        links = {path: path.readlink() for path in made.rglob("*") if path.is_symlink()}
        (crypto,) = (path for path, target in links.items() if target.is_absolute())
        assert crypto == made / "lib" / "libcrypto.so"
        assert (made / "lib" / "libonnxruntime.so").resolve().parent == (made / "lib").resolve()
        assert list(made.glob("lib/libonnxruntime_providers_shared.so"))
    library = (folder / "lib" / "libonnxruntime.so").resolve()
    before = library.stat().st_mtime_ns
    assert get_dependencies(folder, archive) == (0, "")
    assert library.stat().st_mtime_ns == before  # or all would be linked again


def test_another_onnxruntime_takes_the_place_of_the_first(
    dependencies: Path, archive: Path, tmp_path: Path
) -> None:
    folder = folder_without_headers(dependencies, tmp_path / "folder")
    assert get_dependencies(folder, archive) == (0, "")
    later = tmp_path / "later"
    shutil.copytree(archive / "include", later / "include")
    (later / "lib").mkdir()
    (later / "lib" / "libonnxruntime.so.1.999.0").write_bytes(b"later")
    assert get_dependencies(folder, later) == (0, "")
    found = sorted(path.name for path in folder.glob("lib/libonnxruntime*"))
    names = ["libonnxruntime.so", "libonnxruntime.so.1", "libonnxruntime.so.1.999.0"]
    assert found == names
    assert (folder / "lib" / "libonnxruntime.so").read_bytes() == b"later"


def test_what_onnxruntime_lacks_is_told(dependencies: Path, archive: Path, tmp_path: Path) -> None:
    folder = folder_without_headers(dependencies, tmp_path / "folder")
    old = tmp_path / "old"
    shutil.copytree(archive / "include", old / "include")
    (old / "lib").mkdir()
    (old / "lib" / "libonnxruntime.so.1.20.1").touch()
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "empty", "has no include/onnxruntime_c_api.h"),
        (tmp_path / "absent", f"libonnxruntime.so.1.X.Y, in {tmp_path / 'absent'}, but found none"),
        (old, "but got 1.20.1; update it"),
    ):
        code, error = get_dependencies(folder, given)
        assert code == 2 and message in error and "\n" not in error
    code, error = get_dependencies(folder, "true")
    assert code == 2 and "in true, but found none; pip install onnxruntime" in error


def find_onnxruntime(folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """CMake's output for a project that looks for ONNX Runtime, and for nothing else."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(
        f"""
        cmake_minimum_required(VERSION 3.22)
        project(find LANGUAGES NONE)
        list(APPEND CMAKE_MODULE_PATH "{ROOT / "cmake"}")
        find_package(ONNXRuntime 1.21)
        message(STATUS "found ${{PID_ONNXRUNTIME_INCLUDE_DIR}}, ${{PID_ONNXRUNTIME_LIBRARY}}.")
        """
    )
    command = [tool("cmake"), "-S", folder, "-B", folder / "build", "-G", "Ninja"]
    settings = {"CMAKE_MAKE_PROGRAM": tool("ninja"), **options}
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    return subprocess.run([*command, *defines], capture_output=True, text=True, check=False)


def test_cmake_finds_a_release_archive(dependencies: Path, archive: Path, tmp_path: Path) -> None:
    found = f"found {archive / 'include'}, {archive / 'lib' / 'libonnxruntime.so'}."
    for name, options in {
        "prefix": {"CMAKE_PREFIX_PATH": archive},
        "root": {"ONNXRuntime_ROOT": archive, "CMAKE_PREFIX_PATH": dependencies},
    }.items():
        done = find_onnxruntime(tmp_path / name, **options)
        assert done.returncode == 0 and found in done.stdout, done.stderr
    old = tmp_path / "old"
    shutil.copytree(archive, old, symlinks=True)
    header = old / "include" / "onnxruntime_c_api.h"
    text = header.read_text()
    header.write_text(re.sub(r"(#define ORT_API_VERSION) \d+", r"\1 20", text))
    done = find_onnxruntime(tmp_path / "too_old", ONNXRuntime_ROOT=old)
    assert 'Found unsuitable version "1.20"' in done.stdout + done.stderr
    header.write_text(text)
    (old / "lib" / "libonnxruntime.so.1").unlink()
    (library,) = old.glob("lib/libonnxruntime.so.1.*")
    options = {"ONNXRuntime_ROOT": old, "PID_ONNXRUNTIME_LIBRARY": library}
    done = find_onnxruntime(tmp_path / "no_link", **options)
    assert done.returncode and "beside libonnxruntime.so.1" in " ".join(done.stderr.split())


def test_settings_of_another_checkout_are_dropped(tmp_path: Path) -> None:
    for name in ("older", "newer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "CMakeLists.txt").write_text(
            f"""
            cmake_minimum_required(VERSION 3.22)
            project({name} LANGUAGES NONE)
            add_custom_target(all_of_it ALL COMMAND ${{CMAKE_COMMAND}} -E touch {name})
            """
        )
        build(tmp_path / "build", tmp_path, {}, source=tmp_path / name)
        assert (tmp_path / "build" / name).exists()


# In other projects


def page_blocks(language: str) -> list[str]:
    """Code blocks of docs/embedding.md."""
    text = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    return re.findall(rf"```{re.escape(language)}\n(.*?)```", text, re.S)


def write_project(folder: Path) -> tuple[Path, str]:
    """The project of the page; and what stands in it to find the package."""
    project, subdirectory = page_blocks("cmake")
    (cpp,), (c,) = page_blocks("cpp"), page_blocks("c")
    assert cpp.count("\n") < 40 and c.count("\n") < 40
    (folder / "CMakeLists.txt").write_text(project)
    (folder / "decode.cpp").write_text(cpp)
    (folder / "decode.c").write_text(c)
    return folder, subdirectory


def check_programs(
    folder: Path, data: Path, work: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run both programs and compare with Python."""
    latent = np.random.default_rng(0).standard_normal((1, 16, 2, 3), np.float32)
    (work / "latent.f32").write_bytes(latent.tobytes())
    program, bundle = executable(folder, "decode"), data / "v1"
    image = work / "image.ppm"
    run(program, bundle, work / "latent.f32", 2, 3, image, environment=environment)
    with Decoder.open(bundle, threads=1, verify=False) as decoder:
        want = decoder.decode(latent, seed=42, output="uint8")[0]
        zeros = decoder.decode(np.zeros_like(latent), seed=42, output="uint8")[0]
    with Image.open(image) as read:
        assert abs(np.asarray(read).astype(int) - want).max() <= 1
    output = run(executable(folder, "decode_c"), bundle, environment=environment)
    shown = re.fullmatch(r"96 x 64, first pixel (\d+)\n", output)
    assert shown and abs(int(shown[1]) - int(zeros[0, 0, 0])) <= 1
    for command in ((program, bundle), (executable(folder, "decode_c"), work / "absent")):
        variables = {**os.environ, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_project_that_finds_the_installed_package(
    release: Path, dependencies: Path, data: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    run(tool("cmake"), "--install", release, "--prefix", prefix)
    assert (prefix / "bin" / "pid-decode-cpp").is_file()
    # The names it shows are those of the C API.
    (library,) = (p for p in prefix.rglob("libpid_runtime.so.*.*.*"))
    shown = run("nm", "-D", "--defined-only", library).split()[2::3]
    assert "pid_decoder_decode" in shown
    assert [name for name in shown if not name.startswith("pid_")] == []
    (tmp_path / "project").mkdir()
    project, _ = write_project(tmp_path / "project")
    folder = build(tmp_path / "build", prefix, {}, source=project)
    check_programs(folder, data, tmp_path)


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_a_program_by_pkg_config(
    kind: str, request: pytest.FixtureRequest, dependencies: Path, data: Path, tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config: install pkgconf")
    made: Path = request.getfixturevalue({"shared": "release", "static": "sanitized"}[kind])
    run(tool("cmake"), "--install", made, "--prefix", tmp_path / "prefix")
    (description,) = tmp_path.rglob("pid_runtime.pc")
    search = {"PKG_CONFIG_PATH": str(description.parent)}
    words = ["--static"] if kind == "static" else []
    shown = run("pkg-config", "--cflags", "--libs", *words, "pid_runtime", environment=search)
    flags = shown.split()
    assert ("-lcrypto" in shown or "libcrypto" in shown) == (kind == "static")
    assert ("-DPID_RUNTIME_STATIC" in flags) == (kind == "static")
    compiler = "cc"
    if kind == "static":
        cache = (made / "CMakeCache.txt").read_text()
        (compiler,) = re.findall(r"^CMAKE_C_COMPILER:\w+=(.*)", cache, re.M)
        flags.append("-fsanitize=address,undefined")  # as that library is made
        (tmp_path / "project").mkdir()
        project, _ = write_project(tmp_path / "project")
        prefixes = f"{tmp_path / 'prefix'};{dependencies}"
        options = {"CMAKE_C_COMPILER": compiler, **SANITIZED}
        folder = build(tmp_path / "build", prefixes, options, "decode_c", source=project)
        assert run(executable(folder, "decode_c"), data / "v1").startswith("96 x 64, ")
    (tmp_path / "decode.c").write_text(page_blocks("c")[0])
    program = tmp_path / "decode_c"
    run(compiler, tmp_path / "decode.c", *flags, "-o", program)
    folders = os.pathsep.join([str(description.parent.parent), str(dependencies / "lib")])
    output = run(program, data / "v1", environment={"LD_LIBRARY_PATH": folders})
    assert output.startswith("96 x 64, first pixel ")


def test_a_project_with_the_sources_and_two_decoders_in_two_threads(
    dependencies: Path, data: Path, tmp_path: Path
) -> None:
    # With ThreadSanitizer, as every build of the library takes a while.
    source = BUILD / "subdirectory-source"
    source.mkdir(parents=True, exist_ok=True)
    project, subdirectory = write_project(source)
    text = (project / "CMakeLists.txt").read_text()
    found = re.search(r"^find_package\(pid_runtime.*\n", text, re.M)
    assert found
    (project / "CMakeLists.txt").write_text(text.replace(found[0], subdirectory))
    if not (project / "pid-trt").is_symlink():
        (project / "pid-trt").symlink_to(ROOT)
    options = {
        **SANITIZED,
        "PID_BUILD_TESTS": "ON",
        "PID_BUILD_CLI": "OFF",
        "PID_SANITIZE": "thread",
    }
    targets = ("decode", "decode_c", "pid_two_decoders")
    folder = build(BUILD / "subdirectory", dependencies, options, *targets, source=project)
    # ONNX Runtime is not instrumented: what it does with memory between its threads is not seen.
    environment = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"}
    check_programs(folder, data, tmp_path, environment)
    environment["PID_TEST_DATA"] = str(data)
    run(executable(folder, "pid_two_decoders"), environment=environment)


# Parity with Python


class Process(Child):
    """runtime/cpp/tests/decoder_process.cpp, which decodes as it is told."""

    def __init__(self, program: Path, folder: Path) -> None:
        super().__init__([program])
        self.folder, self.files = folder, 0

    def save(self, array: Floats) -> dict[str, Any]:
        self.files += 1
        path = self.folder / f"{self.files}.f32"
        path.write_bytes(np.ascontiguousarray(array, np.float32).tobytes())
        return {"file": str(path), "shape": list(array.shape)}

    def decode(self, tensors: dict[str, Any], **options: Any) -> NDArray[Any]:
        target = self.folder / "image"
        given = {
            name: [self.save(each) for each in tensor]
            if name == "step_noise"
            else self.save(tensor)
            for name, tensor in tensors.items()
        }
        answer = self.ask({"decode": given, "to": str(target), **options})
        kind = np.uint8 if options.get("output") == "uint8" else np.float32
        return np.frombuffer(target.read_bytes(), kind).reshape(answer["shape"])


@pytest.fixture
def process(release: Path, tmp_path: Path) -> Iterator[Process]:
    decoder = Process(executable(release, "pid_decoder_process"), tmp_path)
    with decoder:
        yield decoder
        decoder.end()


def assert_equal(got: NDArray[Any], want: NDArray[Any], tolerance: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    errors = np.abs(got.astype(np.float64) - want.astype(np.float64))
    spread = {q: float(np.quantile(errors, q)) for q in (0.5, 0.99, 1)}
    assert errors.max() <= tolerance, f"quantiles of the error: {spread}"


@pytest.mark.parametrize("name", NETWORKS)
def test_decodes_are_those_of_python(process: Process, data: Path, name: str) -> None:
    bundle, random_numbers = data / name, np.random.default_rng(3)
    network = read_manifest(bundle, verify=False).network
    scale = network["patch_size"] * read_manifest(bundle, verify=False).tokens_per_latent
    caption = random_numbers.standard_normal((2, 9, network["text_dim"]), np.float32)
    process.ask({"open": str(bundle), "threads": 1})
    with Decoder.open(bundle, threads=1, verify=False) as python:
        for height, width in ((2, 3), (4, 1)):
            shape = (2, network["latent_channels"], height, width)
            latent = random_numbers.standard_normal(shape, np.float32)
            tensors = {"latent": latent, "caption": caption}
            options = {"sigma": [0.0, 0.5], "seeds": [7]}
            want = python.decode(latent, caption, sigma=[0.0, 0.5], seed=7)
            assert_equal(process.decode(tensors, **options), want, TOLERANCE)
            pixels = process.decode(tensors, **options, output="uint8")
            wanted = python.decode(latent, caption, sigma=[0.0, 0.5], seed=7, output="uint8")
            assert_equal(pixels, wanted, 1)
            assert (pixels != wanted).mean() < 1e-3
            draws = [
                np.stack([image_noise(b, k, height * scale, width * scale) for b in (20, 30)])
                for k in range(4)
            ]
            tensors = {"latent": latent, "noise": draws[0], "step_noise": draws[1:]}
            want = python.decode(latent, noise=draws[0], step_noise=draws[1:])
            assert_equal(process.decode(tensors), want, TOLERANCE)
        one = {"latent": latent[:1], "caption": caption[:1]}
        cases: list[tuple[int, Rule]] = [(1, "sde"), (2, "ode")]
        for steps, rule in cases:
            want = python.decode(*one.values(), steps=steps, rule=rule, seed=2**64 - 1)
            got = process.decode(one, steps=steps, rule=rule, seeds=[2**64 - 1])
            assert_equal(got, want, TOLERANCE)


def test_any_times_and_chunks_are_those_of_python(
    process: Process, data: Path, chunked_bundle: Path
) -> None:
    latent = np.random.default_rng(5).standard_normal((2, 16, 3, 3), np.float32)
    times = [1.0, 0.8, 0.5, 0.0]
    cases: list[tuple[Path, dict[str, Any]]]
    cases = [(data / "any_times", {"times": times}), (chunked_bundle, {})]
    for bundle, options in cases:
        process.ask({"open": str(bundle), "threads": 1})
        with Decoder.open(bundle, threads=1, verify=False) as python:
            want = python.decode(latent, seed=[4, 4], **options)
        assert_equal(process.decode({"latent": latent}, seeds=[4, 4], **options), want, TOLERANCE)


SIDE = 32
TILES: dict[str, Any] = {"tile": (4 * SIDE, 3 * SIDE), "overlap": SIDE}
"""2 x 2 tiles of 5 x 6 pixels of the latent."""


class Both:
    """One bundle, opened by both runtimes."""

    def __init__(self, process: Process, python: Decoder) -> None:
        self.process, self.python = process, python

    def check(
        self,
        tensors: dict[str, Any],
        *,
        seeds: tuple[int, ...] = (),
        tolerance: float = TOLERANCE,
        **options: Any,
    ) -> Floats:
        """Decode with both and compare; Python's image."""
        given = {**options, "tile": (-1, -1)} if options.get("tile") == "auto" else options
        got = self.process.decode(tensors, seeds=seeds, **given)
        want = self.python.decode(**tensors, seed=seeds or 0, **options)
        if want.dtype == np.uint8:
            assert_equal(got, want, 1)
            assert (got != want).mean() < 1e-3
        else:
            assert_equal(got, want, tolerance)
        return want

    def check_refusal(self, tensors: dict[str, Any], **options: Any) -> None:
        """Both refuse in the same words."""
        given = {**options, "tile": (-1, -1)} if options.get("tile") == "auto" else options
        with pytest.raises(PidRuntimeError) as python:
            self.python.decode(**tensors, **options)
        with pytest.raises(ChildError) as cpp:
            self.process.decode(tensors, **given)
        assert str(python.value) in str(cpp.value)


@pytest.fixture
def open_both(process: Process) -> Iterator[Callable[[Path], Both]]:
    with contextlib.ExitStack() as opened:

        def open_it(bundle: Path) -> Both:
            process.ask({"open": str(bundle), "threads": 1})
            decoder = Decoder.open(bundle, threads=1, verify=False)
            return Both(process, opened.enter_context(decoder))

        yield open_it


def normal(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_tiles_are_those_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    both = open_both(data / "v1")
    latent, caption = normal(2, 16, 5, 6, seed=1), normal(2, 9, 32, seed=2)
    tensors: dict[str, Any] = {"latent": latent, "caption": caption}
    whole = both.check(tensors, seeds=(7, 7))
    tiled = both.check(tensors, seeds=(7, 7), sigma=[0, 0.4], **TILES)
    assert np.abs(tiled - whole).max() > 0.01
    both.check(tensors, seeds=(7, 8), output="uint8", **TILES)
    both.check({**tensors, "caption": caption[:1]}, seeds=(2**64 - 1, 3), rule="ode", **TILES)
    both.check(tensors, seeds=(7, 8), rule="dpm++2m")
    draws = [np.stack([image_noise(b, k, 160, 192) for b in (9, 10)]) for k in range(4)]
    noise = {"noise": draws[0], "step_noise": draws[1:]}
    given = both.check({**tensors, **noise}, **TILES)
    np.testing.assert_array_equal(both.python.decode(**tensors, seed=9, **TILES), given)
    both.check({"latent": normal(1, 16, 20, 21, seed=3)}, steps=1, tile="auto", overlap=64)


def test_guidance_is_that_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    tensors: dict[str, Any] = {
        "latent": normal(2, 16, 5, 6, seed=1),
        "caption": normal(2, 12, 32, seed=2),
        "negative": normal(1, 12, 32, seed=3),
    }
    both = open_both(data / "any_times")
    guided: dict[str, Any] = {"times": [0.97, 0.7, 0.3, 0.0], "guidance": 3.0}
    for rule in RULES:
        # Each step makes of an error 3 + 2 times as much.
        both.check(tensors, seeds=(4, 4), tolerance=10 * TOLERANCE, rule=rule, **guided)
    both.check(tensors, seeds=(4, 4), tolerance=10 * TOLERANCE, **TILES, **guided)
    both.check(tensors, seeds=(4, 4), **{**guided, "guidance": 1.0})
    shifted = open_both(data / "undistilled")
    assert shifted.python.manifest.sampler.rule == "dpm++2m"
    shifted.check(tensors, seeds=(4, 4), tolerance=50 * TOLERANCE)
    shifted.check(tensors, seeds=(4, 4), steps=3, guidance=2.0, **TILES, tolerance=50 * TOLERANCE)


def test_plans_are_those_of_python(open_both: Callable[[Path], Both], data: Path) -> None:
    def check(both: Both, height: int, width: int, **options: Any) -> None:
        asked = {**options, "plan": [height, width]}
        if options.get("tile") == "auto":
            asked["tile"] = (-1, -1)
        want = asdict(both.python.plan(height, width, **options))
        assert both.process.ask(asked) == {**want, "tile": list(want["tile"])}

    def check_refusal(both: Both, height: int, width: int, **options: Any) -> None:
        asked = {**options, "plan": [height, width]}
        if options.get("tile") == "auto":
            asked["tile"] = (-1, -1)
        with pytest.raises(PidRuntimeError) as python:
            both.python.plan(height, width, **options)
        with pytest.raises(ChildError) as cpp:
            both.process.ask(asked)
        assert str(python.value) in str(cpp.value)

    both = open_both(data / "v1")
    for batch in (1, 3):
        check(both, 160, 192, batch=batch)
        check(both, 160, 192, batch=batch, steps=2, **TILES)
        check(both, 160, 192, batch=batch, rule="dpm++2m")
    check(both, 640, 672, tile="auto", overlap=64)
    for height, width, options in (
        (640, 640, {}),
        (100, 96, {}),
        (0, 64, {}),
        (64, -64, {}),
        (160, 192, {"steps": 3}),
        (160, 192, {"tile": (64, 64)}),
        (160, 192, {"batch": 0}),
        (160, 192, {"guidance": 0.5}),
        (32 * 600, 32, {"tile": "auto"}),
    ):
        check_refusal(both, height, width, **options)
    for name in ("v1.5", "flux2"):
        check(open_both(data / name), 128, 128)
    both = open_both(data / "undistilled")
    check(both, 160, 192)
    check(both, 160, 192, guidance=1.0, steps=3)
    check(both, 160, 192, guidance=2.0, steps=3, batch=2, **TILES)
    both = open_both(data / "any_times")
    check(both, 160, 192, times=[0.97, 0.3, 0.0], batch=2)
    check_refusal(both, 160, 192)


@pytest.mark.parametrize("file", GUIDED, ids=lambda file: file.stem)
def test_guided_golden_files_agree(process: Process, tmp_path: Path, file: Path) -> None:
    golden = read_guided(file)
    export_guided(golden, tmp_path / "bundle")
    process.ask({"open": str(tmp_path / "bundle"), "threads": 1})
    tensors: dict[str, Any] = {**golden.inputs}
    sigma = np.atleast_1d(tensors.pop("sigma")).tolist()
    options = {"steps": golden.steps, "guidance": golden.guidance, "sigma": sigma}
    process.decode(tensors, **options, state_to=str(tmp_path / "state"))
    batch, _, height, width = golden.unclamped.shape
    patch = golden.config.patch_size
    grid = (batch, height // patch, width // patch, patch, patch, 3)
    state = np.frombuffer((tmp_path / "state").read_bytes(), np.float32).reshape(grid)
    image = state.transpose(0, 5, 1, 3, 2, 4).reshape(golden.unclamped.shape)
    assert_equal(image, golden.unclamped, GUIDED_TOLERANCE)


def test_both_refuse_in_the_same_words(
    open_both: Callable[[Path], Both], data: Path, tmp_path: Path
) -> None:
    latent, negative = normal(1, 16, 5, 6, seed=1), normal(1, 12, 32, seed=3)
    one: dict[str, Any] = {"latent": latent}
    both = open_both(data / "v1")
    for options in (
        {"tile": (100, 64)},
        {"tile": (192, 192)},
        {"tile": (64, 64)},
        {"tile": (64, 64), "overlap": 10},
        {"overlap": 32},
        {"steps": 3},
        {"times": [1.0, 0.0]},
        {"guidance": 5.0},
    ):
        both.check_refusal(one, **options)
    both.check_refusal({"latent": normal(1, 16, 20, 20, seed=1)})
    both.check_refusal({"latent": normal(1, 16, 513, 1, seed=1)}, tile="auto")
    both.check_refusal({"latent": normal(1, 16, 40, 40, seed=1)}, tile=(640, 640))
    both.check_refusal({"latent": normal(1, 16, 40, 40, seed=1)}, tile="auto", overlap=320)
    both = open_both(data / "undistilled")
    both.check_refusal(one)
    for options in ({"guidance": 0.5}, {"guidance": 1000.5}, {"guidance": 2.0, "steps": 101}):
        both.check_refusal({**one, "negative": negative}, **options)
    both.check_refusal({**one, "negative": negative[:, 1:]})
    both.check_refusal({**one, "negative": negative[0]})
    both.check_refusal({**one, "negative": negative}, times=[0.5, 0.7, 0.0])
    both = open_both(data / "any_times")
    both.check_refusal({**one, "negative": negative}, times=[1.0, 0.0])
    distilled = edited(
        data / "v1",
        tmp_path / "distilled",
        lambda tree: tree["model"].update(name="flux 2k", distilled=True),
    )
    both = open_both(distilled)
    both.check_refusal(one, guidance=5.0)
    both.check_refusal(one, guidance=2.5)
    both.check_refusal({**one, "negative": negative})


def test_an_image_of_nan_is_refused(process: Process, spoilt_bundle: Path) -> None:
    process.ask({"open": str(spoilt_bundle), "threads": 1})
    latent = np.random.default_rng(5).standard_normal((1, 16, 2, 3), np.float32)
    process.decode({"latent": latent}, steps=1)
    with pytest.raises(ChildError, match="step 3 of 4 gave NaN or infinity; check the bundle"):
        process.decode({"latent": latent}, output="uint8")
    with pytest.raises(ChildError, match="step 3 of 4 gave NaN or infinity; check the bundle"):
        process.decode({"latent": latent}, tile=(64, 32), overlap=0)


# The command


class Work:
    """A folder with latents, and the command to run there."""

    def __init__(self, program: Path, bundle: Path, folder: Path) -> None:
        self.program, self.bundle, self.folder = program, bundle, folder
        folder.mkdir()
        numbers = np.random.default_rng(1)
        self.latent = numbers.standard_normal((16, 2, 3), np.float32)
        self.caption = numbers.standard_normal((12, 32), np.float32)
        self.file("latent", latent=self.latent)
        self.file("caption", caption=self.caption)

    def file(self, name: str, **tensors: NDArray[Any]) -> Path:
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        return path

    def command(self, *arguments: object, bundle: Path | None = None) -> list[str]:
        given = (bundle or self.bundle, "--threads", 1, *arguments)
        return [str(self.program), *map(str, given)]

    def run(self, *arguments: object, bundle: Path | None = None) -> tuple[int, str, str]:
        done = subprocess.run(
            self.command(*arguments, bundle=bundle),
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def tree(self) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }

    def refusal(self, *arguments: object, bundle: Path | None = None) -> str:
        before = self.tree()
        code, out, err = self.run(*arguments, bundle=bundle)
        assert (code, out) == (2, ""), err
        assert err.startswith("pid-decode-cpp: ") and err.count("\n") == 1 and err.endswith("\n")
        assert self.tree() == before
        return err

    def pixels(self, name: str) -> NDArray[np.uint8]:
        with Image.open(self.folder / name) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            return np.asarray(image)


@pytest.fixture
def work(release: Path, data: Path, tmp_path: Path) -> Work:
    return Work(executable(release, "pid-decode-cpp"), data / "v1", tmp_path / "work")


ONE = ("--latent", "latent.safetensors", "--caption", "caption.safetensors", "-o", "image.png")


def test_command_decodes_one_latent(work: Work) -> None:
    code, out, err = work.run(*ONE, "--seed", 7, "--sigma", "0.25", "--steps", 2, "--rule=ode")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"image\.png: 96x64, seed 7, \d+\.\d\d s\n", out)
    with Decoder.open(work.bundle, threads=1, verify=False) as python:
        want = python.decode(
            work.latent[None],
            work.caption[None],
            seed=7,
            sigma=0.25,
            steps=2,
            rule="ode",
            output="uint8",
        )
    assert_equal(work.pixels("image.png"), want[0], 1)
    assert "exists; choose another name or add --overwrite" in work.refusal(*ONE)
    assert work.run(*ONE, "--overwrite")[0] == 0


def test_command_decodes_in_tiles_as_python_does(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    work.file("large", latent=normal(1, 16, 20, 20, seed=4), caption=work.caption)
    for name, words in (
        ("latent", ("--tile", "64x64", "--overlap", 0, "--rule", "dpm++2m")),
        ("large", ("--tile", "auto", "--overlap", 64, "--steps", 1)),
    ):
        given = (*words, "--seed", 5, "--json")
        code, out, err = work.run("--latent", f"{name}.safetensors", "-o", "cpp.png", *given)
        assert code == 0, err
        latent, python = work.folder / f"{name}.safetensors", work.folder / f"{name}.png"
        arguments = (work.bundle, "--threads", 1, "--latent", latent, "-o", python, *given)
        assert decode_cli.main([str(word) for word in arguments]) == 0
        want, got = json.loads(capsys.readouterr().out), json.loads(out)
        del want["images"], want["sheet"], got["images"]
        assert got == want
        assert_equal(work.pixels("cpp.png"), work.pixels(f"{name}.png"), 1)
        (work.folder / "cpp.png").unlink()
    assert err.endswith("pixels or more: no bucket holds the whole picture\n")
    assert err.startswith("Decoding in ") and err.count("\n") == 1
    large = ("--latent", "large.safetensors", "-o", "quiet.png", *words)
    assert work.run(*large, "--quiet")[::2] == (0, "")


def test_command_plans_as_python_does(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    pair = np.stack([work.latent, -work.latent])
    work.file("latents/a", latent=pair, caption=work.caption)
    work.file("latents/b", latent=normal(1, 16, 20, 20, seed=4))
    before = work.tree()
    words = ["--latents", str(work.folder / "latents"), "--plan", "--tile", "auto"]
    words += ["--overlap", "64"]
    for more in ([], ["--json"]):
        code, out, err = work.run(*words, *more)
        assert (code, err) == (0, "")
        assert decode_cli.main([str(work.bundle), "--threads", "1", *words, *more]) == 0
        want = capsys.readouterr().out
        if more:
            assert json.loads(out) == json.loads(want)
            assert list(json.loads(out)["plans"][0]) == list(json.loads(want)["plans"][0])
        else:
            assert out == want and out.count("\n") == 3
    assert work.tree() == before


def test_command_decodes_with_guidance_as_python_does(
    work: Work, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    negative = normal(12, 32, seed=5)
    work.file("negative", caption=work.caption, negative=negative)
    work.file("other", embedding=negative)
    options = ("--steps", 3, "--seed", 5, "--json")
    bundle = data / "undistilled"
    results: list[Any] = []
    for file in ("negative", "other"):
        guided = ("--negative", f"{file}.safetensors", *options)
        code, out, err = work.run(*ONE[:-1], f"{file}.png", *guided, bundle=bundle)
        assert code == 0, err
        results.append(json.loads(out))
    np.testing.assert_array_equal(work.pixels("negative.png"), work.pixels("other.png"))
    paths = {name: work.folder / f"{name}.safetensors" for name in ("latent", "caption")}
    words = [f"--{name}={path}" for name, path in paths.items()]
    words += ["--negative", str(work.folder / "other.safetensors"), *map(str, options)]
    assert decode_cli.main([str(bundle), *words, "-o", str(work.folder / "python.png")]) == 0
    want = json.loads(capsys.readouterr().out)
    del want["images"], want["sheet"], results[1]["images"]
    assert (want["rule"], want["guidance"], want["steps"]) == ("dpm++2m", 5, 3)
    assert results[1] == {**want, "negative": "other.safetensors"}
    errors = np.abs(work.pixels("other.png").astype(int) - work.pixels("python.png"))
    assert errors.max() <= 1
    refused = work.refusal(*ONE, *options, bundle=bundle)
    assert "expected a negative caption for guidance 5, but got none; give one" in refused
    work.file("several", a=negative, b=negative)
    refused = work.refusal(*ONE, "--negative", "several.safetensors", bundle=bundle)
    assert "but got a, b; name that of the negative caption 'negative'" in refused


def test_command_gives_every_latent_its_negative_as_python_does(work: Work, data: Path) -> None:
    latents, negatives = normal(2, 16, 2, 3, seed=6), normal(2, 12, 32, seed=7)
    work.file("pair", latent=latents, caption=work.caption)
    work.file("negatives", caption=negatives)
    words = ["--negative", "negatives.safetensors", "--steps", "3", "--seed", "5"]
    bundle = data / "undistilled"
    pair = ["--latent", "pair.safetensors", "-o", "pair.png", *words]
    code, _, err = work.run(*pair, bundle=bundle)
    assert code == 0, err
    arguments = [str(work.folder / word) if "." in word else word for word in pair]
    arguments[3] = str(work.folder / "python.png")
    assert decode_cli.main([str(bundle), "--threads", "1", *arguments]) == 0
    for index in (0, 1):
        assert_equal(work.pixels(f"pair-{index}.png"), work.pixels(f"python-{index}.png"), 1)
    assert np.abs(work.pixels("pair-0.png").astype(int) - work.pixels("pair-1.png")).max() > 1
    refused = work.refusal(*ONE, *words, bundle=bundle)
    assert "expected negative shape [B, T, 32], but got [2, 12, 32]; B is 1 or that of" in refused


def test_command_decodes_a_folder_in_order(work: Work) -> None:
    sigma = np.array([0, 0.5], np.float16)
    both = np.stack([work.latent, -work.latent]).astype(np.float16)
    work.file("latents/a", z=both, caption=work.caption, sigma=sigma)
    work.file("latents/b", latent=work.latent[None], caption=work.caption)
    (work.folder / "latents" / "notes.txt").write_text("not a latent")
    code, out, err = work.run("--latents", "latents", "-o", "images", "--json", "--seed", 2**64 - 1)
    skipped = "skipped 1 of 3 files in latents: .txt is none of *.safetensors, *.latent, *.npy"
    assert (code, err) == (0, f"warning: {skipped}\n")
    result = json.loads(out)
    assert [each["image"] for each in result["images"]] == [
        "images/a-0.png",
        "images/a-1.png",
        "images/b.png",
    ]
    seconds = [each.pop("seconds") for each in result["images"]]
    assert min(seconds) > 0
    assert result["images"][1] == {
        "latent": "latents/a.safetensors",
        "index": 1,
        "image": "images/a-1.png",
        "width": 96,
        "height": 64,
        "seed": 0,
        "sigma": 0.5,
    }
    del result["images"]
    manifest = (work.bundle / MANIFEST_FILE).read_bytes()
    assert result == {
        "bundle": str(work.bundle),
        "bundle_sha256": hashlib.sha256(manifest).hexdigest(),
        "backend": "onnxruntime",
        "device": "cpu",
        "steps": 4,
        "times": None,
        "rule": "sde",
        "skipped": 0,
    }
    (work.folder / "images" / "b.png").unlink()
    again = ("--latents", "latents", "-o", "images", "--skip-existing")
    code, out, _ = work.run(*again)
    assert code == 0 and out.startswith("images/b.png: 96x64")
    assert out.endswith("\n2 of 3 images were there already\n")
    assert work.run(*again)[:2] == (0, "3 of 3 images were there already\n")
    assert "not allowed with" in work.refusal(*again, "--overwrite")
    with Decoder.open(work.bundle, threads=1, verify=False) as python:
        want = python.decode(
            both[1:].astype(np.float32), work.caption[None], sigma=0.5, output="uint8"
        )
    assert_equal(work.pixels("images/a-1.png"), want[0], 1)
    assert sorted(os.listdir(work.folder / "images")) == ["a-0.png", "a-1.png", "b.png"]


def test_command_says_in_images_how_they_were_made(work: Work, tmp_path: Path) -> None:
    bundle = edited(
        work.bundle, tmp_path / "of", lambda tree: tree["model"].update(weights_license="a test's")
    )
    (work.folder / f".image.png.{2**22 + 1}.part").touch()  # of a process that was killed
    options = ("--seed", 7, "--sigma", "0.25", "--steps", 2)
    assert work.run(*ONE, *options, bundle=bundle)[0] == 0
    assert not list(work.folder.glob(".image.png.*"))
    with Image.open(work.folder / "image.png") as image:
        image.load()
        info: Any = dict(image.info)
    assert info.pop("srgb") == 0
    arguments = ("--latent", work.folder / "latent.safetensors", "--caption")
    caption, python = work.folder / "caption.safetensors", tmp_path / "python.png"
    words = map(str, (bundle, *arguments, caption, "-o", python, *options))
    assert decode_cli.main(list(words)) == 0
    with Image.open(python) as image:
        image.load()
        assert dict(image.info) | {"pid-trt": None} == info | {"pid-trt": None}
        assert json.loads(image.info["pid-trt"]) == json.loads(info["pid-trt"])
    assert json.loads(info["pid-trt"])["weights_license"] == "a test's"
    assert work.run(*ONE, "--overwrite", "--no-metadata", bundle=bundle)[0] == 0
    with Image.open(work.folder / "image.png") as image:
        image.load()
        assert image.info == {"srgb": 0}


def test_command_warns(work: Work, tmp_path: Path) -> None:
    code, _, err = work.run("--latent", "latent.safetensors", "-o", "image.png", "--sigma", "0.9")
    assert code == 0 and err.count("\n") == 2
    assert "warning: sigma 0.9 is beyond 0.8, the highest in training" in err
    assert "warning: 1 of 1 images have no caption and get the empty embedding" in err
    bundle = edited(
        work.bundle, tmp_path / "bare", lambda tree: tree["model"].update(captioned=False)
    )
    arguments = ("--latent", "latent.safetensors", "-o", "image.png", "--overwrite")
    assert work.run(*arguments, bundle=bundle)[::2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required"),
        (("-o", "a.png"), "--latent"),
        ((*ONE, "--latents", "."), "not allowed with"),
        ((*ONE, "--steps", 4, "--times", "1,0"), "not allowed with"),
        ((*ONE, "--captions", "."), "not allowed with"),
        ((*ONE, "--sheet", "a.png"), "expected no --sheet, whose labels need a font"),
        ((*ONE, "--format", "png"), "expected --format with --latents, but got --latent"),
        ((*ONE, "--format", "webp"), "this command writes no other, but got 'webp'; use pid-dec"),
        ((*ONE, "--format", "tiff"), "this command writes no other, but got 'tiff'; use pid-dec"),
        ((*ONE, "--format", "gif"), "argument --format: expected png, but got 'gif'"),
        ((*ONE, "--engines", "a"), "expected the tensorrt backend to run engines 'a', but got 'on"),
        ((*ONE, "--quiet=no"), "argument --quiet: expected no value"),
        ((*ONE, "--caption-key", "--json"), "argument --caption-key: expected one argument"),
        ((*ONE, "more"), "unrecognized arguments: more"),
        ((*ONE, "--colour", "red"), "unrecognized arguments: --colour red"),
        ((*ONE, "--seed"), "expected one argument"),
        ((*ONE, "--seed", "-1"), "expected a whole number from 0 to 2^64 - 1, but got '-1'"),
        ((*ONE, "--seed", 2**64), "expected a whole number from 0 to 2^64 - 1"),
        ((*ONE, "--seed", "1.5"), "expected a whole number"),
        ((*ONE, "--threads", 0), "expected a whole number from 1"),
        ((*ONE, "--sigma", "1.01"), "expected sigma in [0, 1], but got [1.01]; 0 is a clean lat"),
        ((*ONE, "--sigma", "nan"), "expected sigma in [0, 1], but got [nan]"),
        ((*ONE, "--sigma", "high"), "expected a number, but got 'high'"),
        ((*ONE, "--times", "1,half,0"), "expected a number, but got"),
        ((*ONE, "--rule", "euler"), "expected sde, ode, dpm++2m, but got 'euler'"),
        ((*ONE, "--tile", "big"), "expected auto or a size such as 2048x2048, but got 'big'"),
        ((*ONE, "--tile", "0x0"), "expected auto or a size such as 2048x2048, but got '0x0'"),
        ((*ONE, "--tile", "100x64"), "width and height in multiples of 32 pixels, but got 100x64"),
        ((*ONE, "--tile", "96x96"), "no larger than the picture, 96x64, but got 96x96; give a sm"),
        ((*ONE, "--overlap", 32), "expected --tile with --overlap, but got none; add --tile auto"),
        ((*ONE, "--tile", "auto", "--overlap", "-1"), "whole number from 0 to 16777216, but got"),
        ((*ONE, "--guidance", "much"), "expected a number, but got 'much'"),
        (
            (*ONE, "--guidance", 5),
            "a negative caption for guidance 5, but got none; give one, made",
        ),
        ((*ONE, "--guidance", 0), "expected guidance from 1 to 100, but got 0.0; 5 is usual"),
        ((*ONE, "--negative", "."), "expected a file for --negative, but . is a folder; give a fi"),
        ((*ONE, "--negative", "absent"), "expected a safetensors file, but absent is none"),
        ((*ONE, "--negative", "caption.safetensors"), "expected guidance with the negative captio"),
        ((*ONE, "--steps", 3), "expected 1, 2, 4 steps, but got 3"),
        ((*ONE, "--steps", 0), "steps"),
        ((*ONE, "--times", "1,0"), "--arbitrary-timesteps"),
        ((*ONE, "--backend", "tensorflow"), "expected a backend of onnxruntime, tensorrt"),
        ((*ONE, "--device", "abacus"), "CPUExecutionProvider"),
        ((*ONE, "--device", "cuda:first"), "expected a device such as cuda:0"),
        ((*ONE, "--latent-key", "b"), "expected a tensor 'b' in latent.safetensors"),
        ((*ONE, "--caption-key", "b"), "change --caption-key"),
        ((*ONE[:-1], "image.gif"), "expected an image name ending in .png"),
        ((*ONE[:-1], "no/image.png"), "expected a folder to write image.png in"),
        (("--latent", "absent", "-o", "a.png"), "but absent is none"),
        (("--latent", ".", "-o", "a.png"), "a file for --latent, but . is a folder; use --latents"),
        (("--latent", "caption.safetensors", "-o", "a.png"), "choose with --latent-key"),
        (("--latents", "absent", "-o", "a"), "expected a folder for --latents"),
        (("--latents", ".", "-o", "caption.safetensors", "--latent-key", "latent"), ""),
        (("--latents", ".", "--captions", "absent", "-o", "a"), "expected a folder for --captions"),
    ],
    ids=str,
)
def test_command_refuses(work: Work, arguments: tuple[object, ...], message: str) -> None:
    assert message in work.refusal(*arguments)


def test_command_refuses_latents_that_do_not_fit(work: Work) -> None:
    nan = work.latent.copy()
    nan[3, 1, 1] = np.nan
    for name, latent, message in (
        (
            "wide",
            np.zeros((16, 17, 16), np.float32),
            "at most 0.262 megapixels, the largest bucket of this bundle, but got 512x544; the "
            "largest of this shape is 480x512, of a latent of height 16 and width 15; or export",
        ),
        ("channels", work.latent[:15].copy(), "expected latent shape [B, 16, h, w], but got "),
        ("rank", work.latent[0].copy(), "but got [2, 3]; this bundle takes latents of its own net"),
        (
            "single",
            np.ones((), np.float32),
            "expected latent shape [B, 16, h, w], but got []; this bundle",
        ),
        ("video", np.zeros((1, 16, 3, 2, 3), np.float32), "[1, 16, 3, 2, 3]; choose one frame"),
        ("empty", np.zeros((16, 0, 3), np.float32), "but got [16, 0, 3]"),
        ("double", work.latent.astype(np.float64), "to be F32, F16, BF16, but got F64; convert"),
        ("nan", nan, "holds NaN or infinity"),
    ):
        path = work.file(name, latent=latent)
        refused = work.refusal("--latent", path, "-o", "image.png")
        assert message in refused and str(path) in refused
    pair = np.stack([work.caption] * 2)
    for name, beside, message in (
        ("sigmas", {"sigma": np.array([0.1, 5.0], np.float32)}, "expected one sigma, but got"),
        ("sigma", {"sigma": np.array([5.0], np.float32)}, "expected sigma in [0, 1], but got"),
        ("captions", {"caption": pair}, "got [2, 12, 32]; B is 1 or that of the latent"),
    ):
        work.file(name, latent=work.latent, **beside)
        refused = work.refusal("--latent", f"{name}.safetensors", "-o", "image.png")
        assert message in refused
    (work.folder / "cut.safetensors").write_bytes(path.read_bytes()[:-7])
    refused = work.refusal("--latent", "cut.safetensors", "-o", "image.png")
    assert "expected cut.safetensors to be a safetensors file, but got: " in refused
    work.file("batch/a", latent=np.stack([work.latent] * 2))
    work.file("batch/a-1", latent=work.latent)
    refused = work.refusal("--latents", "batch", "-o", "images")
    assert "expected every image to have its own name, but got " in refused


def test_command_knows_latents_of_other_tools(work: Work, tmp_path: Path) -> None:
    assert work.run(*ONE)[0] == 0
    factor, shift = [0.5, *[0.25] * 15], [0.125]
    bundle = edited(
        work.bundle,
        tmp_path / "rules",
        lambda tree: tree["model"].update(
            space="flux",
            latent_convention="z",
            latent_spread=[0.3, 2.0],
            token_width=3,
            comfyui_latent={"factor": factor, "shift": shift},
            partly_denoised="euler",
        ),
    )
    raw = work.latent[None, :, None] / np.array(factor, np.float32)[:, None, None, None] + 0.125
    mark = np.zeros(0, np.float32)
    path = work.folder / work.file("raw", latent_tensor=raw, latent_format_version_0=mark)
    path.rename(path.with_suffix(".latent"))
    one = ("--latent", "raw.latent", *ONE[2:-1], "raw.png")
    note = "raw.latent: raw latents, normalised as this bundle takes them\n"
    assert work.run(*one, bundle=bundle)[::2] == (0, note)
    # A latent is rounded on its way there and back.
    np.testing.assert_allclose(work.pixels("raw.png"), work.pixels("image.png"), rtol=0, atol=1.01)
    assert "bundle does not say how to normalise it; " in work.refusal(*one)
    refused = work.refusal(*one, "--overwrite", "--sigma", 1.2, bundle=bundle)
    assert "a clean latent, and for x0 + sigma noise divide latent and sigma by sqrt(" in refused

    work.file("scaled", latent=7 * work.latent[None])
    scaled = ("--latent", "scaled.safetensors", *ONE[2:-1], "scaled.png")
    told = f"the latent's standard deviation is {7 * work.latent.std():.2f}, "
    code, _, err = work.run(*scaled, bundle=bundle)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith(f"warning: scaled.safetensors: {told}")
    assert err.endswith(
        "but about 1 is expected; normalise it as this bundle takes it: flux latents, z\n"
    )

    for name, latent, message in (
        ("tokens", raw.reshape(1, -1, 3), "these look like tokens [B, n, 3]: unpack them to [B,"),
        ("either", work.latent, "[16, 2, 3]; save one latent as [1, 16, h, w]; if these are tok"),
    ):
        path = work.file(name, latent=latent)
        assert message in work.refusal("--latent", path, "-o", "a.png", bundle=bundle)
    np.savez(work.folder / "latent.npz", work.latent)
    refused = work.refusal("--latent", "latent.npz", "-o", "a.png")
    assert "to be a safetensors file, but got a ZIP archive, as torch.save and numpy.s" in refused


def in_parts(latent: Floats) -> Floats:
    """Latents `[1, C, h, w]` as FLUX.2's autoencoder would give them, `[1, C / 4, 2 h, 2 w]`."""
    _, channels, height, width = latent.shape
    blocks = latent.reshape(1, channels // 4, 2, 2, height, width)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(1, channels // 4, 2 * height, 2 * width)


def packed(latent: NDArray[Any]) -> NDArray[Any]:
    """Latents `[1, C, h, w]` as tokens `[1, h w / 4, 4 C]`."""
    _, channels, height, width = latent.shape
    grid = latent.reshape(1, channels, height // 2, 2, width // 2, 2)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(1, -1, 4 * channels)


def test_command_reads_latents_of_every_form_as_python_does(work: Work, tmp_path: Path) -> None:
    rule = {"factor": [0.5], "shift": [0.25]}
    model = {"comfyui_latent": rule, "token_width": 64, "captioned": False}
    bundle = edited(work.bundle, tmp_path / "forms", lambda tree: tree["model"].update(model))
    manifest = read_manifest(bundle, verify=False)
    numbers = np.random.default_rng(4).standard_normal((1, 16, 4, 2))
    plain, square = (numbers[:, :, :rows].astype(np.float16) for rows in (4, 2))
    latent = plain.astype(np.float32)
    work.file("plain", latent=plain)
    work.file("square", latent=square)
    mean = np.linspace(-1, 1, 16, dtype=np.float32)
    variance = np.linspace(0.5, 2, 16, dtype=np.float32)
    work.file("ae", **{"bn.running_mean": mean, "bn.running_var": variance})
    spread = np.sqrt(variance + np.float32(1e-4))
    unlike = latent * spread[:, None, None] + mean[:, None, None]
    for dtype in ("<f2", "<f4", "<f8"):
        np.save(work.folder / f"{dtype[1:]}.npy", plain.astype(dtype))
    np.save(work.folder / "columns.npy", np.asfortranarray(latent))
    np.save(work.folder / "tokens.npy", packed(latent))

    normalised = "raw latents, normalised as this bundle takes them"
    made: dict[str, NDArray[Any]] = {}
    for name, file, form, note in (
        ("plain", "plain.safetensors", "auto", None),
        ("normalised", "plain.safetensors", "normalised", None),
        *((name, f"{name}.npy", "auto", None) for name in ("f2", "f4", "f8", "columns")),
        ("raw", work.file("raw", latent=latent / 0.5 + 0.25).name, "raw", normalised),
        ("parts", work.file("parts", latent=in_parts(unlike)).name, "raw:ae.safetensors", None),
        ("unlike", work.file("unlike", latent=unlike).name, "raw:ae.safetensors", normalised),
        ("tokens", "tokens.npy", "packed:16x32", "tokens, unpacked to [1, 16, 4, 2]"),
        ("square", "square.safetensors", "auto", None),
        ("squared", work.file("squared", latent=packed(square)).name, "packed", None),
    ):
        given = ("--latent", file, "--latent-form", form, "-o", f"{name}.png")
        code, _, err = work.run(*given, bundle=bundle)
        assert code == 0 and (note is None or err == f"{file}: {note}\n"), err
        assert work.run(*given, "--overwrite", "--quiet", bundle=bundle)[::2] == (0, "")
        made[name] = work.pixels(f"{name}.png").astype(int)
        kind, _, more = form.partition(":")
        python = open_latent_file(
            work.folder / file,
            manifest,
            form=LatentForm(
                kind,
                (16, 32) if kind == "packed" and more else None,
                work.folder / more if kind == "raw" and more else None,
            ),
        )
        wanted = square if name.startswith("square") else latent
        np.testing.assert_allclose(python.latent.read(), wanted, rtol=0, atol=1e-6)
    for name in ("normalised", "f2", "f4", "f8", "columns", "tokens"):
        np.testing.assert_array_equal(made[name], made["plain"])
    for name in ("raw", "parts", "unlike"):  # rounded on the way there and back
        assert np.abs(made[name] - made["plain"]).max() <= 1
    np.testing.assert_array_equal(made["squared"], made["square"])


def test_command_refuses_forms_that_a_latent_does_not_have(work: Work, tmp_path: Path) -> None:
    tokens = edited(
        work.bundle, tmp_path / "tokens", lambda tree: tree["model"].update(token_width=64)
    )
    flux2 = edited(
        work.bundle, tmp_path / "flux2", lambda tree: tree["model"].update(space="flux2")
    )
    work.file("tokens", latent=np.ones((1, 8, 64), np.float32))
    work.file("parts", latent=np.ones((1, 4, 4, 3), np.float32))
    work.file("ae", **{"bn.running_mean": np.ones(16, np.float32)})
    work.file("flux2_ae", **{f"bn.running_{n}": np.ones(16, np.float32) for n in ("mean", "var")})
    np.save(work.folder / "whole.npy", work.latent)
    whole = (work.folder / "whole.npy").read_bytes()
    for name, content in (
        ("cut", whole[:-1]),
        ("short", whole[:9]),
        ("long", whole[:8] + b"\xff\xff" + whole[10:]),
        ("shapeless", whole.replace(b"'shape'", b"'chape'")),
        ("huge", whole.replace(b"(16, 2, 3), ", b"(16, 2, %d), " % 10**14)),
        ("objects", whole.replace(b"<f4", b"|O8")),
    ):
        (work.folder / f"{name}.npy").write_bytes(content)
    np.save(work.folder / "numbers.npy", work.latent.astype(np.int32))
    for file, form, bundle, message in (
        ("latent.safetensors", "tokens", None, "raw, packed, raw:FILE or packed:1024x768, but got"),
        ("latent.safetensors", "auto:16x16", None, "but got 'auto:16x16'"),
        ("latent.safetensors", "raw:", None, "but got 'raw:'"),
        ("latent.safetensors", "packed:16", None, "but got 'packed:16'"),
        ("latent.safetensors", "raw", None, "a raw one, and this bundle does not say how to norm"),
        ("latent.safetensors", "packed", None, "expected a bundle whose latents are ever packed"),
        ("latent.safetensors", "packed", tokens, "expected tokens [B, n, 64] in latent.safetensor"),
        ("tokens.safetensors", "packed", tokens, "expected tokens of a square, but tokens.safete"),
        ("tokens.safetensors", "packed:64x64", tokens, "of 64x64, but tokens.safetensors has 8, o"),
        ("parts.safetensors", "auto", flux2, "got raw ones, [1, 4, 4, 3]; name the file of FLUX.2"),
        ("parts.safetensors", "raw:absent", flux2, "expected a safetensors file, but absent is no"),
        ("parts.safetensors", "raw:ae.safetensors", flux2, "of 16 channels in ae.safetensors, but"),
        ("parts.safetensors", "raw:flux2_ae.safetensors", flux2, "of even height and width in par"),
        ("cut.npy", "auto", None, "cannot read it: it is shorter than its header says"),
        ("short.npy", "auto", None, "cannot read it: its header is longer than the file"),
        ("long.npy", "auto", None, "cannot read it: its header is longer than the file"),
        ("shapeless.npy", "auto", None, "its header does not describe an array of numbers"),
        ("huge.npy", "auto", None, "cannot read it: it is shorter than its header says"),
        ("objects.npy", "auto", None, "to be F32, F16, BF16, but got |O8"),
        ("numbers.npy", "auto", None, "to be F32, F16, BF16, but got <i4; convert it to float32"),
    ):
        given = ("--latent", file, "--latent-form", form, "-o", "a.png")
        assert message in work.refusal(*given, bundle=bundle), (file, form)


def test_command_refuses_damaged_bundles(work: Work, tmp_path: Path) -> None:
    bundle = edited(
        work.bundle, tmp_path / "later", lambda tree: tree.update(format_version=[2, 0])
    )
    assert "expected bundle format 1.x" in work.refusal(*ONE, bundle=bundle)
    assert "expected a bundle" in work.refusal(*ONE, bundle=tmp_path)
    shutil.copytree(work.bundle, tmp_path / "altered")
    graph = tmp_path / "altered" / "latent.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    assert "latent.onnx was altered" in work.refusal(*ONE, bundle=tmp_path / "altered")


def test_command_refuses_an_image_of_nan(work: Work, spoilt_bundle: Path) -> None:
    refused = work.refusal(*ONE, bundle=spoilt_bundle)
    assert "latent.safetensors: expected a finite image, but step 3 of 4 gave NaN or inf" in refused


def test_command_leaves_nothing_half_written_when_interrupted(work: Work) -> None:
    for number in range(40):
        work.file(f"latents/{number}", latent=np.zeros((16, 8, 8), np.float32))
    images = work.folder / "images"
    command = work.command("--latents", "latents", "-o", "images", "--no-verify")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=work.folder)
    deadline = time.monotonic() + 120
    while not any(images.glob("*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("pid-decode-cpp: interrupted\n")
    written = os.listdir(images)
    assert 0 < len(written) < 40 and all(name.endswith(".png") for name in written)
    assert all(work.pixels(f"images/{name}").shape == (256, 256, 3) for name in written)


def test_command_shows_progress_on_a_terminal(work: Work) -> None:
    for quiet in (False, True):
        main, secondary = os.openpty()
        options = ("--overwrite", "--no-verify", *(["--quiet"] if quiet else []))
        done = subprocess.run(
            work.command(*ONE, *options),
            stdout=subprocess.DEVNULL,
            stderr=secondary,
            cwd=work.folder,
            check=False,
        )
        os.close(secondary)
        shown = b""
        try:
            while part := os.read(main, 4096):
                shown += part
        except OSError:  # nobody writes any more
            pass
        os.close(main)
        assert done.returncode == 0
        assert (b"Decoding" in shown) == (not quiet), shown


def test_command_ends_quietly_when_nobody_reads(work: Work) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        work.command(*ONE), stdout=writer, stderr=subprocess.PIPE, cwd=work.folder, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("header", "flavor", "version"),
    [
        (
            "#define TRT_MAJOR_RTX 1\n#define TRT_MINOR_RTX 7\n#define TRT_PATCH_RTX 1\n"
            "#define TRT_BUILD_RTX 116\n#define NV_TENSORRT_MAJOR TRT_MAJOR_RTX\n",
            "tensorrt-rtx",
            "1.7.1.116",
        ),
        (
            "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n"
            "#define TRT_PATCH_ENTERPRISE 0\n#define TRT_BUILD_ENTERPRISE 106\n",
            "tensorrt",
            "11.1.0.106",
        ),
    ],
)
def test_a_library_has_the_flavor_that_engine_sets_have(
    tmp_path: Path, header: str, flavor: str, version: str
) -> None:
    include = tmp_path / "include"
    include.mkdir()
    for name, text in (("NvInferVersion.h", header), ("NvInfer.h", ""), ("cuda.h", "")):
        (include / name).write_text(text)
    (tmp_path / "lib.so").touch()
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(find NONE)\n"
        f"list(APPEND CMAKE_MODULE_PATH {ROOT / 'cmake'})\nfind_package(TensorRT REQUIRED)\n"
        'message(STATUS "found ${TensorRT_FLAVOR} ${TensorRT_VERSION}")\n'
    )
    places = {"TENSORRT_INCLUDE": include, "CUDA_INCLUDE": include}
    done = subprocess.run(
        [
            tool("cmake"),
            *(f"-DPID_{name}_DIR={place}" for name, place in places.items()),
            f"-DPID_TENSORRT_LIBRARY={tmp_path / 'lib.so'}",
            *("-S", str(tmp_path), "-B", str(tmp_path / "build")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"found {flavor} {version}\n" in done.stdout, done.stderr
    assert flavor in FLAVORS


FLAGS_OF_ONE = {
    "--provider-library": "Python finds plug-in providers by their packages",
}
"""Flags that one of the two commands does not have, and why."""


def test_commands_have_the_same_flags(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(text: str) -> set[str]:
        options = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  -")]
        return set(re.findall(r"--[a-z-]+", " ".join(options)))

    with pytest.raises(SystemExit):
        decode_cli.main(["--help"])
    python, cpp = flags(capsys.readouterr().out), flags(work.run("--help")[1])
    assert len(python & cpp) > 20
    assert python ^ cpp == set(FLAGS_OF_ONE)


def test_command_has_help_and_a_version(work: Work) -> None:
    code, out, err = work.run("--help")
    assert (code, err) == (0, "")
    assert "pid-decode-cpp flux-2k --latent latent.safetensors" in out
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and work.run("--version") == (0, f"pid-decode-cpp {version[1]}\n", "")
