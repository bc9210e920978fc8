"""What the C++ runtime is built with, given in several ways."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cpp_build import build, get_dependencies, tool
from pid_runtime.bundle.flavors import FLAVORS
from places import ROOT


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

    def libraries() -> dict[Path, tuple[int, int]]:
        found = {path: path.lstat() for path in (folder / "lib").glob("libonnxruntime*")}
        return {path: (about.st_ino, about.st_mtime_ns) for path, about in found.items()}

    before = libraries()
    assert len(before) > 3 and get_dependencies(folder, archive) == (0, "")
    assert libraries() == before  # or all would be linked again, or not start meanwhile


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
