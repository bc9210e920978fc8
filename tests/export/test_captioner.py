"""Captioners: the language model of captions as a graph, exported, and run without torch."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from pid_export.captioner import export_captioner
from pid_export.cli import main
from pid_pipelines.captioner import CAPTIONER_FILE, read_captioner
from pid_pipelines.captions import CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from pid_runtime.errors import PidRuntimeError
from places import GOLDEN

ENCODER = GOLDEN / "captions" / "encoder"
TEXTS = ["a small boat", "", "A boat, ein Fluß, 船"]

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def captioner_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small encoder, in float32, by the command: not to be changed.

    What the command printed is beside it.
    """
    folder = tmp_path_factory.mktemp("captioner") / "captioner"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main(["--caption-encoder", str(ENCODER), "-o", str(folder), "--json", "--quiet"])
    assert code == 0
    folder.with_suffix(".json").write_text(shown.getvalue())
    return folder


@pytest.fixture(scope="module")
def bf16_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "bf16"
    export_captioner(ENCODER, folder, "bf16")
    return folder


@pytest.fixture
def captioner(captioner_once: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return shutil.copytree(captioner_once, tmp_path / "captioner")


def encoded(encoder: Path, length: int = 12, **options: Any) -> np.ndarray:
    with CaptionEncoder(encoder, width=32, **options) as opened:
        return opened.encode(TEXTS, length)


@pytest.mark.parametrize("length", [12, 300])
def test_states_are_those_of_transformers(captioner_once: Path, length: int) -> None:
    wanted, got = encoded(ENCODER, length, dtype="fp32"), encoded(captioner_once, length)
    assert got.shape == (3, length, 32) and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    with CaptionEncoder(captioner_once, width=32) as encoder:
        np.testing.assert_allclose(encoder.encode(TEXTS[2:], length), wanted[2:], rtol=0, atol=1e-4)
        plain = encoder.encode(TEXTS, length, plain=True)
    with CaptionEncoder(ENCODER, dtype="fp32", width=32) as encoder:
        wanted = encoder.encode(TEXTS, length, plain=True)
    np.testing.assert_allclose(plain, wanted, rtol=0, atol=1e-4)


def test_what_the_command_writes(run_command: RunCommand, captioner_once: Path) -> None:
    folder = captioner_once
    result = json.loads(folder.with_suffix(".json").read_text())
    assert result["encoder"] == "encoder" and result["width"] == 32
    names = {"captioner.json", "captioner.onnx", "captioner.onnx.data"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    said = read_captioner(folder)
    assert said.precision == "fp32" and said.revision == result["revision"]
    assert said.instruction.startswith("Given a user prompt")
    assert sum(file.bytes for file in said.files.values()) == result["bytes"]
    graph = (folder / "captioner.onnx").read_bytes()
    assert b"site-packages" not in graph and b".py" not in graph
    onnx.checker.check_model(str(folder / "captioner.onnx"))
    assert "exists already" in run_command(main, "--caption-encoder", ENCODER, "-o", folder)[2]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions(precision: str, bf16_captioner: Path, tmp_path: Path) -> None:
    folder = bf16_captioner
    if precision == "fp16":
        folder = tmp_path / "captioner"
        export_captioner(ENCODER, folder, precision)
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    graph = onnx.load(folder / "captioner.onnx", load_external_data=False).graph
    assert kind in {tensor.data_type for tensor in graph.initializer}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT  # for NumPy
    if precision == "fp16":
        assert 0 < np.abs(encoded(folder) - encoded(ENCODER, dtype="fp32")).max() < 0.05
        return
    with pytest.raises(PidRuntimeError, match="no bf16 kernels; export with --precision fp32"):
        encoded(folder)


@pytest.mark.slow
def test_another_beginning_and_a_window_shorter_than_the_text(tmp_path: Path) -> None:
    """The beginning is what the tokenizer says.

    The window is that of half of the layers, in which tokens see no further; a real one is longer.
    """
    usual = shutil.copytree(ENCODER, tmp_path / "usual")
    config = usual / "config.json"
    config.write_text(config.read_text().replace('window": 4096', 'window": 200'))
    encoder = shutil.copytree(usual, tmp_path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = encoder / name
        assert "<bos>" in file.read_text()
        file.write_text(file.read_text().replace("<bos>", "<s>"))
    export_captioner(encoder, tmp_path / "captioner")
    for length in (12, 300):
        wanted = encoded(usual, length, dtype="fp32")
        got = encoded(tmp_path / "captioner", length)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(encoded(encoder, 300, dtype="fp32"), wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted - encoded(ENCODER, 300, dtype="fp32")).max() > 0.1


def test_a_device_that_is_none(captioner_once: Path) -> None:
    with pytest.raises(PidRuntimeError, match="expected a device such as cuda:0, but got 'cpu:x'"):
        encoded(captioner_once, device="cpu:x")


def test_captions_without_torch(captioner_once: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'diffusers', 'transformers', 'onnx'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from pid_pipelines.caption_cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "caption.safetensors"
    manifest = tmp_path / "bundle"
    manifest.mkdir()
    arguments = ["--text", "a small boat", "--encoder", str(captioner_once), "-o", str(target)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--no-cache", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "of hidden size 2304" in done.stderr
    code = code.replace(
        "from pid_pipelines.caption_cli import main\n",
        "from pid_pipelines import captions\n"
        "captions.WIDTH = 32\n"
        "from pid_pipelines.caption_cli import main\n",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--no-cache", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    wanted = encoded(ENCODER, 300, dtype="fp32")[0]
    caption = load_file(target)["caption"]
    assert caption.dtype == np.float32
    np.testing.assert_allclose(caption, wanted, rtol=0, atol=1e-4)


def test_what_is_wrong_with_a_captioner(captioner: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(PipelineInputError) as caught:
            encoded(captioner, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "expected fp32, which" in refused(dtype="bf16")
    tokenizer = captioner / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"<unk>"', '"<nuk>"'))
    assert "tokenizer.json was altered; export it again" in refused()
    tokenizer.write_text(text)
    weights = captioner / "captioner.onnx.data"
    whole = weights.read_bytes()
    weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "captioner.onnx.data was altered; export it again" in refused()
    weights.write_bytes(whole[:-1])
    assert f"expected {len(whole)} bytes in {weights}, but it has {len(whole) - 1}" in refused()
    weights.unlink()
    assert "but it is missing; export it again" in refused()
    path = captioner / CAPTIONER_FILE
    said = json.loads(path.read_text())
    for text in ("", "[]", json.dumps(said | {"format_version": [2, 0]}), json.dumps({"a": 1})):
        path.write_text(text)
        assert f"but cannot read {path}: " in refused()


def test_what_cannot_be_exported(refusal: Refusal, tmp_path: Path) -> None:
    target = tmp_path / "captioner"
    for arguments, message in (
        (("--caption-encoder", ENCODER, "--space", "flux"), "expected no --space with"),
        (("--caption-encoder", ENCODER, "--random-weights", 0), "expected no --random-weights"),
        (("--caption-encoder", ENCODER, "--precision", "int8"), "--precision fp32, fp16, bf16"),
        (("--caption-encoder", tmp_path), "no config.json with a hidden_size"),
        (("--caption-encoder", "nobody/nothing"), "expected the caption encoder nobody/nothing"),
    ):
        assert message in refusal(main, *arguments, "-o", target)
        assert not target.exists()
    copy = shutil.copytree(ENCODER, tmp_path / "encoder")
    (copy / "tokenizer.json").unlink()
    assert "expected tokenizer.json" in refusal(main, "--caption-encoder", copy, "-o", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]


@pytest.mark.parametrize(
    "fixture", ["captioner_once", pytest.param("bf16_captioner", marks=pytest.mark.slow)]
)
def test_tensorrt_builds_it(request: pytest.FixtureRequest, tmp_path: Path, fixture: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'pid-trt[tensorrt-rtx]'")
    captioner = request.getfixturevalue(fixture)
    shapes = {"min": "[1,300]", "opt": "[1,600]", "max": "[4,1000]"}
    command = [str(Path(sys.executable).with_name("polygraphy")), "convert"]
    command += [str(captioner / "captioner.onnx"), "--convert-to", "trt"]
    for name, shape in shapes.items():
        ports = [f"{port}:{shape}" for port in ("input_ids", "attention_mask")]
        command += [f"--trt-{name}-shapes", *ports]
    command += ["--compute-capabilities", "8.9", "-o", str(tmp_path / "captioner.engine")]
    done = subprocess.run(
        command,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "captioner.engine").stat().st_size > 100_000


WATCHED = """
import gc, sys, numpy as np
from pid_pipelines.captions import CaptionEncoder

def resident():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

with CaptionEncoder(sys.argv[2], width=32, dtype="fp32") as encoder:
    encoder.encode(["warm"], 12)  # imports what it needs
gc.collect()
before = resident()
with CaptionEncoder(sys.argv[1], width=None, dtype="fp32") as encoder:
    encoder.encode(["a small boat"], 12)
    loaded = resident()
gc.collect()
print(before, loaded, resident())
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["transformers", "captioner"])
def test_a_closed_encoder_gives_its_memory_back(
    way: str, captioner_once: Path, tmp_path: Path
) -> None:
    from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=343,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
    )
    large = tmp_path / "large"
    Gemma2ForCausalLM(config).save_pretrained(large)
    shutil.copy(ENCODER / "tokenizer.json", large)
    size = (large / "model.safetensors").stat().st_size
    small, encoder = ENCODER, large
    if way == "captioner":
        small, encoder = captioner_once, tmp_path / "captioner"
        export_captioner(large, encoder)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(encoder), str(small)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, loaded, after = map(int, done.stdout.split())
    assert size > 200e6 and loaded - before > 0.7 * size
    assert after - before < 0.15 * size
