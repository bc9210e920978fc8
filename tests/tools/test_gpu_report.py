"""What `make gpu-report` makes of commands that work, fail, hang or are not there."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_report
import pytest
from gpu_report import Part, _parser, main, parts, run_part

from pid_bench import cli as bench_cli
from pid_export import cli as export_cli
from pid_runtime.command import doctor_cli

RunCommand = Callable[..., tuple[int, str, str]]


def finding(part: str, name: str, state: str = "ok", **values: Any) -> dict[str, Any]:
    return {"part": part, "name": name, "state": state, "values": values}


GPU = finding("gpu", "0")
TORCH = finding("backend", "torch cuda")
ENGINES = (
    finding("backend", "tensorrt", builds=False),
    finding("backend", "tensorrt-rtx", builds=True),
)


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Commands that do nothing, and a function that makes one of them do something in sh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(gpu_report, "BIN", folder)

    def put(name: str, script: str) -> None:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    for name in ("pid-doctor", "pid-export", "pid-bench", "python"):
        put(name, "exit 0")
    return put


def doctor(*findings: dict[str, Any], code: int = 0) -> str:
    return f"echo '{json.dumps({'findings': findings})}'; exit {code}"


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    file = tmp_path / "script"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return (str(file),)


# one part


def test_what_a_part_printed_is_kept(tmp_path: Path) -> None:
    outcome = run_part(Part("a", script(tmp_path, "echo '{\"b\": 1}'; echo note >&2"), 5), tmp_path)
    assert (outcome.exit_code, outcome.result) == (0, {"b": 1})
    assert (outcome.stdout, outcome.stderr) == ([], ["note"])
    text = "for i in $(seq 100); do echo line $i; done; exit 3"
    outcome = run_part(Part("a", script(tmp_path, text), 5), tmp_path)
    assert (outcome.exit_code, outcome.result, outcome.stderr) == (3, None, [])
    assert outcome.stdout == [f"line {number}" for number in range(61, 101)]


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_that_hangs_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(gpu_report, "PATIENCE", 0.2)
    number = tmp_path / "number"
    ignore = "trap '' TERM; " if stubborn else ""
    text = f"{ignore}sleep 60 & echo $! > {number}; echo begun; sleep 60"
    outcome = run_part(Part("a", script(tmp_path, text), 0.5), tmp_path)
    assert (outcome.exit_code, outcome.stdout) == (None, ["begun"])
    assert outcome.seconds < 5
    left = int(number.read_text())
    for _ in range(50):
        if not is_running(left):
            break
        time.sleep(0.1)
    assert not is_running(left)


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
        return Path(f"/proc/{number}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    outcome = run_part(Part("a", (str(tmp_path / "none"),), 5), tmp_path)
    assert outcome.exit_code == 127 and "No such file" in outcome.stderr[0]


# all of them


def report_of(run_command: RunCommand, tmp_path: Path, code: int, *more: str) -> dict[str, Any]:
    output = tmp_path / "report.json"
    found, out, err = run_command(main, "-o", output, *more)
    assert found == code, err
    assert out.endswith(f"\n{output}\n")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    return json.loads(output.read_text())


def test_all_that_runs_is_in_one_file(
    run_command: RunCommand, tmp_path: Path, stand_in: Callable[[str, str], None]
) -> None:
    stand_in("pid-doctor", doctor(GPU, TORCH, *ENGINES))
    bench = 'while [ "$1" != -o ]; do shift; done; mkdir -p "$2"; echo \'{"rows": []}\''
    stand_in("pid-bench", bench + ' > "$2/report.json"')
    report = report_of(run_command, tmp_path, 0)
    assert report["format"] == "pid-gpu-report" and report["bench"] == {"rows": []}
    names = ["doctor", "nano", "decodes", "tests", "bench torch"]
    names += ["bench torch-compile", "bench tensorrt-rtx"]
    assert [part["name"] for part in report["parts"]] == names
    assert report["parts"][0]["result"]["findings"][0] == GPU
    assert "--size 2048x2048,4096x4096 " in report["parts"][4]["command"]
    assert report["parts"][6]["command"].endswith(" tensorrt-rtx --cascades none")


def test_a_part_that_fails_does_not_keep_the_others(
    run_command: RunCommand, tmp_path: Path, stand_in: Callable[[str, str], None]
) -> None:
    stand_in("pid-doctor", doctor(GPU, TORCH, code=1))
    stand_in("python", "echo 2 failed; exit 1")
    report = report_of(run_command, tmp_path, 1)
    by_name = {part["name"]: part for part in report["parts"]}
    assert (by_name["tests"]["exit_code"], by_name["tests"]["stdout"]) == (1, ["2 failed"])
    assert by_name["bench torch"]["exit_code"] == 0 and report["bench"] is None


def test_there_is_an_end(
    run_command: RunCommand,
    tmp_path: Path,
    stand_in: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_report, "PATIENCE", 0.2)
    stand_in("pid-doctor", doctor(GPU, TORCH))
    stand_in("pid-export", "sleep 60")
    begin = time.monotonic()
    report = report_of(run_command, tmp_path, 1, "--minutes", "0.025")
    assert time.monotonic() - begin < 10
    by_name = {part["name"]: part for part in report["parts"]}
    assert by_name["nano"]["exit_code"] is None and by_name["nano"]["seconds"] > 0.5
    assert by_name["bench torch"]["stderr"] == ["no time was left"]


def test_without_a_gpu_it_says_so(
    run_command: RunCommand, tmp_path: Path, stand_in: Callable[[str, str], None]
) -> None:
    stand_in("pid-doctor", doctor(finding("gpu", "0", "missing")))
    code, out, err = run_command(main, "-o", tmp_path / "report.json")
    assert (code, out) == (2, "")
    assert err.startswith("gpu_report.py: expected an NVIDIA GPU, but pid-doctor finds none")
    assert err.count("\n") == 1
    assert not (tmp_path / "report.json").exists()


def test_a_doctor_that_crashes_is_reported_too(
    run_command: RunCommand, tmp_path: Path, stand_in: Callable[[str, str], None]
) -> None:
    stand_in("pid-doctor", "echo Traceback >&2; exit 1")
    report = report_of(run_command, tmp_path, 1)
    assert report["parts"][0]["stderr"] == ["Traceback"] and len(report["parts"]) == 6


def test_options_are_those_of_the_commands(tmp_path: Path) -> None:
    mains = {"pid-export": export_cli, "pid-doctor": doctor_cli, "pid-bench": bench_cli}
    tried: set[str] = set()
    for part in parts(tmp_path, list(gpu_report.MORE_BACKENDS)):
        name = Path(part.command[0]).name
        if name in mains:
            mains[name]._parser().parse_args(part.command[1:])
            tried.add(name)
    assert tried == mains.keys()
    assert sum(part.limit for part in parts(tmp_path, [])) <= 60 * _parser().parse_args([]).minutes
