"""The `pid-doctor` command: what of pid-trt works on this machine, and what to install next."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from pid_runtime import __version__
from pid_runtime.backends.choice import INSTALL_ONNXRUNTIME
from pid_runtime.command import console
from pid_runtime.command.doctor_checks import Finding, backends, gpus, machine, packages

_EXAMPLES = """examples:
  pid-doctor           packages, GPUs, and the backends that load
  pid-doctor --json    the same for programs, and to send with a question

states:
  ok       it is there and works
  missing  it is not there, which is no fault: install it if you want it
  wrong    it is there but does not work; the line says why, and the exit code is 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _examine, argv)


def _parser() -> console.ArgumentParser:
    return console.ArgumentParser(
        "pid-doctor", "Say what of pid-trt works on this machine.", _EXAMPLES
    )


def _examine(arguments: Namespace) -> int:
    found = [*machine(), *packages(), *gpus()]
    found += backends(has_gpu=_has(found, "gpu"))
    works = not any(each.state == "wrong" for each in found)
    advice = next_step(found)
    result = {
        "version": __version__,
        "works": works,
        "findings": [asdict(each) for each in found],
        "next": advice,
    }
    rows = [(each.part, each.name, each.state, each.detail) for each in found]
    text = f"{console.aligned(rows, left=range(4))}\nnext: {advice}"
    console.emit(result, text, as_json=arguments.json)
    return 0 if works else 1


def next_step(found: Sequence[Finding]) -> str:
    """The one thing to do next: mend what is wrong, else install what is wanted most."""
    wrong = [each for each in found if each.state == "wrong"]
    if wrong:
        return f"mend what is wrong, first {wrong[0].part} {wrong[0].name}: {wrong[0].detail}"
    if not _has(found, "backend"):
        return f"no backend: {INSTALL_ONNXRUNTIME}"
    return "nothing to install"


def _has(found: Sequence[Finding], part: str) -> bool:
    return any(each.part == part and each.state == "ok" for each in found)
