"""Everything that a GPU can tell about pid-trt, in one file to send: `make gpu-report`.

Runs pid-doctor, also on a bundle of `nano`, the tests that need a GPU, and pid-bench on the full
network with random weights and on the quick cascades, in at most 25 minutes. What fails or takes
too long is recorded with the last lines it printed, and the rest still runs.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pid_runtime import __version__
from pid_runtime.bundle.files import write_whole
from pid_runtime.command import console
from pid_runtime.errors import PidRuntimeError

FORMAT = "pid-gpu-report"

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
"""Where the commands of this environment are."""

LAST_LINES = 40
"""Of what a part printed, kept for each of its streams."""

PATIENCE = 10.0
"""Seconds a part has to end by itself when its time is over."""

MORE_BACKENDS = {
    "onnxruntime cuda": "onnxruntime",
    "tensorrt-rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
    "onnxruntime nvtensorrtrtx": "onnxruntime-rtx",
}
"""Of pid-bench, measured where the doctor finds that they load; by the doctor's name."""


@dataclass(frozen=True)
class Part:
    """A command to run."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds it may take."""


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    name: str
    command: str
    seconds: float
    exit_code: int | None
    """None when its time was over."""
    result: Any = None
    """What it printed, if that was JSON."""
    stdout: list[str] = field(default_factory=list[str])
    """Last lines, if it was not."""
    stderr: list[str] = field(default_factory=list[str])
    """Last lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 when a part failed, 2 without a GPU."""
    return console.run(_parser(), _report, argv, also=(OSError,))


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "gpu_report.py",
        "Check and measure pid-trt on this machine's GPU; leaves one file to send.",
        "examples:\n  make gpu-report\n  python tools/gpu_report.py -o rtx-4090.json",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("gpu-report.json"), help="the file to write"
    )
    parser.add_argument(
        "--minutes", type=float, default=25.0, metavar="N", help="most to take (default: 25)"
    )
    return parser


def _report(arguments: Namespace) -> int:
    output: Path = arguments.output.resolve()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".gpu-report-", dir=output.parent) as name:
        folder = Path(name)
        doctor = run_part(Part("doctor", (_command("pid-doctor"), "--json"), 120), folder)
        if doctor.result is not None and not _that_are_ok(doctor.result, "gpu"):
            raise PidRuntimeError(
                "expected an NVIDIA GPU, but pid-doctor finds none; run this on a machine with one"
            )
        outcomes = [doctor]
        for part in parts(folder, _that_are_ok(doctor.result, "backend")):
            left = begin + 60 * arguments.minutes - time.monotonic() - PATIENCE
            words = shlex.join(part.command)
            if left > 0:
                limited = replace(part, limit=min(part.limit, left))
                sys.stderr.write(f"{part.name}, at most {limited.limit:.0f} s: {words}\n")
                outcomes.append(run_part(limited, folder))
            else:
                outcomes.append(Outcome(part.name, words, 0.0, None, stderr=["no time was left"]))
            _write(output, outcomes, folder)
    rows = [(each.name, _verdict(each), f"{each.seconds:.0f} s") for each in outcomes]
    text = f"{console.aligned(rows, left=(0, 1))}\n{output}"
    console.emit({"report": str(output)}, text, as_json=arguments.json)
    return 0 if all(each.exit_code == 0 for each in outcomes) else 1


def parts(folder: Path, loading: Sequence[str]) -> list[Part]:
    """What to run after the first look; loading: the doctor's names of the backends that load."""
    nano, bench = str(folder / "nano"), str(folder / "bench")
    measure = (
        *(_command("pid-bench"), "--device", "cuda", "--precision", "bf16", "--repeats", "5"),
        *("--quiet", "-o", bench, "--size", "2048x2048,4096x4096", "--backends"),
    )
    alone = ("--cascades", "none")
    return [
        Part("nano", (_command("pid-export"), "--space", "nano", "-o", nano, "--quiet"), 120),
        Part("decodes", (_command("pid-doctor"), nano, "--json", "--quiet"), 120),
        Part("tests", (_command("python"), "-m", "pytest", "-q", "-m", "gpu"), 420),
        Part("bench torch", (*measure, "torch,eager,public"), 480),
        Part("bench torch-compile", (*measure, "torch-compile", *alone), 300),
        *(
            Part(f"bench {name}", (*measure, name, *alone), 480)
            for found, name in MORE_BACKENDS.items()
            if found in loading
        ),
    ]


def run_part(part: Part, folder: Path) -> Outcome:
    """Run a command, with all that it starts, for no longer than its limit."""
    words = shlex.join(part.command)
    begin = time.monotonic()
    with (folder / "stdout").open("w+b") as out, (folder / "stderr").open("w+b") as err:
        try:
            process = subprocess.Popen(
                part.command, stdout=out, stderr=err, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            return Outcome(part.name, words, 0.0, 127, stderr=[str(error)])
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(part.limit)
        finally:
            _end(process)
        texts: list[str] = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    result: Any = None
    with contextlib.suppress(ValueError):
        result = json.loads(texts[0])
    last = [text.splitlines()[-LAST_LINES:] for text in texts]
    seconds = round(time.monotonic() - begin, 1)
    printed = [] if result is not None else last[0]
    return Outcome(part.name, words, seconds, code, result, printed, last[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its group that is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def _that_are_ok(doctor: Any, part: str) -> list[str]:
    """Names of the doctor's findings about a part that are ok, but for what builds no engines."""
    found = doctor["findings"] if isinstance(doctor, dict) else []
    return [
        each["name"]
        for each in found
        if (each["part"], each["state"]) == (part, "ok") and each["values"].get("builds", True)
    ]


def _write(output: Path, outcomes: Sequence[Outcome], folder: Path) -> None:
    bench = folder / "bench" / "report.json"
    report = {
        "format": FORMAT,
        "version": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parts": [asdict(each) for each in outcomes],
        "bench": json.loads(bench.read_text("utf-8")) if bench.is_file() else None,
    }
    write_whole(output, json.dumps(report, indent=1))


def _verdict(outcome: Outcome) -> str:
    if outcome.exit_code is None:
        return "took too long"
    return "ok" if outcome.exit_code == 0 else f"failed, exit code {outcome.exit_code}"


def _command(name: str) -> str:
    return str(BIN / name)


if __name__ == "__main__":
    sys.exit(main())
