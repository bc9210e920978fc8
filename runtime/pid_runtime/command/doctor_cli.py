"""The `pid-doctor` command: what of pid-trt works on this machine, and what to install next."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pid_runtime import __version__
from pid_runtime.backends.choice import INSTALL_ONNXRUNTIME
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.manifest import MANIFEST_FILE
from pid_runtime.command import console
from pid_runtime.command.doctor_bundle import decodes, engines, files
from pid_runtime.command.doctor_checks import Finding, backends, gpus, machine, packages
from pid_runtime.errors import PidRuntimeError

_EXAMPLES = """examples:
  pid-doctor           packages, GPUs, and the backends that load
  pid-doctor nano      also whether the bundle is whole, which of its engines run here, and a small
                       decode by every backend, compared with the known image or with each other
  pid-doctor --json    for programs, and to send with a question

states:
  ok       it is there and works
  missing  it is not there, which is no fault: install it if you want it
  wrong    it is there but does not work; the line says why, and the exit code is 1
"""

_ON_GPU = ("onnxruntime cuda", "onnxruntime nvtensorrtrtx", "torch cuda", *FLAVORS)
"""Backends that decode on a GPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _examine, argv)


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-doctor", "Say what of pid-trt works on this machine.", _EXAMPLES
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle's folder, to decode with")
    return parser


def _examine(arguments: Namespace) -> int:
    bundle: Path | None = arguments.bundle
    if bundle is not None and not (bundle / MANIFEST_FILE).is_file():
        raise PidRuntimeError(
            f"expected a bundle (a folder with {MANIFEST_FILE}), but got {bundle}; "
            "make one with pid-export"
        )
    found = [*machine(), *packages(), *gpus()]
    found += backends(has_gpu=bool(_ok(found, "gpu")), target=_architecture(found))
    if bundle is not None:
        found += _of_bundle(bundle, found, quiet=arguments.quiet)
    works = not any(each.state == "wrong" for each in found)
    advice = _next_step(found, bundle)
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


def _of_bundle(bundle: Path, found: Sequence[Finding], *, quiet: bool) -> list[Finding]:
    manifest, whole = files(bundle)
    if manifest is None:
        return [whole]
    loading = {each.name: each for each in _ok(found, "backend")}
    versions = {
        each.name: each.values["version"]
        for each in found
        if each.part == "backend" and "version" in each.values
    }
    targets = _targets(found)
    sets = engines(bundle, manifest, versions, targets[0] if targets else None)
    ways = [name for name in loading if name not in FLAVORS]
    if loading.keys() & FLAVORS and targets and (not sets or _ok(sets, "engines")):
        ways.append("tensorrt")
    with console.progress("Decoding", len(ways), quiet=quiet) as advance:
        return [whole, *sets, *decodes(bundle, manifest, ways, advance)]


def _next_step(found: Sequence[Finding], bundle: Path | None) -> str:
    """The one thing to do next: mend what is wrong, else add what is wanted most."""
    details = {(each.part, each.name): each.detail for each in found}
    for each in found:
        if each.state == "wrong":
            return f"mend what is wrong, first {each.part} {each.name}: {each.detail}"
    usable = {each.name for each in _ok(found, "backend")}
    if not _targets(found):
        usable -= {*FLAVORS}  # engines need cuda-python and a GPU
    if not usable:
        return f"no backend: {INSTALL_ONNXRUNTIME}"
    if _ok(found, "gpu") and not usable & {*_ON_GPU}:
        cure = details.get(("backend", "onnxruntime cuda"), INSTALL_ONNXRUNTIME)
        return f"nothing uses the GPU: {cure}"
    if bundle is None and not any(each.name == "export" for each in _ok(found, "extra")):
        return "no bundle: pip install 'pid-trt[export]' makes them, or copy one here"
    if bundle is None:
        return "try a decode: pid-export --space nano -o nano, and then pid-doctor nano"
    if not _ok(found, "decode"):
        return "nothing decodes this bundle: the lines above say what each backend wants"
    return "nothing is wrong; what is missing may be installed"


def _architecture(found: Sequence[Finding]) -> str | None:
    """That of the GPU, as sm89, also if only nvidia-smi sees it."""
    capabilities = [each.values.get("compute_capability", "") for each in _ok(found, "gpu")]
    numbers = [text.replace(".", "") for text in capabilities]
    listed = [f"sm{number}" for number in numbers if number.isdecimal()]
    return next(iter([*_targets(found), *listed]), None)


def _targets(found: Sequence[Finding]) -> list[str]:
    """Architectures of GPUs that cuda-python sees, as sm89."""
    return [each.values["target"] for each in _ok(found, "gpu") if "target" in each.values]


def _ok(found: Sequence[Finding], part: str) -> list[Finding]:
    return [each for each in found if each.part == part and each.state == "ok"]
