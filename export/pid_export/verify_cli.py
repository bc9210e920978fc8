"""`pid-verify`: is this bundle right?"""

import contextlib
import gc
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pid_export.against_cli import add_against_options, check_against, verify_against
from pid_export.errors import ExportInputError
from pid_ref.errors import PidInputError
from pid_runtime.backends.choice import BACKENDS
from pid_runtime.bundle.folder import read_constants, read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.decoder import Bundle
from pid_runtime.tiles import pixels_per_latent_pixel

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pid_export.golden import Golden
    from pid_export.golden_captions import GoldenCaptions
    from pid_export.golden_guided import GoldenGuided
    from pid_export.golden_latents import GoldenLatents
    from pid_export.verify import Comparison
    from pid_pipelines.captions import CaptionEncoder

_EXAMPLES = """\
examples:
  pid-verify flux-4k --backend onnxruntime
      every stage, then a whole decode, against the reference network
  pid-verify flux-bf16 --backend torch --against flux-fp32 --latents latents/ --captions captions/
      every picture against that of another bundle: what a precision costs
  pid-verify --golden tests/golden/*.safetensors --backend onnxruntime
  pid-verify --golden tests/golden/captions/*.safetensors --encoder tests/golden/captions/encoder
  pid-verify --golden tests/golden/latents/*.safetensors tests/golden/guided/*.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pid-verify`; returns its exit code: 0 when all passed, 1 when not, 2 for bad input."""
    return console.run(_parser(), _verify, argv, also=(PidInputError,), extra="export")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-verify",
        "Compare a bundle, or golden files, with the reference network; or with another bundle.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument(
        "--golden", type=Path, nargs="+", metavar="FILE", help="golden files instead of a bundle"
    )
    parser.add_argument(
        "--encoder", metavar="ID_OR_DIR", help="of golden files of captions, as of pid-caption"
    )
    parser.add_argument("--backend", default="onnxruntime", help=", ".join(BACKENDS))
    parser.add_argument(
        "--device",
        help="cpu, cuda:0, or an ONNX Runtime provider (default: cpu; of tensorrt cuda:0)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="the weights the bundle was exported from (default: those in the hub's cache)",
    )
    parser.add_argument(
        "--size", default=None, metavar="WxH", help="of the decode (default: small)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: all cores)")
    add_against_options(parser)
    return parser


def _verify(args: Namespace) -> int:
    if (args.bundle is None) == (args.golden is None):
        got = "neither" if args.bundle is None else "both"
        raise ExportInputError(f"expected BUNDLE or --golden FILE, but got {got}; give one of them")
    if args.backend not in BACKENDS:
        raise ExportInputError(
            f"expected a backend of {', '.join(BACKENDS)}, but got {args.backend!r}"
        )
    check_against(args)
    if args.golden:
        return _verify_golden(args)
    if args.encoder is not None:
        raise ExportInputError("expected --encoder with --golden, but got a bundle; drop it")
    return _verify_bundle(args) if args.against is None else verify_against(args)


def _verify_golden(args: Namespace) -> int:
    from pid_export.golden import TOLERANCE, Golden
    from pid_export.golden_captions import GoldenCaptions
    from pid_export.golden_guided import GoldenGuided

    golden_files = [_read_golden(path) for path in args.golden]
    has_decodes = any(isinstance(each, (Golden, GoldenGuided)) for each in golden_files)
    if (args.encoder is not None) != any(isinstance(each, GoldenCaptions) for each in golden_files):
        got = "none" if args.encoder is None else f"{args.encoder} for files of others"
        fix = "drop it" if args.encoder is not None else "the small one lies beside the files"
        raise ExportInputError(f"expected --encoder for files of captions, but got {got}; {fix}")
    rows: list[dict[str, Any]] = []
    with (
        console.progress("Verifying", len(golden_files), quiet=args.quiet) as advance,
        _caption_encoder(args.encoder) as encoder,
    ):
        for golden in golden_files:
            if isinstance(golden, Golden):
                rows.append(_golden_decode(golden, args))
            elif isinstance(golden, GoldenGuided):
                rows.append(_golden_guided(golden, args))
            elif isinstance(golden, GoldenCaptions):
                assert encoder is not None
                rows.append(_golden_captions(golden, encoder))
            else:
                rows.append(_golden_latents(golden))
            advance(1)
    lines = [
        f"{'ok  ' if row['passed'] else 'FAIL'} {row['max_abs_error']:.2e}  {row['file']}"
        for row in rows
    ]
    console.emit(
        {"backend": args.backend, "tolerance": TOLERANCE, "files": rows},
        "\n".join([*lines, _tolerances(rows, args.backend, decodes=has_decodes)]),
        as_json=args.json,
    )
    return 0 if all(row["passed"] for row in rows) else 1


def _read_golden(path: Path) -> "Golden | GoldenCaptions | GoldenGuided | GoldenLatents":
    """A golden file of any kind, by the tensors that it has."""
    from pid_export.golden import read_golden
    from pid_export.golden_captions import is_captions, read_captions
    from pid_export.golden_guided import is_guided, read_guided
    from pid_export.golden_latents import is_latents, read_latents

    if is_captions(path):
        return read_captions(path)
    if is_guided(path):
        return read_guided(path)
    return read_latents(path) if is_latents(path) else read_golden(path)


def _caption_encoder(encoder: str | None) -> "AbstractContextManager[CaptionEncoder | None]":
    """In float32, as the files are; nothing where none is wanted."""
    if encoder is None:
        return contextlib.nullcontext()
    console.need_packages(("tokenizers",), "captions")
    from pid_pipelines.captions import CaptionEncoder

    return CaptionEncoder(encoder, dtype="fp32", width=None)


def _golden_captions(golden: "GoldenCaptions", encoder: "CaptionEncoder") -> dict[str, Any]:
    from pid_export.golden_captions import TOLERANCE, caption_error

    error = caption_error(golden, encoder)
    return _row(golden.path, {"encoder": error}, TOLERANCE, error <= TOLERANCE)


def _golden_latents(golden: "GoldenLatents") -> dict[str, Any]:
    from pid_export.golden_latents import TOLERANCE, latent_errors

    errors = latent_errors(golden)
    return _row(golden.path, errors, TOLERANCE, max(errors.values()) <= TOLERANCE)


def _golden_decode(golden: "Golden", args: Namespace) -> dict[str, Any]:
    from pid_export.golden import (
        TOLERANCE,
        open_program,
        program_error,
        reference_error,
        tolerance_here,
    )

    with open_program(golden, args.backend, args.device) as decoder:
        errors = {"program": program_error(golden, decoder)}
    tolerance = TOLERANCE
    if errors["program"] > TOLERANCE:
        device = args.device if args.backend == "torch" else None
        tolerance = tolerance_here(golden, device or "cpu")
    passed = errors["program"] <= tolerance
    if args.backend == "torch":
        errors["reference"] = reference_error(golden)
        passed = passed and errors["reference"] <= TOLERANCE
    return _row(golden.path, errors, tolerance, passed)


def _golden_guided(golden: "GoldenGuided", args: Namespace) -> dict[str, Any]:
    from pid_export.golden_guided import TOLERANCE, guided_program_error, guided_reference_error

    errors = {"program": guided_program_error(golden, args.backend, args.device)}
    if args.backend == "torch":
        errors["reference"] = guided_reference_error(golden)
    return _row(golden.path, errors, TOLERANCE, max(errors.values()) <= TOLERANCE)


def _row(path: Path, errors: dict[str, float], tolerance: float, passed: bool) -> dict[str, Any]:
    return {
        "file": str(path),
        "max_abs_error": max(errors.values()),
        "tolerance": tolerance,
        "passed": passed,
        "errors": errors,
    }


def _tolerances(rows: Sequence[dict[str, Any]], backend: str, *, decodes: bool) -> str:
    least = min(row["tolerance"] for row in rows)
    most = max(row["tolerance"] for row in rows)
    shown = f"{least:.0e}" if least == most else f"{least:.0e} to {most:.0e}"
    return f"tolerance {shown}, float32{f', {backend}' if decodes else ''}"


def _verify_bundle(args: Namespace) -> int:
    from pid_export import verify

    manifest = read_manifest(args.bundle)
    height, width = _size(args.size, manifest)
    times = _times(manifest)
    inputs = verify.random_inputs(manifest, height, width, args.seed, len(times) - 1)
    with console.progress(
        "Verifying", 2 + len(list(manifest.instructions())), quiet=args.quiet
    ) as advance:
        net = verify.reference_network(manifest, args.checkpoint)
        values, sizes = verify.stage_values(manifest, net, inputs, times)
        constants = read_constants(args.bundle, manifest)
        comparisons: list[Comparison] = [*verify.verify_sampler(manifest, net, constants)]
        advance(1)
        want = verify.reference_image(manifest, net, inputs, times)
        del net  # a full-size reference takes 5.4 GB that the bundle can use
        gc.collect()
        advance(1)
        with Bundle.open(
            args.bundle,
            args.backend,
            args.device,
            threads=args.threads,
            manifest=manifest,
            verify=False,
        ) as bundle:
            for comparison in verify.verify_stages(bundle, values, sizes):
                comparisons.append(comparison)
                advance(1)
            with bundle.decoder() as decoder:
                comparisons.append(verify.verify_decode(decoder, inputs, times, want))
    passed = all(comparison.passed for comparison in comparisons)
    tolerance = verify.TOLERANCES[manifest.precision]
    result = {
        "bundle": str(args.bundle),
        "backend": args.backend,
        "precision": manifest.precision,
        "size": [width, height],
        "tolerance": tolerance,
        "passed": passed,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    header = f"     {'output':32} {'median':>9} {'p90':>9} {'p99':>9} {'max':>9} {'rms':>9}"
    lines = [_line(comparison) for comparison in comparisons]
    guidance = manifest.sampler.guidance
    guided = "" if guidance == 1 else f", {guidance:g} times that of the whole decode"
    summary = (
        f"{'passed' if passed else 'FAILED'}: {width}x{height}, {manifest.precision}, "
        f"{args.backend}, tolerance {tolerance:.0e} x rms (at least 1) of the reference{guided}"
    )
    console.emit(result, "\n".join([header, *lines, summary]), as_json=args.json)
    return 0 if passed else 1


def _line(comparison: "Comparison") -> str:
    numbers = "".join(f" {value:9.1e}" for value in (*comparison.percentiles, comparison.scale))
    return f"{'ok  ' if comparison.passed else 'FAIL'} {comparison.name:32}{numbers}"


def _times(manifest: Manifest) -> list[float]:
    """The times of the bundle's default decode; the student's, for a bundle that takes any.

    Of an undistilled one four that it takes at its base size: 25 would take minutes.
    """
    from pid_ref.guided_sampler import shifted_times
    from pid_ref.sampler import timesteps

    sampler = manifest.sampler
    if sampler.flow_shift is not None:
        return list(shifted_times(4, sampler.flow_shift.size, sampler.flow_shift.size))
    if not sampler.times:
        return list(timesteps(sampler.steps))
    return [*(sampler.times[row] for row in sampler.schedules[str(sampler.steps)]), 0.0]


def _size(text: str | None, manifest: Manifest) -> tuple[int, int]:
    """Height and width to verify at: as asked, or that of a latent of two rows, three columns."""
    if text is None:
        multiple = pixels_per_latent_pixel(manifest)
        return 2 * multiple, 3 * multiple
    width, height = console.read_size(text)
    return height, width
