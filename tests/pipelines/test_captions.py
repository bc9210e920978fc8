"""Caption embeddings of a tiny Gemma-2, against those of the public caption code."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from numpy.typing import NDArray
from safetensors import safe_open

from pid_pipelines import caption_model, caption_tokens
from pid_pipelines.caption_cache import CaptionCache
from pid_pipelines.captions import DEFAULT_ENCODER, CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from places import GOLDEN

FOLDER = GOLDEN / "captions"
ENCODER = FOLDER / "encoder"
FILES = sorted(FOLDER.glob("*.safetensors"))

Floats = NDArray[np.float32]


def tiny(encoder: str | Path = ENCODER, **options: Any) -> CaptionEncoder:
    given: dict[str, Any] = {"dtype": "fp32", "width": 32, **options}
    return CaptionEncoder(encoder, **given)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """An encoder's folder to spoil."""
    return shutil.copytree(ENCODER, tmp_path / "encoder")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a language model was loaded: its names."""
    names: list[str] = []
    real = caption_model.load_states

    def load(folder: Path, name: str, dtype: str, device: str) -> Any:
        names.append(name)
        return real(folder, name, dtype, device)

    monkeypatch.setattr(caption_model, "load_states", load)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_embeddings_are_the_golden_ones(path: Path) -> None:
    with safe_open(path, "np") as file:
        about, wanted = file.metadata(), file.get_tensor("out/embedding")
    texts = json.loads(about["captions"])
    with tiny() as encoder:
        got = encoder.encode(texts, int(about["max_length"]), plain=about["chi_prompt"] == "false")
        alone = encoder.encode(texts[2:3], int(about["max_length"]), plain="plain" in path.stem)
    assert got.shape == wanted.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone, wanted[2:3], rtol=0, atol=1e-5)


def test_all_golden_files_are_here() -> None:
    assert [path.stem for path in FILES] == ["captions_12", "captions_12_plain", "captions_300"]


def test_the_empty_caption_is_encoded() -> None:
    with tiny() as encoder:
        empty, blank = encoder.encode(["", "a"], 12)
    assert np.abs(empty).min(axis=1).max() > 0 and np.abs(empty - blank).max() > 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precisions_are_near(dtype: Any) -> None:
    with tiny() as exact, tiny(dtype=dtype) as encoder:
        wanted, got = exact.encode(["a small boat"], 12), encoder.encode(["a small boat"], 12)
    assert 0 < np.abs(got - wanted).max() < 0.3


def test_a_caption_that_is_cut_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with tiny() as encoder:
        encoder.encode(["a boat", "red " * 30], 12)
        (line,) = [record.getMessage() for record in caplog.records if "cut" in record.msg]
        assert line.startswith("a caption is ") and "tokens too long and is cut: 'red red" in line
        assert line.endswith("; 10 fit")
        caplog.clear()
        encoder.encode(["red " * 30], 300)
    assert [record for record in caplog.records if "cut" in record.msg] == []


# The cache


def test_a_caption_is_encoded_once(tmp_path: Path, loads: list[str]) -> None:
    cache = CaptionCache(tmp_path / "captions")
    with tiny(cache=cache) as encoder:
        first = encoder.encode(["a boat", "", "a boat"], 12)
    assert len(list(cache.folder.iterdir())) == 2 and len(loads) == 1
    np.testing.assert_array_equal(first[0], first[2])
    with tiny(cache=cache) as encoder:
        np.testing.assert_array_equal(encoder.encode(["", "a boat"], 12), first[1::-1])
    assert len(loads) == 1
    with tiny(cache=cache) as encoder:
        mixed = encoder.encode(["a lake", "a boat"], 12)
    assert len(loads) == 2
    np.testing.assert_array_equal(mixed[1], first[0])


@pytest.mark.parametrize("what", ["text", "length", "dtype", "plain", "encoder"])
def test_whatever_changes_a_caption_changes_its_place(
    tmp_path: Path, loads: list[str], copied: Path, what: str
) -> None:
    cache = CaptionCache(tmp_path / "captions")
    with tiny(cache=cache) as encoder:
        encoder.encode(["a boat"], 12)
    if what == "encoder":
        config = copied / "config.json"
        config.write_text(
            config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
        )
    changed: dict[str, Any] = {
        "dtype": {"dtype": "bf16"},
        "encoder": {"encoder": copied},
    }.get(what, {})
    with tiny(cache=cache, **changed) as encoder:
        encoder.encode(
            ["a lake" if what == "text" else "a boat"],
            13 if what == "length" else 12,
            plain=what == "plain",
        )
    assert len(loads) == 2 and len(list(cache.folder.iterdir())) == 2


def test_precisions_are_kept(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path)
    with tiny(cache=cache, dtype="bf16") as encoder:
        first = encoder.encode(["a boat"], 12)
        np.testing.assert_array_equal(encoder.encode(["a boat"], 12), first)
    (entry,) = tmp_path.iterdir()
    with safe_open(entry, "np") as file:
        assert file.get_slice("caption").get_dtype() == "BF16"
        assert file.metadata()["text"] == "a boat"


def test_a_broken_entry_is_made_again(tmp_path: Path, loads: list[str]) -> None:
    with tiny(cache=CaptionCache(tmp_path)) as encoder:
        wanted = encoder.encode(["a boat"], 12)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    with tiny(cache=CaptionCache(tmp_path)) as encoder:
        np.testing.assert_array_equal(encoder.encode(["a boat"], 12), wanted)
    with tiny(cache=CaptionCache(tmp_path)) as encoder:
        encoder.encode(["a boat"], 12)
    assert len(loads) == 2


def test_the_cache_stays_small(tmp_path: Path) -> None:
    value = np.zeros((12, 32), np.float32)
    cache = CaptionCache(tmp_path, most_bytes=3 * (value.nbytes + 500))
    for number in range(6):
        cache.put({"text": number}, value + number)
        if number:
            first = cache.get({"text": 0})  # used again and again
            assert first is not None and not first.any()
    kept = [number for number in range(6) if cache.get({"text": number}) is not None]
    assert kept == [0, 4, 5]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from pid_pipelines.caption_cache import CaptionCache
cache = CaptionCache(Path(sys.argv[1]), most_bytes=40_000)
for number in range(60):
    value = np.full((12, 32), number, np.float32)
    cache.put({"n": number}, value)
    for other in range(60):
        found = cache.get({"n": other})
        assert found is None or (found == other).all(), other
"""


