"""`pid-export`: a checkpoint becomes a bundle."""

import logging
import resource
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pid_export.errors import ExportInputError
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.registry import CHECKPOINTS, Checkpoint, find_checkpoint, find_space
from pid_ref.trained_sizes import trained_sizes
from pid_runtime.bundle.files import check_new, file_sha256
from pid_runtime.bundle.manifest import FP8_PRECISIONS, INT8_PRECISIONS
from pid_runtime.command import console

if TYPE_CHECKING:
    from torch import Tensor

    from pid_export.fp8_export import Rounded

_log = logging.getLogger(__name__)

_BUCKETS = "2k,3k,4k"

FP8_OPTIONS = ("calibration", "keep", "sensitivity")

_OF_DECODERS = (
    *("variant", "config", "checkpoint", "force_space", "random_weights"),
    *("buckets", "steps", "arbitrary_timesteps", *FP8_OPTIONS),
)
"""Options that neither captioners nor autoencoders have."""

_EXAMPLES = """\
examples:
  pid-export --space nano -o nano
      the small decoder that comes with pid-trt
  pid-export --list
      every space and variant, with the sizes each was trained for
  pid-export --space flux --variant 2kto4k -o flux-4k
      download the released checkpoint (the weights' licence is non-commercial) and export it
  pid-export --space sd3 --variant 2k --checkpoint model_ema_bf16.pth --precision bf16 -o sd3-2k
  pid-export --space flux --variant 2k --precision fp8 --calibration latents/ -o flux-2k-fp8
      half the weights; latents and their captions show how large numbers get
  pid-export --caption-encoder Efficient-Large-Model/gemma-2-2b-it -o captioner
      the language model of captions as a graph, so that pid-caption needs no torch
  pid-export --space flux --vae ae.safetensors -o flux-vae
      the autoencoder of a space as graphs, so that pid-upscale needs no torch
  pid-export --space flux --variant 2k --config small.json --random-weights 0 -o small
      the network of a space with other dimensions, such as {"hidden_size": 256, "num_heads": 4}

members of --config, which pid_ref/config.py describes, and their defaults:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pid-export`; returns its exit code."""
    return console.run(_parser(), _export, argv, also=(PidInputError,), extra="export")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-export",
        "Export a PiD checkpoint as a bundle: ONNX stages and a manifest.",
        _EXAMPLES + _dimensions(),
    )
    what = parser.add_argument_group("what to export")
    what.add_argument("--space", help="latent space or generator: nano, flux, flux2, sd3, ...")
    what.add_argument(
        "--variant",
        help="2k, 2kto4k (the newest checkpoint) or 2kto4k-v1; not needed where there is one",
    )
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE.json",
        help="other dimensions than the space's own, or than those of flux 2k (v1); the members "
        "of this JSON object are described below",
    )
    what.add_argument(
        "--caption-encoder",
        metavar="ID_OR_DIR",
        help="instead of a decoder the language model of its captions, for pid-caption "
        "--encoder: Efficient-Large-Model/gemma-2-2b-it, or a folder",
    )
    what.add_argument(
        "--vae",
        nargs="?",
        const="",
        metavar="ID_OR_DIR_OR_FILE",
        help="instead of a decoder the autoencoder of --space, for pid-upscale --vae: a "
        "repository, a folder or a file (default: NVIDIA's)",
    )
    weights = parser.add_argument_group("weights (default: nano's own, others from the hub)")
    weights.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="official .pth or a safetensors repack"
    )
    weights.add_argument(
        "--force-space",
        action="store_true",
        help="take a checkpoint whose file name speaks of another space",
    )
    weights.add_argument(
        "--random-weights", type=int, metavar="SEED", help="random values: speed and memory only"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--precision",
        default="fp32",
        help="fp32, fp16, bf16, fp8 (large products and attention in 8 bits, the rest in bf16), "
        "int8 (large matrices stored in 8 bits, everything computed in bf16); fp8-fp32 and "
        "int8-fp32 have fp32 in place of bf16, to compare with on a CPU",
    )
    how.add_argument(
        "--buckets",
        metavar="LIST",
        help=f"token budgets: 2k, 3k, 4k or NAME=TOKENS (default: {_BUCKETS})",
    )
    how.add_argument(
        "--steps",
        type=int,
        help="default steps of a decode: 1, 2 or 4; undistilled 1 to 100 (default: 4, or 25)",
    )
    how.add_argument(
        "--arbitrary-timesteps",
        action="store_true",
        help="keep the timestep network in the graph; undistilled checkpoints always do",
    )
    fp8 = parser.add_argument_group("fp8, and --keep of int8")
    fp8.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="a file of pid-calibrate, or a folder of latents, for nano of photographs (default: "
        "nano's own file, for others made-up latents)",
    )
    fp8.add_argument(
        "--keep",
        metavar="LIST",
        help="graphs that are not rounded, such as image.13,pixel_attention (default: those that "
        "the calibration names)",
    )
    fp8.add_argument(
        "--sensitivity",
        action="store_true",
        help="show what it costs to round each graph alone, which takes a decode for each",
    )
    parser.add_argument(
        "--list", action="store_true", help="show the checkpoints that can be exported, and stop"
    )
    parser.add_argument("-o", "--output", type=Path, help="the new bundle's folder")
    return parser


