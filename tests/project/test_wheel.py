"""The wheel, where nothing is installed but what it asks for."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from places import ROOT

EditBundle = Callable[..., Path]

COMMANDS = {
    "pid-bench": (("--dry-run",), "bench"),
    "pid-build": (("{bundle}",), "engines"),
    "pid-calibrate": (("{bundle}", "-o", "calibration.json"), "export"),
    "pid-caption": (("--text", "a", "-o", "caption.safetensors"), "pipelines"),
    "pid-decode": (("{bundle}", "--latent", "{latent}", "-o", "image.png"), "cpu"),
    "pid-export": (("--space", "nano", "-o", "nano"), "export"),
    "pid-generate": (
        ("{bundle}", "--prompt", "a", "--size", "128x128", "--backbone", "flux", "-o", "image.png"),
        "pipelines",
    ),
    "pid-serve": (("{bundle}",), "serve"),
    "pid-upscale": (("{bundle}", "{photo}", "-o", "image.png"), "pipelines"),
    "pid-verify": (("{bundle}",), "export"),
}
"""Every command: a run that needs more than the wheel asks for, and the extra that has it."""


def build(folder: Path, target: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


def required(name: str, found: set[str]) -> set[str]:
    """A distribution and all that it needs, without extras."""
    if name not in found:
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            if ";" not in line:
                required(re.split(r"[^A-Za-z0-9_.-]", line)[0], found)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and what it needs."""
    wheel = build(tmp_path_factory.mktemp("wheel"), "wheel")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    metadata = next(site.glob("*.dist-info")).joinpath("METADATA").read_text()
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.M)
    assert {"numpy", "safetensors"} <= set(needed) and "onnxruntime" not in needed
    names: set[str] = set()
    for name in needed:
        required(name, names)
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return site


def run(site: Path, folder: Path, command: str, *arguments: str) -> tuple[int, str, str]:
    code = (
        "import sys; from importlib.metadata import entry_points; sys.argv[0] = sys.argv[1]; "
        "(entry,) = entry_points(group='console_scripts', name=sys.argv.pop(1)); "
        "sys.exit(entry.load()())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, command, *arguments],
        env={"PYTHONPATH": str(site)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_says_what_to_install(
    site: Path, edit_bundle: EditBundle, tmp_path: Path, command: str
) -> None:
    code, out, err = run(site, tmp_path, command, "--help")
    assert (code, err) == (0, "") and "examples:" in out
    latent = tmp_path / "latent.safetensors"
    save_file({"latent": np.ones((1, 16, 2, 3), np.float32)}, latent)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(photo)
    bundle = edit_bundle(lambda manifest: manifest["model"].update(space="flux"))
    arguments, extra = COMMANDS[command]
    before = sorted(tmp_path.iterdir())
    code, out, err = run(
        site,
        tmp_path,
        command,
        *(a.format(bundle=bundle, latent=latent, photo=photo) for a in arguments),
    )
    assert (code, out) == (2, ""), err
    assert err.startswith(f"{command}: expected ") and err.count("\n") == 1, err
    assert f"pip install 'pid-trt[{extra}" in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_repository_for_triton_needs_no_extra(
    site: Path, golden_bundle: Path, tmp_path: Path
) -> None:
    code, out, err = run(site, tmp_path, "pid-triton", str(golden_bundle), "-o", "models")
    assert (code, err) == (0, "") and "tritonserver --model-repository models" in out


def test_the_doctor_needs_no_extra(site: Path, tmp_path: Path) -> None:
    code, out, err = run(site, tmp_path, "pid-doctor", "--help")
    assert (code, err) == (0, "") and "examples:" in out
    code, out, err = run(site, tmp_path, "pid-doctor")
    assert (code, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("next: no backend: pip install 'pid-trt[cpu]'")
    assert "missing  without onnxruntime\n" in out


def test_every_command_is_tried(site: Path) -> None:
    text = next(site.glob("pid_trt-*.dist-info")).joinpath("entry_points.txt").read_text()
    assert set(re.findall(r"^(pid-\w+) =", text, re.M)) == {*COMMANDS, "pid-doctor", "pid-triton"}


def test_a_command_says_the_version_of_the_wheel(site: Path, tmp_path: Path) -> None:
    version = importlib.metadata.version("pid-trt")
    assert run(site, tmp_path, "pid-decode", "--version") == (0, f"pid-decode {version}\n", "")


def test_the_archives_hold_the_packages_and_nothing_else(site: Path, tmp_path: Path) -> None:
    own = {file.name for file in site.iterdir() if not file.is_symlink()}
    others = {"pid_pipelines", "pid_serve", "pid_export", "pid_engines", "pid_bench"}
    packages = {"pid_ref", "pid_runtime", *others}
    assert {name for name in own if not name.endswith(".dist-info")} == packages
    assert all((site / package / "py.typed").is_file() for package in packages)
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    hidden = {".gitignore"}  # hatchling always adds it
    assert {name for name in names if name.startswith(".")} <= hidden
    assert {"README.md", "LICENSE", "NOTICE", "runtime/pid_runtime/decoder.py"} <= set(names)
