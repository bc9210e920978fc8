"""`pid-calibrate`: how large a network's numbers are, for `pid-export --precision fp8`."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pid_export.errors import ExportInputError
from pid_runtime.bundle.files import write_whole
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.command.sampling_options import read_negative
from pid_runtime.request import check_guidance

_EXAMPLES = """\
examples:
  pid-calibrate flux-2k --latents latents/ --captions captions/ -o flux.json
      decode these, and write down how large the numbers got
  pid-export --space flux --variant 2k --precision fp8 --calibration flux.json -o flux-2k-fp8
  pid-calibrate nano --latents photographs/ -o nano.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pid-calibrate`; returns its exit code."""
    return console.run(_parser(), _calibrate, argv, extra="export")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-calibrate",
        "Measure a bundle's numbers on decodes, for a bundle of the same network in fp8.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="in fp32, fp16 or bf16")
    parser.add_argument(
        "--latents",
        type=Path,
        metavar="PATH",
        help="latents as of pid-decode, a file or a folder, or photographs for nano (default: made "
        "up ones)",
    )
    parser.add_argument(
        "--captions", type=Path, metavar="DIR", help="captions, named as their latents"
    )
    parser.add_argument(
        "--negative",
        type=Path,
        metavar="FILE",
        help="undistilled: the caption to stay away from, as of pid-decode",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=100.0,
        help="of the numbers of each call, in size; 100 is the largest",
    )
    parser.add_argument(
        "--keep",
        metavar="LIST",
        default="",
        help="graphs to recommend not to round, as pid-export --sensitivity shows",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json")
    return parser


def _calibrate(args: Namespace) -> None:
    check_percentile(args.percentile)
    if args.captions is not None and args.latents is None:
        raise ExportInputError("expected --latents with --captions, but got none; add it")
    manifest = read_manifest(args.bundle)
    negative = _negative(args, manifest)
    # Loading torch takes seconds: not before the arguments are known to make sense.
    from pid_export.calibrate import calibrate, check_unrounded
    from pid_export.calibration_inputs import MADE_UP, read_inputs, synthetic_inputs

    check_unrounded(manifest)
    if args.latents is None:
        inputs, described = synthetic_inputs(manifest), MADE_UP
    else:
        inputs, described = read_inputs(manifest, args.latents, args.captions, negative)
    with console.progress("Calibrating", 1.0, quiet=args.quiet) as advance:
        found = calibrate(
            args.bundle,
            inputs,
            described=described,
            percentile=args.percentile,
            keep=[name for name in args.keep.split(",") if name],
            advance=advance,
        )
    write_whole(args.output, found.to_json())
    result = {
        "calibration": str(args.output),
        "model": found.model,
        "inputs": described,
        "decodes": found.count,
        "percentile": found.percentile,
        "places": len(found.sizes),
    }
    text = f"{args.output}: {found.model}, {len(found.sizes)} places, {described}"
    console.emit(result, text, as_json=args.json)


def _negative(args: Namespace, manifest: Manifest) -> NDArray[np.float32] | None:
    """The negative caption, `[1, T, D]`, if one is given. Raises for one that nobody needs."""
    if args.negative is None:
        return None
    if args.latents is None:
        raise ExportInputError("expected --latents with --negative, but got none; add it")
    check_guidance(manifest, None, has_negative=True)
    return read_negative(args.negative)


def check_percentile(percentile: float) -> None:
    """Raise `ExportInputError` for what is no percentile to scale by."""
    if not 90 <= percentile <= 100:
        raise ExportInputError(
            f"expected a percentile from 90 to 100, but got {percentile:g}; 100 cuts nothing off"
        )