def _dimensions() -> str:
    """Every field of a network's configuration with its default, for the help text."""
    rows = [[f"  {field.name}", str(field.default)] for field in fields(PidConfig)]
    return console.aligned(rows, left=(0, 1))


def _export(args: Namespace) -> None:
    if args.list:
        _list(as_json=args.json)
        return
    if args.output is None:
        raise ExportInputError("expected -o FOLDER for the new bundle, but got none; add it")
    if args.vae is not None:
        _export_vae(args)
        return
    if args.caption_encoder is not None:
        _export_captioner(args)
        return
    _check_fp8(args)
    is_fp8 = args.precision in FP8_PRECISIONS
    config, checkpoint = _network(args)
    check_new(args.output)
    # Loading torch takes seconds: not before the arguments are known to make sense.
    from pid_export.bundle import ExportOptions, export_bundle, parse_buckets

    options = ExportOptions(
        "fp32" if is_fp8 else args.precision,
        parse_buckets(_BUCKETS if args.buckets is None else args.buckets, config.patch_size),
        args.steps,
        args.arbitrary_timesteps,
        undistilled=checkpoint is not None and not checkpoint.distilled,
        keep=() if is_fp8 else _kept(args) or (),
    )
    if checkpoint is not None and checkpoint.deprecated:
        _log.info(
            "%s is superseded by the v1.5 checkpoint; --variant 2kto4k takes that",
            checkpoint.label,
        )
    source, weights = _weights(args, config, checkpoint)
    begin = time.monotonic()
    export = partial(export_bundle, checkpoint=checkpoint, weights=weights)
    rounded: Rounded | None = None
    if is_fp8:
        from pid_export.fp8_export import Rounding, export_fp8

        rounding = Rounding(
            args.precision,
            _calibration(args, checkpoint),
            _kept(args),
            sensitivity=args.sensitivity,
        )
        rounded = export_fp8(
            args.output, config, source, options, rounding, export, quiet=args.quiet
        )
        manifest = rounded.manifest
    else:
        with console.progress("Exporting", 1.0, quiet=args.quiet) as advance:
            manifest = export(args.output, config, source, options, advance=advance)
    total = sum(file.bytes for file in manifest.files.values())
    arena_bytes = {name: bucket.arena_bytes for name, bucket in manifest.buckets.items()}
    seconds = time.monotonic() - begin
    result = {
        "bundle": str(args.output),
        "model": manifest.model["name"],
        "precision": manifest.precision,
        "bytes": total,
        "graphs": len(manifest.graphs),
        "arena_bytes": arena_bytes,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if rounded is not None:
        result |= rounded.result
    arenas = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in arena_bytes.items())
    text = (
        f"{args.output}: {manifest.model['name']}, {manifest.precision}, {total / 1e9:.2f} GB, "
        f"{len(manifest.graphs)} graphs, {seconds:.0f} s\narena per image: {arenas}; the weights, "
        "and what the backend works in, come on top: docs/memory.md"
    )
    if rounded is not None:
        text += f"\n{rounded.text}"
    console.emit(result, text, as_json=args.json)


def _check_fp8(args: Namespace) -> None:
    """Raise `ExportInputError` for fp8's own options without it."""
    if args.precision in FP8_PRECISIONS:
        if args.calibration is not None and not args.calibration.exists():
            raise ExportInputError(
                f"expected latents, or a file of pid-calibrate, but {args.calibration} is not "
                "there; check --calibration"
            )
        return
    is_int8 = args.precision in INT8_PRECISIONS
    for name in ("calibration", "sensitivity") if is_int8 else FP8_OPTIONS:
        if getattr(args, name) not in (None, False):
            raise ExportInputError(
                f"expected --{name} with --precision fp8, but got {args.precision}; drop it, or "
                "change the precision"
            )


def _kept(args: Namespace) -> tuple[str, ...] | None:
    """Graphs to leave as they are; None if it is not said."""
    return None if args.keep is None else tuple(filter(None, args.keep.split(",")))


def _calibration(args: Namespace, checkpoint: Checkpoint | None) -> Path | None:
    """Where calibration comes from: as asked, or from the file that lies beside the weights."""
    if args.calibration is None and not (args.checkpoint or args.random_weights is not None):
        file = checkpoint and checkpoint.file
        return file and file.with_suffix(".calibration.json")
    return args.calibration


