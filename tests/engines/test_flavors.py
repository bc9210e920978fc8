"""The builders of both libraries: what they build for, and what drives them."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from pid_engines import flavors
from pid_engines.errors import BuildInputError
from pid_engines.flavors import find_flavor, parse_targets
from pid_runtime.bundle.flavors import FLAVORS
from places import ROOT


def test_targets_of_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavors, "gpu_target", lambda: "sm90")
    trt, rtx = FLAVORS["tensorrt"], FLAVORS["tensorrt-rtx"]
    assert parse_targets(None, trt) == parse_targets("sm90", trt) == ("sm90",)
    assert parse_targets("current", trt) == ("sm90",)
    assert parse_targets(None, rtx) == ("sm86", "sm89", "sm120")
    assert parse_targets(None, rtx, oldest=89) == ("sm89", "sm120")
    assert parse_targets(" sm120, sm86", rtx) == ("sm86", "sm120")
    with pytest.raises(
        BuildInputError, match=r"for the GPU that is there \(sm90\), but got 'sm89'"
    ):
        parse_targets("sm89", trt)
    with pytest.raises(BuildInputError, match="but got 'sm90'"):
        parse_targets("current", rtx)


@pytest.mark.parametrize("version", [None, "0.49.26"])
def test_polygraphy_drives_the_builders(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    def found(name: str) -> str:
        assert name == "polygraphy"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(flavors.metadata, "version", found)
    monkeypatch.setattr(flavors, "library_version", lambda flavor: "1.7.1.116")
    with pytest.raises(BuildInputError) as caught:
        find_flavor("auto")
    assert str(caught.value) == (
        f"expected polygraphy {flavors.OLDEST_POLYGRAPHY} or newer, which drives TensorRT for RTX, "
        f"but got {version or 'none'}; pip install 'pid-trt[tensorrt-rtx]'"
    )


def test_the_oldest_polygraphy_is_that_of_the_extras() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    wanted = f'"polygraphy>={flavors.OLDEST_POLYGRAPHY}"'
    assert project.count(wanted) == project.count('"polygraphy') == len(FLAVORS)


def test_polygraphy_is_told_the_library() -> None:
    """In a process of its own, whatever the user's environment says."""
    script = (
        "from pid_engines.flavors import load_polygraphy\n"
        "from pid_runtime.bundle.flavors import FLAVORS\n"
        "print(load_polygraphy(FLAVORS[{name!r}]).config.USE_TENSORRT_RTX)"
    )
    for name, other, told in (("tensorrt", "1", "False"), ("tensorrt-rtx", "0", "True")):
        run = subprocess.run(
            [sys.executable, "-c", script.format(name=name)],
            env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": other},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == told
