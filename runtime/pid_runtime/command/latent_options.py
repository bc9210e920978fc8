"""Which latents a command decodes: the options, and what follows from them."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pid_runtime.command import console
from pid_runtime.command.decode_jobs import Settings
from pid_runtime.command.decode_options import number
from pid_runtime.command.latent_files import FORMS, LatentForm
from pid_runtime.command.sampling_options import Sampling
from pid_runtime.errors import PidRuntimeError


def add_latent_paths(
    parser: argparse.ArgumentParser, *, required: bool = True, hidden: Sequence[str] = ()
) -> None:
    """A latent file or a folder of them; hidden: paths that may stand there unseen."""
    paths = parser.add_mutually_exclusive_group(required=required)
    paths.add_argument("--latent", type=Path, metavar="FILE", help="a latent file")
    paths.add_argument("--latents", type=Path, metavar="DIR", help="a folder of latent files")
    for option in hidden:
        paths.add_argument(option, type=Path, help=argparse.SUPPRESS)


def add_latent_options(parser: argparse.ArgumentParser) -> None:
    """What latents in files are, and the captions and noise level that go with them."""
    add = parser.add_argument
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--caption", type=Path, metavar="FILE", help="one caption for all")
    captions.add_argument(
        "--captions", type=Path, metavar="DIR", help="a folder of captions named as the inputs"
    )
    add("--latent-key", metavar="NAME", help="the latent's tensor, if it has another name")
    add(
        "--latent-form",
        type=_form,
        default=LatentForm(),
        metavar="FORM",
        help=f"{', '.join(FORMS)}; raw:FILE says whose statistics normalise it, packed:1024x768 of "
        "which picture it is (default: auto)",
    )
    add("--caption-key", metavar="NAME", help="the caption's tensor, if it has another name")
    add(
        "--sigma",
        type=number,
        help="noise level of the latents, 0 to 1 (default: the files', or 0)",
    )


def check_latent_options(arguments: Namespace) -> None:
    """Raise `PidRuntimeError` for a folder where a file belongs, and the other way round."""
    if arguments.captions is not None and arguments.latents is None:
        raise PidRuntimeError("expected --captions with --latents, but got --latent; drop it")
    for name in ("latent", "caption"):
        file = getattr(arguments, name)
        if file is not None and file.is_dir():
            raise PidRuntimeError(
                f"expected a file for --{name}, but {file} is a folder; use --{name}s"
            )
    for name in ("latents", "captions"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            raise PidRuntimeError(f"expected a folder for --{name}, but {folder} is none")


def latent_settings(arguments: Namespace, sampling: Sampling) -> Settings:
    """What holds for every latent."""
    return Settings(
        arguments.latent_key,
        arguments.caption_key,
        arguments.latent_form,
        arguments.sigma,
        arguments.seed,
        sampling,
    )


def _form(text: str) -> LatentForm:
    kind, colon, more = text.partition(":")
    if kind not in FORMS or (colon and (kind not in ("raw", "packed") or not more)):
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(FORMS)}, raw:FILE or packed:1024x768, but got {text!r}"
        )
    if kind == "raw" and colon:
        return LatentForm(kind, statistics=Path(more))
    try:
        return LatentForm(kind, console.read_size(more) if colon else None)
    except PidRuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
