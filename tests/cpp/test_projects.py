"""The C++ runtime in other projects: those of docs/embedding.md."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpp_build import BUILD, SANITIZED, build, executable, run, tool
from pid_runtime.decoder import Decoder
from places import ROOT


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
    built: Path, dependencies: Path, data: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    run(tool("cmake"), "--install", built, "--prefix", prefix)
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


@pytest.mark.parametrize("kind", ["shared", pytest.param("static", marks=pytest.mark.slow)])
def test_a_program_by_pkg_config(
    kind: str, request: pytest.FixtureRequest, dependencies: Path, data: Path, tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config: install pkgconf")
    made: Path = request.getfixturevalue({"shared": "built", "static": "sanitized"}[kind])
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


@pytest.mark.slow
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
