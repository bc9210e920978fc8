"""Ray clusters of two nodes on this machine, and commands on them."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from places import ROOT

Kill = Callable[[str], int]


def make_ray_python(folder: Path) -> Path:
    """A Python with Ray, and all that is installed here: its packages are many, and for this."""
    python = folder / "venv" / "bin" / "python"
    if (folder / "done").exists():
        return python
    own = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # What is here already, of the versions that are here, is found there.
    given = ["-c", ROOT / "constraints.txt", "--target", folder / "ray", "ray[data,serve]<2.64"]
    if subprocess.run([*own, *given], check=False).returncode:
        pytest.skip("pip could not get ray[data,serve]")
    base = os.path.realpath(sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    paths = [folder / "ray", ROOT / "runtime", ROOT, sysconfig.get_path("purelib")]
    (packages / "tree.pth").write_text("\n".join(map(str, paths)))
    (folder / "done").touch()
    return python


@contextlib.contextmanager
def two_nodes(python: Path) -> Generator[tuple[str, Kill]]:
    """A cluster; gives its address, and what kills a process by how its title begins.

    That returns the process's number, 0 if there is none.
    """
    command = [python, ROOT / "tests" / "ray_cluster.py"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def kill(title: str) -> int:
            stdin.write(f"{title}\n")
            stdin.flush()
            return int(stdout.readline())

        try:
            yield stdout.readline().strip(), kill
        finally:
            stdin.close()
            process.wait(120)


def run_on_cluster(
    python: Path, command: str, *arguments: object, images: Path, kill_after: int
) -> tuple[int, str, str]:
    """Run a command on a cluster, and kill an actor once `images` has so many files.

    command: as in `pid_runtime.command.entry`. Returns exit code, stdout, and stderr without the
    lines of Ray's own, which begin with their time.
    """
    start = f"from pid_runtime.command.entry import {command}; raise SystemExit({command}())"
    killed: list[int] = []
    with two_nodes(python) as (address, kill):
        process = subprocess.Popen(
            [python, "-c", start, *map(str, arguments), "--ray", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def kill_one() -> None:
            while process.poll() is None and not any(killed):
                if images.is_dir() and len(list(images.iterdir())) >= kill_after:
                    killed.append(kill("ray::MapWorker"))
                time.sleep(0.05)

        thread = threading.Thread(target=kill_one)
        thread.start()
        out, err = process.communicate(timeout=300)
        thread.join()
    assert any(killed), err
    own = [line for line in err.splitlines(keepends=True) if not line.startswith("[20")]
    return process.returncode, out, "".join(own)
