"""`pid-build`: TensorRT engines from a bundle."""

import os
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pid_engines.errors import BuildError, BuildInputError
from pid_engines.flavors import FIRST_WITH_FP8, find_flavor, parse_targets
from pid_engines.options import PLANS, BuildOptions
from pid_runtime.bundle.engines import Engine
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import console

if TYPE_CHECKING:
    from pid_engines.build import Build

_EXAMPLES = """\
examples:
  pid-build flux-4k
      engines of every bucket for GeForce RTX 30, 40 and 50, on a machine with or without a GPU
  pid-build flux-4k --buckets 2k --target sm89
  pid-build flux-4k --flavor tensorrt
      with TensorRT, on the GPU that is to run them
"""

MOST_JOBS = 4
"""Engines built at the same time when nothing is said: each takes up to 0.9 GB of host memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pid-build`; returns its exit code."""
    return console.run(_parser(), _build, argv, also=(BuildError,), extra="engines")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-build", "Build TensorRT engines from a bundle, into the bundle.", _EXAMPLES
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by pid-export")
    parser.add_argument(
        "--flavor",
        default="auto",
        help="tensorrt-rtx, tensorrt or auto: what is installed",
    )
    parser.add_argument(
        "--buckets", metavar="LIST", help="buckets to build for, as 2k,4k (default: all)"
    )
    parser.add_argument(
        "--target",
        metavar="LIST",
        help="GPU architectures, as sm86,sm89, or current for this machine's GPU "
        "(default: tensorrt-rtx sm86,sm89,sm120; tensorrt current)",
    )
    parser.add_argument(
        "--plan",
        default="fast",
        help="fast, or lean: less memory, by smaller parts and 1 to 3 %% more work",
    )
    parser.add_argument(
        "--opt-level", type=int, default=3, metavar="N", help="how long to search: 0 to 5"
    )
    parser.add_argument(
        "--workspace", metavar="SIZE", help="most scratch of a kernel, as 2G or 512M"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help=f"engines to build at the same time (default: a core each, at most {MOST_JOBS})",
    )
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    parser.add_argument(
        "--allow-unfused",
        action="store_true",
        help="take engines whose attention is not one kernel, which are slow and large, or whose "
        "rounded products are not of 8 bits",
    )
    return parser


def _build(args: Namespace) -> None:
    from pid_engines.build import build_engines

    options = _options(args)
    begin = time.monotonic()
    with console.progress("Building", 1.0, quiet=args.quiet) as advance:
        build = build_engines(args.bundle, options, advance)
    seconds = round(time.monotonic() - begin, 1)
    result = _result(build, seconds)
    text = _table(build) + (
        f"\n{args.bundle}: {len(build.plans)} engines {build.set_name}, {seconds:.0f} s, "
        f"{len(build.reused)} were there already"
    )
    console.emit({"bundle": str(args.bundle), **result}, text, as_json=args.json)


def _options(args: Namespace) -> BuildOptions:
    if not 0 <= args.opt_level <= 5:
        raise BuildInputError(f"expected --opt-level from 0 to 5, but got {args.opt_level}")
    if args.plan not in PLANS:
        raise BuildInputError(f"expected --plan {' or '.join(PLANS)}, but got {args.plan!r}")
    if args.jobs is not None and not 1 <= args.jobs <= 64:
        raise BuildInputError(f"expected --jobs from 1 to 64, but got {args.jobs}")
    workspace = _parse_size(args.workspace) if args.workspace else 0
    flavor, version = find_flavor(args.flavor)
    precision = read_manifest(args.bundle, verify=False).precision
    oldest = FIRST_WITH_FP8 if precision == "fp8" else 0
    return BuildOptions(
        flavor=flavor,
        version=version,
        targets=parse_targets(args.target, flavor, oldest),
        buckets=_parse_buckets(args.buckets),
        plan=args.plan,
        opt_level=args.opt_level,
        workspace_bytes=workspace,
        jobs=args.jobs or min(os.cpu_count() or 1, MOST_JOBS),
        force=args.force,
        allow_unfused=args.allow_unfused,
    )


def _parse_buckets(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _parse_size(text: str) -> int:
    """Read "2G" as bytes: K, M and G are 1024, 1024^2 and 1024^3."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text)
    if match is None or int(match[1]) == 0:
        raise BuildInputError(f"expected --workspace as 2G, 512M or bytes, but got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _result(build: "Build", seconds: float) -> dict[str, Any]:
    """The result as JSON; bytes throughout."""
    buckets = build.engines.buckets
    memory = list(buckets.values())
    return {
        "engines": build.set_name,
        "flavor": build.engines.flavor,
        "version": build.engines.version,
        "targets": list(build.engines.targets),
        "peak_device_bytes": {name: each.peak_device_bytes for name, each in buckets.items()},
        "attentions_fused": [
            min(each.attentions_fused for each in memory),
            max(each.attentions for each in memory),
        ],
        "buckets": {
            name: {
                "weights_bytes": each.weights_bytes,
                "arena_bytes": each.arena_bytes,
                "buffers_bytes": each.buffers_bytes,
                "chunk_tokens": each.chunk_tokens,
                "scratch_bytes": each.scratch_bytes,
            }
            for name, each in buckets.items()
        },
        "stages": [
            {
                "graph": graph,
                "file": engine.file,
                "bytes": engine.bytes,
                "weights_bytes": engine.weights_bytes,
                "scratch_bytes": _scratch(build, engine),
                "profiles": len(engine.profiles),
                "attentions_fused": [engine.attentions_fused, engine.attentions],
                "bf16_island": engine.bf16_island,
                "seconds": engine.seconds,
                "reused": engine.file in build.reused,
            }
            for graph, engines in build.engines.graphs.items()
            for engine in engines
        ],
        "seconds": seconds,
        "peak_rss_bytes": build.peak_rss_bytes,
    }


def _scratch(build: "Build", engine: Engine) -> dict[str, int]:
    """The largest scratch of an engine by bucket."""
    plan = build.plans[engine.file]
    return {
        bucket: max(
            size
            for size, buckets in zip(engine.scratch_bytes, plan.buckets, strict=True)
            if bucket in buckets
        )
        for bucket in build.engines.buckets
        if any(bucket in buckets for buckets in plan.buckets)
    }


def _table(build: "Build") -> str:
    """Memory of every engine and bucket, in megabytes, and build times."""
    buckets = build.engines.buckets
    rows = [["engine", "weights", *(f"scratch {name}" for name in buckets), "seconds", "fused"]]
    for engines in build.engines.graphs.values():
        for engine in engines:
            scratch = _scratch(build, engine)
            fused = f"{engine.attentions_fused} of {engine.attentions}" if engine.attentions else ""
            rows.append(
                [
                    engine.file.removesuffix(".engine"),
                    _megabytes(engine.weights_bytes),
                    *(_megabytes(scratch[name]) if name in scratch else "" for name in buckets),
                    "there" if engine.file in build.reused else f"{engine.seconds:.1f}",
                    fused + (" in bf16" if engine.bf16_island else ""),
                ]
            )
    text = console.aligned(rows)
    rows = [["bucket", "weights", "buffers", "scratch", "arena of both", "peak", "fused"]]
    rows += [
        [
            name,
            _megabytes(each.weights_bytes),
            _megabytes(each.buffers_bytes),
            _megabytes(each.scratch_bytes),
            _megabytes(each.arena_bytes),
            f"{each.peak_device_bytes / 1e9:.2f} GB",
            f"{each.attentions_fused} of {each.attentions}",
        ]
        for name, each in buckets.items()
    ]
    return f"{text}\n\n{console.aligned(rows)}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
