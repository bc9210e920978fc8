"""Files and folders that appear whole or not at all."""

import os
import subprocess
from pathlib import Path

import pytest

from pid_runtime.bundle.files import partial_name, whole_file, whole_folder, write_whole
from pid_runtime.errors import PidRuntimeError


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "one")
    path.chmod(0o640)
    write_whole(path, b"two")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_one_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fail() -> None:
        with whole_file(path) as aside:
            aside.write_text("half of t")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "one"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    path = tmp_path / ("long [name]" * 20 + ".txt")
    dead = tmp_path / partial_name(path, "a").replace(f".{os.getpid()}.", f".{process.pid}.")
    alive = tmp_path / partial_name(path, "b")
    other = tmp_path / f".other.{process.pid}.a.partial"
    for left in (dead, alive, other):
        left.write_text("half")
    write_whole(path, "whole")
    assert set(tmp_path.iterdir()) == {path, alive, other}


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with whole_folder(path) as aside:
        (aside / "a.txt").write_text("one")
        assert not path.exists() and aside.parent == path.parent
    assert list(path.parent.iterdir()) == [path] and path.stat().st_mode & 0o777 == 0o755
    assert (path / "a.txt").read_text() == "one"


@pytest.mark.parametrize("theirs", [True, False])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path, theirs: bool) -> None:
    path = tmp_path / "folder"

    def fail() -> None:
        with whole_folder(path) as aside:
            (aside / "a.txt").write_text("half of t")
            if not theirs:
                raise RuntimeError("stop")
            path.mkdir()
            (path / "theirs").write_text("precious")

    with pytest.raises(PidRuntimeError if theirs else RuntimeError, match=r"exists already|stop"):
        fail()
    assert list(tmp_path.iterdir()) == ([path] if theirs else [])


def test_a_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    path = tmp_path / ("long [name]" * 20)
    dead = tmp_path / partial_name(path, "a").replace(f".{os.getpid()}.", f".{process.pid}.")
    alive = tmp_path / partial_name(path, "b")
    for left in (dead, alive):
        left.mkdir()
        (left / "a.txt").write_text("half")
    with whole_folder(path):
        pass
    assert set(tmp_path.iterdir()) == {path, alive}
