"""`pid-caption`, with a tiny encoder, for a bundle of golden weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pid_pipelines.caption_cli import main
from pid_pipelines.captions import CaptionEncoder
from pid_runtime.command.latent_files import open_caption_file
from places import GOLDEN

ENCODER = GOLDEN / "captions" / "encoder"

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PID_CAPTION_CACHE", str(folder))
    return folder


@pytest.fixture
def caption(run_command: RunCommand, golden_bundle: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the command for the golden bundle; gives its exit code, stdout and stderr."""

    def run(*arguments: object, output: object = tmp_path / "caption.safetensors") -> Any:
        given = ("--encoder", ENCODER, "--bundle", golden_bundle, "-o", output)
        return run_command(main, *arguments, *given)

    return run


def encoded(*texts: str, dtype: Any = "bf16") -> Any:
    with CaptionEncoder(ENCODER, dtype=dtype, width=32) as encoder:
        return encoder.encode(texts, 12)


def test_one_caption_is_what_pid_decode_reads(caption: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "caption.safetensors"
    assert caption("--text", "a boat", "--negative", "blurry") == (
        0,
        f"{path}: 1 caption of 12 tokens x 32, bf16\n",
        "",
    )
    stored = open_caption_file(path)
    assert stored.shape == (1, 12, 32)
    np.testing.assert_array_equal(stored.read(), encoded("a boat"))
    negative = open_caption_file(path, "negative").read()
    np.testing.assert_array_equal(negative, encoded("blurry"))
    with safe_open(path, "np") as file:
        about = file.metadata()
    assert about.items() >= {"text": "a boat", "negative": "blurry", "dtype": "bf16"}.items()
    assert about["revision"].startswith("sha256:")


def test_a_file_of_prompts(caption: Callable[..., Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa boat\n\n  ein Fluß \n", "utf-8")
    given = ("--prompt-file", prompts, "--dtype", "fp32")
    code, out, err = caption(*given, "--json")
    assert code == 0 and err == f"1 of 3 lines of {prompts} are empty and left out\n"
    result = json.loads(out)
    assert (result["captions"], result["length"], result["width"]) == (2, 12, 32)
    wanted = encoded("a boat", "ein Fluß", dtype="fp32")
    np.testing.assert_array_equal(load_file(result["output"])["caption"], wanted)
    assert caption(*given, "--quiet", output=tmp_path / "all")[::2] == (0, "")
    files = sorted((tmp_path / "all").iterdir())
    assert [file.name for file in files] == ["0001.safetensors", "0002.safetensors"]
    for file, one in zip(files, wanted, strict=True):
        np.testing.assert_array_equal(load_file(file)["caption"], one)


def test_what_is_cached_needs_no_model(
    caption: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert caption("--text", "a boat")[0] == 0
    assert len(list(cache.iterdir())) == 1

    def refuse(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pid_pipelines.caption_model.load_states", refuse)
    assert caption("--text", "a boat", "--overwrite")[0] == 0
    with pytest.raises(AssertionError, match="a model was loaded"):
        caption("--text", "a boat", "--overwrite", "--no-cache")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "output", "said"),
    [
        ((), None, "one of the arguments --text --prompt-file is required"),
        (("--text", "a", "--prompt-file", "b"), None, "not allowed with argument --text"),
        (("--text", "a"), "folder", "expected a .safetensors file for -o, but got "),
        (("--text", "a"), "none/a.safetensors", "expected a folder for -o, but "),
        (("--text", "a"), "there.safetensors", "exists; name another or pass --overwrite"),
        (("--prompt-file", "{there}"), "there.d", "expected a new folder, but "),
        (("--prompt-file", "{empty}"), None, "expected a prompt in each line, but "),
        (("--prompt-file", "{bytes}"), None, "it is not UTF-8; give one prompt per line"),
        (("--prompt-file", "{none}"), None, "No such file or directory; give one prompt"),
        (("--text", "a", "--device", "gpu"), None, "expected a device of torch, but got 'gpu'"),
    ],
)
def test_mistakes_are_one_line(
    caption: Callable[..., Any],
    tmp_path: Path,
    arguments: tuple[str, ...],
    output: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {name: tmp_path / f"{name}.txt" for name in ("there", "empty", "bytes", "none")}
    files["there"].write_text("a boat")
    files["empty"].write_text(" \n\n")
    files["bytes"].write_bytes(b"\xff\xfe\xff")
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "there.d").mkdir()
    before = sorted(tmp_path.iterdir())
    words = [word.format(**files) for word in arguments]
    try:
        code, out, err = caption(*words, output=tmp_path / (output or "new.safetensors"))
    except SystemExit as error:
        code, (out, err) = error.code, capsys.readouterr()
    assert (code, out) == (2, "") and said in err, err
    assert err.startswith("pid-caption: ") and err.count("\n") == 1
    assert sorted(set(tmp_path.iterdir()) - {tmp_path / "cache"}) == before


def test_an_encoder_of_another_width(run_command: RunCommand, tmp_path: Path) -> None:
    code, _, err = run_command(
        main, "--text", "a", "--encoder", ENCODER, "-o", tmp_path / "a.safetensors"
    )
    assert code == 2 and "expected an encoder of hidden size 2304, which" in err
