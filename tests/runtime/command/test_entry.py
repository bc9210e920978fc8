"""Where commands begin: in a process that has loaded nothing yet."""

import importlib
import re
import subprocess
import sys
from typing import Any

import pytest

from pid_runtime.command import entry
from places import ROOT

SCRIPTS = dict(
    re.findall(
        r'^(pid-\w+) = "pid_runtime\.command\.entry:(\w+)"$',
        (ROOT / "pyproject.toml").read_text(),
        re.M,
    )
)


@pytest.mark.parametrize("command", SCRIPTS)
def test_an_interrupt_while_modules_load(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        raise KeyboardInterrupt

    begin = getattr(entry, SCRIPTS[command])
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", load)
        assert begin() == 130
    assert capsys.readouterr() == ("", f"{command}: interrupted\n")
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as done:
        begin()
    assert done.value.code == 0 and capsys.readouterr().out.startswith(f"{command} ")
    assert callable(importlib.import_module(asked[0]).main)


def test_every_command_begins_here() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    scripts = text.partition("[project.scripts]")[2].partition("\n\n")[0]
    assert len(SCRIPTS) == scripts.count(" = ") > 7


def test_beginning_loads_little() -> None:
    code = "import sys, pid_runtime.command.entry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pid_runtime.command.entry" in loaded
    assert not loaded & {"numpy", "argparse", "torch", "onnx", "pid_runtime.decoder"}
