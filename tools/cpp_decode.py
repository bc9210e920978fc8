"""Times the two runtimes against each other: opening a bundle, and decoding, in C++ and in Python.

    python tools/cpp_decode.py                     # full width, 2 patch blocks, 256x256
    python tools/cpp_decode.py --bundle flux-2k --size 1024x1024 --json

Both use ONNX Runtime with the same number of threads. They take turns, one decode each, so that
what else the machine does hurts both; their images are compared before anything is timed. Needs
`pid_decoder_process` as `pytest -m slow tests/cpp/test_own_tests.py` builds it (docs/embedding.md).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_bench.hardware import cpu_name
from pid_engines.child import Child, ChildError
from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import console
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError

TOLERANCE = 1e-5
"""Largest difference between the two images before their times mean nothing."""

PROGRAM = "build/cpp/release/runtime/cpp/tests/pid_decoder_process"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table; exit code 1 when the images differ."""
    parser = console.ArgumentParser(
        "cpp_decode.py",
        "Time opening a bundle and decoding with it, in C++ and in Python.",
        examples="python tools/cpp_decode.py --blocks 4 --size 256x256 --repeats 11",
    )
    parser.add_argument("--bundle", type=Path, help="a bundle (default: one of random weights)")
    parser.add_argument("--blocks", type=int, default=2, help="patch blocks of it (2 of 14)")
    parser.add_argument("--size", default="256x256", help="output WxH (256x256)")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds (11)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--program", type=Path, default=Path(PROGRAM), help=f"({PROGRAM})")
    return console.run(parser, _benchmark, argv)


def _benchmark(args: argparse.Namespace) -> int:
    for name in ("blocks", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise PidRuntimeError(f"expected --{name} of at least 1, but got {getattr(args, name)}")
    if not args.program.is_file():
        raise PidRuntimeError(
            f"expected the C++ runtime's {args.program.name}, but {args.program} is no file; build "
            "it with the tests (docs/embedding.md), or give --program"
        )
    with tempfile.TemporaryDirectory() as folder, Child([args.program]) as process:
        work = Path(folder)
        bundle = args.bundle or _random_bundle(work / "bundle", args)
        try:
            return _compare(bundle, process, work, args)
        except ChildError as error:
            raise PidRuntimeError(str(error)) from None


def _compare(bundle: Path, process: Child, work: Path, args: argparse.Namespace) -> int:
    manifest = read_manifest(bundle, verify=False)
    network = manifest.network
    width, height = _size(args.size, manifest.tokens_per_latent * network["patch_size"])
    numbers = np.random.default_rng(0)
    latent = numbers.standard_normal((1, network["latent_channels"], height, width), np.float32)
    shape = (1, network["text_max_length"], network["text_dim"])
    caption = numbers.standard_normal(shape, np.float32)
    tensors = {"latent": latent, "caption": caption}
    given = {name: _save(work / name, tensor) for name, tensor in tensors.items()}

    def open_cpp() -> float:
        request = {"open": str(bundle), "threads": args.threads, "verify": False}
        return process.ask(request)["seconds"]

    def open_python() -> float:
        begin = time.perf_counter()
        opened = Decoder.open(bundle, threads=args.threads, verify=False)
        seconds = time.perf_counter() - begin
        opened.close()
        return seconds

    open_cpp()
    with Decoder.open(bundle, threads=args.threads, verify=False) as decoder:

        def decode_python() -> float:
            begin = time.perf_counter()
            decoder.decode(latent, caption, seed=7)
            return time.perf_counter() - begin

        def decode_cpp() -> float:
            return process.ask({"decode": given, "seeds": [7]})["seconds"]

        process.ask({"decode": given, "seeds": [7], "to": str(work / "image")})
        image = np.frombuffer((work / "image").read_bytes(), np.float32)
        python_image = decoder.decode(latent, caption, seed=7)
        error = float(np.abs(image - np.asarray(python_image).ravel()).max())
        cases = {"open": (open_cpp, open_python), "decode": (decode_cpp, decode_python)}
        rows = [
            _row(name, *pair, args.repeats, args.quiet)
            for name, pair in reversed(cases.items())  # as opening replaces the C++ decoder
        ]
    result: dict[str, Any] = {
        "command": "python tools/cpp_decode.py " + " ".join(sys.argv[1:]),
        "case": f"{manifest.model.get('name', bundle.name)}, {args.size}, {manifest.precision}, "
        f"{manifest.sampler.steps or 4} steps, {args.threads} threads",
        "hardware": cpu_name(),
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "pid-trt")},
        "repeats": args.repeats,
        "max_abs_error": error,
        "rows": rows,
    }
    lines = [f"{result['case']}, {result['hardware']}; medians of {args.repeats} rounds"]
    lines += [
        f"{row['what']:8} C++ {row['cpp_ms']:8.1f} ms   Python {row['python_ms']:8.1f} ms   "
        f"C++ takes {100 * row['ratio']:.1f} % (median of paired ratios; "
        f"{100 * row['ratio_low']:.1f} to {100 * row['ratio_high']:.1f} %)"
        for row in rows
    ]
    lines.append(f"largest difference of the images: {error:.1e}")
    console.emit(result, "\n".join(lines), as_json=args.json)
    return 1 if error > TOLERANCE else 0


def _row(
    what: str,
    cpp: Callable[[], float],
    python: Callable[[], float],
    repeats: int,
    quiet: bool,
) -> dict[str, Any]:
    """Medians of the two, and of the ratios within a round, after a round that does not count."""
    pairs: list[tuple[float, float]] = []
    with console.progress(f"Timing {what}", repeats, quiet=quiet) as advance:
        for number in range(repeats + 1):
            # Who goes first changes, in case it matters.
            if number % 2:
                ours, theirs = cpp(), python()
            else:
                theirs, ours = python(), cpp()
            if number:
                pairs.append((ours, theirs))
                advance(1)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "what": what,
        "cpp_ms": 1000 * statistics.median(ours for ours, _ in pairs),
        "python_ms": 1000 * statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


def _random_bundle(folder: Path, args: argparse.Namespace) -> Path:
    """A bundle of full width with few blocks."""
    config = replace(PidConfig(), patch_depth=args.blocks)
    width, height = _size(args.size, config.patch_size)
    options = ExportOptions(buckets=(("bench", width * height),))
    weights = RandomWeights(state_shapes(config), 0)
    export_bundle(folder, config, weights, options, weights={"random_seed": 0})
    return folder


def _save(path: Path, tensor: NDArray[np.float32]) -> dict[str, Any]:
    path.write_bytes(tensor.tobytes())
    return {"file": str(path), "shape": list(tensor.shape)}


def _size(text: str, multiple: int) -> tuple[int, int]:
    """Width and height of an image in units of `multiple`."""
    width, height = console.read_size(text)
    if width % multiple or height % multiple or not width * height:
        raise PidRuntimeError(f"expected a size in multiples of {multiple}, but got {text}")
    return width // multiple, height // multiple


if __name__ == "__main__":
    sys.exit(main())