def test_processes_share_a_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in started:
        _, err = process.communicate()
        assert process.returncode == 0, err.decode()
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


# Memory

WATCHER = """
import sys
import torch
from transformers.models.gemma2 import Gemma2Config, Gemma2Model
from pid_pipelines.captions import CaptionEncoder

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

torch.set_num_threads(1)
with CaptionEncoder(sys.argv[1], dtype="fp32", width=None) as encoder:
    encoder.encode(["a boat"], 12, plain=True)
    loaded = resident()
print(loaded, resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_closed_encoder_leaves_no_memory(copied: Path) -> None:
    from transformers.models.gemma2 import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=343,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Gemma2Model(config).save_pretrained(copied)
    weights = sum(path.stat().st_size for path in copied.glob("*.safetensors")) / 1e6
    assert weights > 100
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, str(copied)], capture_output=True, text=True, check=True
    )
    loaded, closed = map(float, done.stdout.split())
    assert loaded - closed > 0.8 * weights, (done.stdout, weights)


# Mistakes


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(PipelineInputError) as caught, tiny(**options) as encoder:
        encoder.encode(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("texts", ["a boat", [], [3], [None], ()])
def test_what_is_no_list_of_texts(texts: Any) -> None:
    assert "expected a list of captions, but got " in refusal(texts)


def test_a_length_too_small() -> None:
    assert "expected a length of at least 2 tokens, but got 1" in refusal(["a"], 1)


def test_a_closed_encoder() -> None:
    with tiny() as encoder:
        pass
    with pytest.raises(PipelineInputError, match="open encoder, but it was closed"):
        encoder.encode(["a"])


def test_another_width() -> None:
    message = refusal(["a"], width=2304)
    assert "expected an encoder of hidden size 2304" in message and "has 32; take" in message


def test_another_dtype() -> None:
    assert "expected dtype fp32 or fp16 or bf16, but got 'int8'" in refusal(["a"], dtype="int8")


def test_another_device() -> None:
    assert "expected a device of torch, but got 'gpu'" in refusal(["a"], device="gpu")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "as transformers saves it, with config.json and tokenizer.json, but"),
        ("config.json", "{}", "no config.json with a hidden_size"),
        ("tokenizer.json", None, "expected tokenizer.json beside the encoder, but "),
        ("tokenizer.json", "{}", "to be a tokenizer, but got: "),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "expected a tokenizer with '<s>'"),
        ("model.safetensors", None, "to be a language model that transformers loads, but got: "),
        ("model.safetensors", "x", "to be a language model that transformers loads, but got: "),
    ],
)
def test_a_folder_that_is_no_encoder(
    copied: Path, file: str, content: str | None, said: str
) -> None:
    if content is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(content)
    assert said in refusal(["a"], encoder=copied)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (errors.GatedRepoError.__new__(errors.GatedRepoError), "asks for an accepted license"),
        (errors.HFValidationError("bad"), "neither a folder nor the name of a repository"),
    ],
)
def test_what_the_hub_does_not_give(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    message = refusal(["a"], encoder="google/gemma-2-2b-it")
    assert message.startswith("expected the caption encoder google/gemma-2-2b-it, but ")
    assert reason in message and f"; {DEFAULT_ENCODER} needs no login" in message


def test_a_repository_is_named_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(repository: str, allow_patterns: list[str]) -> str:
        assert repository == DEFAULT_ENCODER and "*.safetensors" in allow_patterns
        return str(shutil.copytree(ENCODER, tmp_path / "snapshots" / "0123abc"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with tiny(DEFAULT_ENCODER) as encoder:
        assert encoder.revision == f"{DEFAULT_ENCODER}@0123abc"
        assert encoder.encode(["a"], 12).shape == (1, 12, 32)


@pytest.mark.parametrize(("dtype", "fix"), [("fp16", "take bf16 or fp32"), ("fp32", "are broken")])
def test_states_that_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, fix: str
) -> None:
    def load(*_: Any) -> Any:
        return lambda tokens: np.full((*tokens.ids.shape, 32), np.nan, np.float32)

    monkeypatch.setattr(caption_model, "load_states", load)
    message = refusal(["a"], 12, dtype=dtype, cache=CaptionCache(tmp_path / "cache"))
    assert f"{ENCODER} in {dtype} made NaN or infinity; " in message and fix in message
    assert not (tmp_path / "cache").exists()


def test_another_instruction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "INSTRUCTION_SHA256", "0")
    assert "expected diffusers with the instruction" in refusal(["a"], 12)


def test_a_tokenizer_that_leaves_the_beginning_out(copied: Path) -> None:
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with tiny() as one, tiny(copied) as other:
        np.testing.assert_array_equal(one.encode(["a boat"], 12), other.encode(["a boat"], 12))


def test_logs_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pid_pipelines"), tiny() as encoder:
        encoder.encode(["a boat"], 12)
    assert [r for r in caplog.records if r.name.startswith("pid_")] == []