def _export_vae(args: Namespace) -> None:
    _refuse_others(args, "vae", "caption_encoder")
    if args.space is None:
        raise ExportInputError("expected --space with --vae, but got none; add the space it is of")
    if args.precision != "fp32":
        raise ExportInputError(
            f"expected --precision fp32 for an autoencoder, but got {args.precision!r}; drop it"
        )
    check_new(args.output)
    console.need_packages(("diffusers",), "pipelines")
    from pid_export.vae import export_vae

    begin = time.monotonic()
    with console.progress("Exporting", 1.0, quiet=args.quiet) as advance:
        vae = export_vae(find_space(args.space).name, args.vae or None, args.output, advance)
    seconds = time.monotonic() - begin
    total = sum(file.bytes for file in vae.files.values())
    result = {
        "vae": str(args.output),
        "space": vae.space,
        "source": vae.source,
        "bytes": total,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    text = f"{args.output}: autoencoder of {vae.space}, {total / 1e9:.2f} GB, {seconds:.0f} s"
    console.emit(result, text, as_json=args.json)


def _refuse_others(args: Namespace, chosen: str, *others: str) -> None:
    """Raise `ExportInputError` for an option that does not go with what is to be exported."""
    for name in (*others, *_OF_DECODERS):
        if not any(getattr(args, name) is absent for absent in (None, False)):
            raise ExportInputError(
                f"expected no --{name.replace('_', '-')} with --{chosen.replace('_', '-')}, but "
                "got one; drop it"
            )


def _export_captioner(args: Namespace) -> None:
    _refuse_others(args, "caption_encoder", "space")
    check_new(args.output)
    console.need_packages(("transformers", "diffusers", "tokenizers"), "pipelines")
    from pid_export.captioner import export_captioner

    begin = time.monotonic()
    with console.progress("Exporting", 1.0, quiet=args.quiet) as advance:
        captioner = export_captioner(args.caption_encoder, args.output, args.precision, advance)
    seconds = time.monotonic() - begin
    total = sum(file.bytes for file in captioner.files.values())
    result = {
        "captioner": str(args.output),
        "encoder": captioner.encoder,
        "revision": captioner.revision,
        "precision": captioner.precision,
        "width": captioner.width,
        "bytes": total,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    text = (
        f"{args.output}: {captioner.encoder}, {captioner.precision}, {total / 1e9:.2f} GB, "
        f"{seconds:.0f} s"
    )
    console.emit(result, text, as_json=args.json)


def _list(*, as_json: bool) -> None:
    """What can be exported, and the sizes in pixels of the latent's own image and of the result."""
    rows: list[dict[str, Any]] = []
    for each in CHECKPOINTS.values():
        sides = [side for size in trained_sizes(each) for side in size]
        rows.append(
            {
                "space": each.space.name,
                "variant": each.variant,
                "version": each.version,
                "superseded": each.deprecated,
                "scale": each.space.scale,
                "native": [side // each.space.scale for side in (min(sides), max(sides))]
                if sides
                else None,
                "output": [min(sides), max(sides)] if sides else None,
                "checkpoint": each.name,
            }
        )
    table = [["space", "variant", "version", "native sides", "output sides", ""]]
    for row in rows:
        native, output = (
            "{}-{}".format(*row[key]) if row[key] else "any" for key in ("native", "output")
        )
        note = "superseded" if row["superseded"] else ""
        table.append([row["space"], row["variant"], row["version"], native, output, note])
    text = console.aligned(table, left=range(len(table[0])))
    console.emit({"checkpoints": rows}, text, as_json=as_json)


def _network(args: Namespace) -> tuple[PidConfig, Checkpoint | None]:
    """The network's dimensions, and the released checkpoint they are of, if one was named."""
    if args.space is None and (args.config is None or args.variant):
        got = "only --variant" if args.variant else "neither"
        raise ExportInputError(
            f"expected --space and --variant, but got {got}; or give --config FILE.json"
        )
    checkpoint = find_checkpoint(args.space, args.variant) if args.space else None
    if args.config is None:
        assert checkpoint is not None
        return checkpoint.config, checkpoint
    try:
        text = args.config.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportInputError(
            f"expected a file of network dimensions, but got {error}; check --config"
        ) from None
    config = PidConfig.from_json(text, checkpoint and checkpoint.config)
    return config, checkpoint and replace(checkpoint, name="", config=config, file=None)


def _weights(
    args: Namespace, config: PidConfig, checkpoint: Checkpoint | None
) -> tuple[Mapping[str, "Tensor"], dict[str, Any]]:
    """The checkpoint's tensors, and what the manifest says of where they came from."""
    from pid_ref.checkpoint import checkpoint_file, read_checkpoint, state_shapes
    from pid_ref.hub import download
    from pid_ref.weights import RandomWeights

    if args.random_weights is not None:
        if args.checkpoint is not None:
            raise ExportInputError(
                "expected --checkpoint or --random-weights, but got both; leave one out"
            )
        if not 0 <= args.random_weights < 2**32:
            raise ExportInputError(
                f"expected a seed in [0, 2^32), but got {args.random_weights}; 0 is as good as any"
            )
        _log.info("random weights: images will be noise, speed and memory are the real ones")
        return RandomWeights(state_shapes(config), args.random_weights), {
            "random_seed": args.random_weights
        }
    path = args.checkpoint
    if path is None:
        if args.config is not None:
            raise ExportInputError(
                "expected weights with --config, but got none; add --checkpoint PATH or "
                "--random-weights SEED"
            )
        assert checkpoint is not None
        path = checkpoint.file or download(checkpoint)
    source = read_checkpoint(path, checkpoint or config, force_space=args.force_space)
    file = checkpoint_file(path)
    return source, {"file": file.name, "sha256": file_sha256(file)}
