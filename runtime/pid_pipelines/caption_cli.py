"""The command `pid-caption`: caption embeddings from text, for pid-decode."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pid_pipelines.prompts import read_prompts
from pid_runtime.bundle.files import whole_folder, write_whole
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import console


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return console.run(_parser(), _caption, argv, extra="pipelines")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-caption",
        "Encode captions for pid-decode, by the language model that PiD was trained with.",
        """\
examples:
  pid-caption --text "a small boat on a lake" -o caption.safetensors
  pid-caption --prompt-file prompts.txt -o captions/
      one file for every line: 0001.safetensors, 0002.safetensors, ..
  pid-caption --text "a boat" --encoder gemma-2-2b-it/ --device cuda -o boat.safetensors

output:
  A file has "caption" [T, D], or [B, T, D] for a file of prompts, and with --negative "negative"
  [T, D], in the precision it was computed in. Google's weights have terms of use of their own.""",
    )
    what = parser.add_argument_group("what to encode")
    texts = what.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", metavar="TEXT", help='one caption; "" is one too')
    texts.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="captions, one in each line"
    )
    what.add_argument("--negative", metavar="TEXT", help="what guidance is to lead away from")
    what.add_argument(
        "--bundle", type=Path, help="what it is for: length and width are the bundle's"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--encoder",
        metavar="ID_OR_DIR",
        help="repository, folder, or a captioner by pid-export --caption-encoder, which needs no "
        "torch (default: Efficient-Large-Model/gemma-2-2b-it)",
    )
    how.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="(default: bf16; of a captioner its own)"
    )
    how.add_argument(
        "--device", default="cpu", help="cpu, cuda, cuda:N, or for a captioner another provider"
    )
    how.add_argument("--no-cache", action="store_true", help="neither look for captions nor keep")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .safetensors file, or for a file of prompts a new folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def _caption(arguments: Namespace) -> None:
    from pid_pipelines.caption_cache import CaptionCache
    from pid_pipelines.captions import DEFAULT_ENCODER, LENGTH, WIDTH, CaptionEncoder, rounded

    file = arguments.prompt_file
    texts = [arguments.text] if file is None else read_prompts(file)
    _check_output(arguments)
    length, width = LENGTH, WIDTH
    if arguments.bundle is not None:
        network = read_manifest(arguments.bundle, verify=False).network
        length, width = network["text_max_length"], network["text_dim"]
    cache = None if arguments.no_cache else CaptionCache()
    all_texts = texts if arguments.negative is None else [*texts, arguments.negative]
    encoder = CaptionEncoder(
        arguments.encoder or DEFAULT_ENCODER,
        dtype=arguments.dtype,
        device=arguments.device,
        cache=cache,
        width=width,
    )
    with (
        encoder,
        console.progress("Encoding", len(all_texts), quiet=arguments.quiet) as advance,
    ):
        captions = encoder.encode(all_texts, length, progress=advance)
    values: Any = rounded(captions, encoder.dtype)
    negative = {} if arguments.negative is None else {"negative": values[-1]}
    about = {
        "encoder": encoder.name,
        "revision": encoder.revision,
        "dtype": encoder.dtype,
    }
    if arguments.negative is not None:
        about["negative"] = arguments.negative
    _write(arguments, texts, values[: len(texts)], negative, about)
    result = {
        "output": str(arguments.output),
        "captions": len(texts),
        "negative": arguments.negative is not None,
        "length": length,
        "width": encoder.width,
        **about,
    }
    count = "1 caption" if len(texts) == 1 else f"{len(texts)} captions"
    text = f"{arguments.output}: {count} of {length} tokens x {encoder.width}, {encoder.dtype}"
    console.emit(result, text, as_json=arguments.json)


def _check_output(arguments: Namespace) -> None:
    """Raise `PipelineInputError` before the long work rather than after it."""
    from pid_pipelines.errors import PipelineInputError

    path: Path = arguments.output
    if path.suffix != ".safetensors":
        if arguments.prompt_file is None:
            raise PipelineInputError(
                f"expected a .safetensors file for -o, but got {path}; a folder takes --prompt-file"
            )
        if path.exists():
            raise PipelineInputError(f"expected a new folder, but {path} exists; name another")
    elif path.exists() and not arguments.overwrite:
        raise PipelineInputError(
            f"expected a new file, but {path} exists; name another or pass --overwrite"
        )
    elif not path.parent.is_dir():
        raise PipelineInputError(f"expected a folder for -o, but {path.parent} is none; make it")


def _write(
    arguments: Namespace,
    texts: Sequence[str],
    values: Any,
    negative: dict[str, Any],
    about: dict[str, str],
) -> None:
    path: Path = arguments.output

    def content(caption: Any, text: str) -> bytes:
        tensors = {"caption": caption, **negative}
        whole = {name: np.ascontiguousarray(each) for name, each in tensors.items()}
        return save(whole, {**about, "text": text})

    if path.suffix == ".safetensors":
        one = arguments.prompt_file is None
        write_whole(path, content(values[0] if one else values, "\n".join(texts)))
        return
    with whole_folder(path) as folder:
        for number, (text, caption) in enumerate(zip(texts, values, strict=True), 1):
            write_whole(folder / f"{number:04}.safetensors", content(caption, text))


if __name__ == "__main__":
    raise SystemExit(main())
