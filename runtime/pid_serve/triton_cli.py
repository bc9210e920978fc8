"""The `pid-triton` command: a model repository for Triton of a bundle."""

import argparse
import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pid_runtime.backends.choice import BACKENDS, HOST_BACKENDS
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.errors import PidRuntimeError
from pid_runtime.request import check_fits
from pid_runtime.tiles import pixels_per_latent_pixel
from pid_serve.triton_model import BUNDLE

_MODEL = '''"""Written by pid-triton: the model is pid-trt's."""

from pid_serve.triton_model import TritonPythonModel  # noqa: F401
'''

_EXAMPLES = """examples:
  pid-triton nano -o model_repository
  tritonserver --model-repository model_repository
  pid-triton flux-2k -o model_repository --backend tensorrt --gpus 0,1 --batch 4

The Python of the server needs pid-trt: pip install 'pid-trt[cpu]' there, or the extra that the
backend needs.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _write, argv, also=(OSError,))


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-triton", "Make a model repository for Triton's Python backend.", _EXAMPLES
    )
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's folder")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the model repository")
    add("--name", help="the model's name (default: that of the bundle's folder)")
    add("--backend", default=BACKENDS[0], choices=BACKENDS, help="what decodes")
    add("--gpus", type=_gpus, metavar="N,N,..", help="GPUs, each with instances (default: none)")
    add("--instances", type=_count, default=1, metavar="N", help="on each GPU, or in all")
    add("--threads", type=_count, metavar="N", help="on the CPU, of an instance (default: all)")
    add("--batch", type=_count, default=1, metavar="N", help="most images of one shape at once")
    add("--queue", type=_count, default=16, metavar="N", help="requests that may wait")
    add("--timeout", type=_count, default=300, metavar="S", help="seconds a request may wait")
    add(
        "--warm-up",
        type=console.read_size,
        metavar="WxH",
        help="size of the image decoded before the model is ready (default: none)",
    )
    return parser


def _write(arguments: Namespace) -> None:
    manifest = read_manifest(arguments.bundle, verify=True)
    name: str = arguments.name or arguments.bundle.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise PidRuntimeError(
            f"expected a name of letters, digits and _.- but got {name[:60]!r}; give --name"
        )
    if arguments.gpus is None and arguments.backend not in HOST_BACKENDS:
        raise PidRuntimeError(f"expected GPUs for {arguments.backend}, but got none; give --gpus 0")
    config = config_of(manifest, name, arguments)
    target: Path = arguments.output / name
    if target.exists():
        raise PidRuntimeError(
            f"expected a new model, but {target} exists; remove it, or give another --name"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".") as made:
        version = Path(made, name, "1")
        shutil.copytree(arguments.bundle, version / BUNDLE, copy_function=_link)
        (version / "model.py").write_text(_MODEL)
        (version.parent / "config.pbtxt").write_text(config)
        version.parent.rename(target)
    result = {"model_repository": str(arguments.output), "model": name}
    text = f"{target}: model {name}; tritonserver --model-repository {arguments.output}"
    console.emit(result, text, as_json=arguments.json)


def config_of(manifest: Manifest, name: str, options: Namespace) -> str:
    """A model's `config.pbtxt`. Raises `PidRuntimeError` for a warm-up that does not fit."""
    network = manifest.network
    kind, gpus = "KIND_CPU", ""
    if options.gpus is not None:
        kind, gpus = "KIND_GPU", f" gpus: [ {', '.join(map(str, options.gpus))} ]"
    parameters = {"backend": options.backend}
    if options.threads is not None:
        parameters["threads"] = str(options.threads)
    inputs = [
        ("latent", "FP32", [network["latent_channels"], -1, -1], False),
        ("caption", "FP32", [-1, network["text_dim"]], True),
        ("sigma", "FP32", [1], True),
        ("seed", "UINT64", [1], True),
        ("steps", "INT32", [1], True),
        ("negative", "FP32", [-1, network["text_dim"]], True),
        ("guidance", "FP32", [1], True),
    ]
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {options.batch}",
        *(
            f'input {{ name: "{each}" data_type: TYPE_{dtype} dims: {dims}'
            f"{' optional: true' if optional else ''} }}"
            for each, dtype, dims, optional in inputs
        ),
        'output { name: "image" data_type: TYPE_UINT8 dims: [-1, -1, 3] }',
        f"instance_group {{ count: {options.instances} kind: {kind}{gpus} }}",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
        # 1 comes before 2; what waits too long, or is one too many, is refused.
        "dynamic_batching {",
        "  priority_levels: 2",
        "  default_priority_level: 2",
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {options.timeout * 1_000_000}",
        f"    max_queue_size: {options.queue}",
        "  }",
        "}",
    ]
    if options.warm_up is not None:
        lines.append(_warm_up(manifest, *options.warm_up))
    return "\n".join(lines) + "\n"


def _warm_up(manifest: Manifest, width: int, height: int) -> str:
    side = pixels_per_latent_pixel(manifest)
    rows, columns = height // side, width // side
    if not rows or not columns:
        raise PidRuntimeError(
            f"expected a --warm-up of at least {side}x{side}, but got {width}x{height}"
        )
    check_fits(manifest, rows, columns)
    dims = [manifest.network["latent_channels"], rows, columns]
    value = f"value {{ data_type: TYPE_FP32 dims: {dims} zero_data: true }}"
    latent = f'inputs {{ key: "latent" {value} }}'
    return f'model_warmup {{ name: "zeros" batch_size: 1 {latent} }}'


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _gpus(text: str) -> list[int]:
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", text):
        raise argparse.ArgumentTypeError(f"expected GPUs such as 0,1, but got {text!r}")
    return [int(each) for each in text.split(",")]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, but got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
