"""`pid-verify --against`: its options, and what it prints."""

import logging
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pid_export.against import Difference, Side, check_pair, compare_pictures, jobs_of
from pid_export.errors import ExportInputError
from pid_runtime.backends.choice import BACKENDS, device_name
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import console
from pid_runtime.command.decode_jobs import find_sources, skipped_files
from pid_runtime.command.latent_files import LATENT_SUFFIXES, LatentForm
from pid_runtime.command.latent_options import (
    add_latent_options,
    add_latent_paths,
    check_latent_options,
    latent_settings,
)
from pid_runtime.command.sampling_options import add_sampling_options, read_sampling

_log = logging.getLogger(__name__)

_OWN = {
    **{name: name for name in ("latent", "latents", "caption", "captions", "sigma", "steps")},
    **{name: name for name in ("times", "rule", "negative", "tile", "overlap")},
    "against_backend": "against-backend",
    "latent_key": "latent-key",
    "latent_form": "latent-form",
    "caption_key": "caption-key",
    "decode_guidance": "guidance",
}
"""Options that only go with --against, by what the parser calls them."""
_OTHERS = ("golden", "encoder", "checkpoint", "size")
"""Options that do not."""


def add_against_options(parser: ArgumentParser) -> None:
    """The other bundle, and what both are to decode; with the seed."""
    add = parser.add_argument
    add(
        "--against",
        type=Path,
        metavar="BUNDLE",
        help="another bundle of the network instead of the reference; what follows goes with it",
    )
    add("--against-backend", metavar="NAME", help="of that one (default: that of this one)")
    add_latent_paths(parser, required=False)
    add_latent_options(parser)
    add_sampling_options(parser)


def check_against(args: Namespace) -> None:
    """Raise `ExportInputError` for options that do not belong together."""
    if args.against is None:
        usual = {"latent_form": LatentForm()}
        for name, option in _OWN.items():
            if getattr(args, name) != usual.get(name):
                raise ExportInputError(f"expected --against with --{option}, but got none; add it")
        return
    for name in _OTHERS:
        if getattr(args, name) is not None:
            raise ExportInputError(f"expected --against without --{name}, but got both; drop one")
    if args.latent is None and args.latents is None:
        raise ExportInputError(
            "expected latents to decode with --against, but got none; add --latents DIR"
        )
    if args.against_backend not in (None, *BACKENDS):
        raise ExportInputError(
            f"expected a backend of {', '.join(BACKENDS)}, but got {args.against_backend!r}"
        )
    check_latent_options(args)


def verify_against(args: Namespace) -> int:
    """Compare the pictures of two bundles, and print how much they differ."""
    manifest = read_manifest(args.bundle)
    one = Side(args.bundle, manifest, args.backend, args.device, args.threads)
    backend = args.against_backend or args.backend
    other = Side(args.against, read_manifest(args.against), backend, args.device, args.threads)
    settings = latent_settings(args, read_sampling(args, manifest, batches=True))
    note = check_pair(one, other, settings)
    path = args.latent or args.latents
    sources = find_sources(path, args.caption, args.captions)
    jobs = jobs_of(one, other, sources, settings)
    skipped = None if args.latents is None else skipped_files(path, LATENT_SUFFIXES)
    for line in filter(None, (note, skipped)):
        _log.warning("%s", line)
    with console.progress("Comparing", 2 * len(jobs), quiet=args.quiet) as advance:
        clipped: dict[str, float] | None = {} if one.counts_clipped else None
        pictures = list(compare_pictures(one, other, jobs, settings, advance, clipped))
    result, text = _result(one, other, pictures), _text(one, other, pictures)
    if clipped is None:
        console.emit(result, text, as_json=args.json)
        return 0
    from pid_export.calibrate import check_clipped, most_clipped  # loads torch

    place, share = most_clipped(clipped)
    result["most_clipped"] = {"place": place, "share": share}
    text += f"\n{share:.4%} of the numbers at {place} were too large for their scale, the most"
    console.emit(result, text, as_json=args.json)
    try:
        check_clipped(clipped)
    except ExportInputError as error:
        _log.error("%s", error)
        return 1
    return 0


def _result(one: Side, other: Side, pictures: Sequence[Difference]) -> dict[str, object]:
    def described(side: Side) -> dict[str, str]:
        return {
            "bundle": str(side.path),
            "precision": side.manifest.precision,
            "backend": side.backend,
            "device": device_name(side.backend, side.device),
        }

    return {
        **described(one),
        "against": described(other),
        "pictures": [asdict(each) for each in pictures],
        "mean_psnr_db": _mean(pictures),
        "least_psnr_db": min(each.psnr_db for each in pictures),
    }


def _text(one: Side, other: Side, pictures: Sequence[Difference]) -> str:
    rows = [["PSNR dB", "largest", "picture"]]
    for each in pictures:
        size = f"{each.width}x{each.height}, seed {each.seed}, sigma {each.sigma:g}"
        picture = f"{each.latent}: image {each.index}, {size}"
        rows.append([_decibels(each.psnr_db), f"{each.max_abs_error:.4f}", picture])
    least = min(each.psnr_db for each in pictures)
    sides = [f"{side.path} ({side.manifest.precision}, {side.backend})" for side in (one, other)]
    summary = (
        f"{len(pictures)} pictures of {sides[0]} against {sides[1]}: mean "
        f"{_decibels(_mean(pictures))} dB, least {_decibels(least)} dB"
    )
    return f"{console.aligned(rows, left=(2,))}\n{summary}"


def _mean(pictures: Sequence[Difference]) -> float:
    """Of the decibels of every picture; infinite if one is equal."""
    return math.fsum(each.psnr_db for each in pictures) / len(pictures)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.2f}"
