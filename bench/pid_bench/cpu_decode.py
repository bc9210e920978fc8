"""Times a whole decode on the CPU: the reference in torch, eager and compiled, and the bundle.

    python -m pid_bench.cpu_decode            # full width, 4 patch blocks, 256x256, float32
    python -m pid_bench.cpu_decode --json

All contenders decode the same latent with the same noise and the same number of threads, in turn,
and their images are compared before anything is timed.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from pid_export.bundle import ExportOptions, export_bundle
from pid_export.errors import ExportInputError
from pid_export.onnx_ports import OPSET
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.sampler import sample
from pid_ref.weights import RandomWeights
from pid_runtime import console
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import image_noise

Decode = Callable[[], NDArray[np.float32]]

TOLERANCE = 1e-3
"""Largest difference between two contenders' images before their times mean nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table; exit code 1 when the images differ."""
    parser = console.ArgumentParser(
        "pid_bench.cpu_decode",
        "Time a whole decode on the CPU: torch eager, torch.compile, and the bundle.",
        examples="python -m pid_bench.cpu_decode --blocks 4 --size 256x256 --repeats 7",
    )
    parser.add_argument("--blocks", type=int, default=4, help="patch blocks (default: 4 of 14)")
    parser.add_argument("--size", default="256x256", help="output WxH (default: 256x256)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--steps", type=int, default=4, help="sampler steps (default: 4)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    errors = (PidInputError, PidRuntimeError, ExportInputError)
    return console.run(parser, _benchmark, errors, argv)


@dataclass(frozen=True)
class _Contenders:
    """What is timed, and what only counts operations."""

    decodes: dict[str, Decode]
    """By name, a function that returns the image `[1, 3, H, W]`."""
    twin: Decode
    """The bundle on the torch backend, whose matrix products torch can count."""
    latent_shape: tuple[int, ...]


def _benchmark(args: argparse.Namespace) -> int:
    width, height = _size(args.size)
    for name in ("blocks", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise PidInputError(f"expected --{name} of at least 1, but got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    config = replace(PidConfig(), patch_depth=args.blocks)
    weights = RandomWeights(state_shapes(config), 0)
    with tempfile.TemporaryDirectory() as folder:
        case = _contenders(config, weights, Path(folder), args, width, height)
        contenders = case.decodes
        images = {name: decode() for name, decode in contenders.items()}  # warm-up
        reference_flop, bundle_flop = _count_flop(contenders["torch eager"]), _count_flop(case.twin)
        ceiling = 0.0
        eager = images["torch eager"]
        errors = {name: float(np.abs(image - eager).max()) for name, image in images.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        with console.progress("Timing", args.repeats, quiet=args.quiet) as advance:
            for _ in range(args.repeats):
                for name, decode in contenders.items():
                    begin = time.perf_counter()
                    decode()
                    times[name].append(time.perf_counter() - begin)
                ceiling = max(ceiling, _matmul_flop_per_s(args.threads))
                advance(1)
    medians = {name: statistics.median(of) for name, of in times.items()}
    ours = medians["bundle, onnxruntime"]
    flop = {name: bundle_flop if "bundle" in name else reference_flop for name in times}
    rows = [
        {
            "pipeline": name,
            "gflop": flop[name] / 1e9,
            "gflop_per_s": flop[name] / 1e9 / medians[name],
            "median_ms": 1000 * medians[name],
            "min_ms": 1000 * min(of),
            "max_ms": 1000 * max(of),
            "ratio_to_bundle": medians[name] / ours,
            "max_abs_error_to_eager": errors[name],
        }
        for name, of in times.items()
    ]
    result: dict[str, Any] = {
        "command": "python -m pid_bench.cpu_decode " + " ".join(sys.argv[1:]),
        "case": f"{args.blocks} patch blocks, {width}x{height}, float32, {args.steps} steps, "
        f"latent {list(case.latent_shape)}, random weights",
        "repeats": args.repeats,
        "threads": args.threads,
        "hardware": cpu_name(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "numpy", "pid-trt")},
        "matmul_gflop_per_s": ceiling / 1e9,
        "rows": rows,
    }
    lines = [
        f"{result['case']}; {args.threads} threads, {result['hardware']}, median of {args.repeats}",
        *(
            f"{row['pipeline']:22} {row['median_ms']:8.0f} ms  "
            f"(min {row['min_ms']:.0f}, max {row['max_ms']:.0f})  "
            f"{row['ratio_to_bundle']:5.2f}x the bundle's  "
            f"{row['gflop']:.0f} GFLOP at {row['gflop_per_s']:.0f} GFLOP/s"
            for row in rows
        ),
        f"ONNX Runtime's largest matrix products alone: {ceiling / 1e9:.0f} GFLOP/s, so the bundle "
        f"cannot take less than {1000 * bundle_flop / ceiling:.0f} ms here",
    ]
    console.emit(result, "\n".join(lines), as_json=args.json)
    return 1 if max(errors.values()) > TOLERANCE else 0


def _contenders(
    config: PidConfig,
    weights: RandomWeights,
    folder: Path,
    args: argparse.Namespace,
    width: int,
    height: int,
) -> _Contenders:
    """Export the network and prepare everybody's decode of one latent with one noise."""
    multiple = config.size_multiple
    shape = (1, config.latent_channels, height // multiple, width // multiple)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal(shape, np.float32)
    caption = rng.standard_normal((1, config.text_max_length, config.text_dim), np.float32)
    noise = [image_noise(0, draw, height, width)[None] for draw in range(args.steps)]
    net = PidNet(config).eval()
    net.load_state_dict(dict(weights))
    bundle = folder / "bundle"
    tokens = (height // config.patch_size) * (width // config.patch_size)
    options = ExportOptions(buckets=(("bench", tokens),))
    export_bundle(bundle, config, weights, options, weights={"random_seed": 0})
    tensors = [torch.from_numpy(array) for array in (latent, caption, *noise)]

    def reference(network: Any) -> Decode:
        def decode() -> NDArray[np.float32]:
            first, *later = tensors[2:]
            image = sample(
                network, tensors[0], tensors[1], torch.zeros(1), first, later, steps=args.steps
            )
            return image.clamp(-1, 1).numpy()

        return decode

    def program(decoder: Decoder) -> Decode:
        return lambda: decoder.decode(
            latent, caption, noise=noise[0], step_noise=noise[1:], steps=args.steps
        )

    decodes = {"torch eager": reference(net)}
    if not args.no_compile:
        decodes["torch.compile"] = reference(torch.compile(net))
    decodes["bundle, onnxruntime"] = program(Decoder.open(bundle, threads=args.threads))
    return _Contenders(decodes, program(Decoder.open(bundle, "torch")), shape)


def _count_flop(decode: Decode) -> float:
    """Operations in the matrix products, attentions and convolutions of a decode."""
    with FlopCounterMode(display=False) as counter:
        decode()
    return float(counter.get_total_flops())


def _matmul_flop_per_s(threads: int) -> float:
    """What ONNX Runtime reaches on one large float32 matrix product, the best of ten."""
    rows, inner, columns = 1024, 1536, 4096
    tensor = onnx.helper.make_tensor_value_info
    weight = np.random.default_rng(0).standard_normal((inner, columns), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [tensor("x", onnx.TensorProto.FLOAT, [rows, inner])],
        [tensor("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = np.ones((rows, inner), np.float32)
    times: list[float] = []
    for _ in range(10):
        begin = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - begin)
    return 2 * rows * inner * columns / min(times)


def _size(text: str) -> tuple[int, int]:
    """Width and height."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise PidInputError(f"expected a size such as 256x256, but got {text!r}")
    multiple = PidConfig().size_multiple
    if int(width) % multiple or int(height) % multiple or not int(width) * int(height):
        raise PidInputError(f"expected width and height in multiples of {multiple}, but got {text}")
    return int(width), int(height)


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
