"""Files that others quantised: every format that is read, to the last bit, and those that are not.

The layouts are those that ComfyUI's loader reads; the values are made here.
"""

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import State, halves, small, weights
from pid_ref.checkpoint import read_checkpoint, state_shapes
from pid_ref.errors import PidInputError

# As wide as a rotation, so that real layouts fit.
FLUX = small("flux", "2k", hidden_size=256, text_dim=256, patch_depth=1)
LINEAR = "patch_blocks.0.attn.proj_x"
"""A layer of 256 x 256."""
CORE = "core."

Quantise = Callable[[torch.Tensor], tuple[State, torch.Tensor]]
"""Makes what a file holds of a weight, by the names behind `x.`, and what it stands for."""


def mark(**fields: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def fp8_by(
    name: str, dtype: torch.dtype = torch.float8_e4m3fn, shape: tuple[int, ...] = ()
) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        scale = weight.abs().max().float() / torch.finfo(dtype).max
        stored = (weight.float() / scale).to(dtype)
        meant = (stored.double() * scale.double()).float()
        return {"weight": stored, name: scale.reshape(shape)}, meant

    return quantise


def cast(dtype: torch.dtype) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        return {"weight": weight.to(dtype)}, weight.to(dtype).float()

    return quantise


@functools.cache
def rotation(size: int) -> torch.Tensor:
    """The orthogonal matrix of ConvRot: signs multiply digit by digit of base 4."""
    row, column = torch.arange(size)[:, None], torch.arange(size)[None, :]
    signs = torch.ones(size, size, dtype=torch.float64)
    for digit in range(round(math.log(size, 4))):
        signs[(row // 4**digit) % 4 + (column // 4**digit) % 4 == 3] *= -1
    return signs / math.sqrt(size)


def int8(group: int | None = None, **fields: Any) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        turned = weight.double()
        if group:
            turned = (turned.unflatten(1, (-1, group)) @ rotation(group).T).flatten(1)
        scale = (turned.abs().amax(1, keepdim=True) / 127).float()
        stored = (turned / scale).round().to(torch.int8)
        meant = stored.double() * scale.double()
        if group:
            meant = (meant.unflatten(1, (-1, group)) @ rotation(group)).flatten(1)
        note = mark(format="int8_tensorwise", **fields)
        return {"weight": stored, "weight_scale": scale, "comfy_quant": note}, meant.float()

    return quantise


def mxfp8(dtype: torch.dtype) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        blocks = weight.double().unflatten(1, (-1, 32))
        powers = (blocks.abs().amax(2) / 448).log2().ceil().clamp(-127, 127)
        stored = (blocks / 2 ** powers[:, :, None]).to(torch.float8_e4m3fn)
        rows, columns = powers.shape
        down, across = math.ceil(rows / 128), math.ceil(columns / 4)
        scales = torch.zeros(down * across * 512, dtype=torch.uint8)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        tile = row // 128 * across + column // 4
        place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        scales[place] = (powers + 127).to(torch.uint8)
        state = {
            "weight": stored.flatten(1),
            "weight_scale": scales.reshape(down * 128, across * 4).view(dtype),
            "comfy_quant": mark(format="mxfp8"),
        }
        return state, (stored.double() * 2 ** powers[:, :, None]).flatten(1).float()

    return quantise


def write(state: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    if file.suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file, metadata)
    return file


def replaced(parts: State, layer: str = LINEAR) -> State:
    """A file's tensors, one layer of which is stored so."""
    state = weights(FLUX)
    del state[f"{layer}.weight"]
    return state | {f"{layer}.{name}": value for name, value in parts.items()}


def large(state: State) -> list[str]:
    """Layers that quantisers take: matrices that rotations and blocks of 32 fit."""
    return [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 256 == 0
    ]


FORMATS: dict[str, tuple[Quantise, str]] = {
    "scaled fp8": (fp8_by("scale_weight", shape=(1,)), "scaled float8_e4m3fn"),
    "scaled fp8 of today": (fp8_by("weight_scale"), "scaled float8_e4m3fn"),
    "scaled e5m2": (fp8_by("weight_scale", torch.float8_e5m2), "scaled float8_e5m2"),
    "cast": (cast(torch.float8_e4m3fn), "float8_e4m3fn without scales"),
    "cast to e5m2": (cast(torch.float8_e5m2), "float8_e5m2 without scales"),
    "int8": (int8(), "int8_tensorwise"),
    "int8_convrot": (
        int8(256, convrot=True, convrot_groupsize=256, per_row=True),
        "int8_tensorwise with convrot",
    ),
    "int8_convrot by params": (
        int8(64, params={"convrot": True, "convrot_groupsize": 64}),
        "int8_tensorwise with convrot",
    ),
    "mxfp8": (mxfp8(torch.float8_e8m0fnu), "mxfp8"),
    "mxfp8 in bytes": (mxfp8(torch.uint8), "mxfp8"),
}


# Formats that are read


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_what_their_format_says_to_the_last_bit(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a file as people have it: a prefix, modulations in two parts, scales of activations."""
    quantise, words = FORMATS[format]
    pixels = FLUX.config.patch_size**2
    original = weights(FLUX)
    stored, meant = halves(original, pixels), halves(original, pixels)
    layers = large(stored)
    assert any(layer.endswith("_msa") for layer in layers) and len(layers) > 10
    for layer in layers:
        parts, value = quantise(stored.pop(f"{layer}.weight"))
        meant[f"{layer}.weight"] = value
        stored |= {f"{layer}.{name}": tensor for name, tensor in parts.items()}
        if len(parts) > 1:
            stored[f"{layer}.input_scale"] = torch.ones(())
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    named = {CORE + name: value for name, value in stored.items()}
    named["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)  # with the prefix and without
    file = write(named, tmp_path / "q.safetensors")
    with caplog.at_level(logging.INFO, logger="pid_ref"):
        found = read_checkpoint(file, FLUX)
    assert "skipped" not in caplog.text
    assert f"are quantised ({len(layers)} of {words})" in caplog.text
    assert list(found) == list(original)
    again = halves(dict(found), pixels)
    assert again.keys() == meant.keys()
    for name, value in again.items():
        assert torch.equal(value.float(), meant[name].float()), name
    for layer in layers:
        before = halves(original, pixels)[f"{layer}.weight"].float()
        error = (again[f"{layer}.weight"] - before).norm() / before.norm()
        assert error < (0.08 if "e5m2" in words else 0.04), (layer, float(error))


@pytest.mark.parametrize("format", ["scaled fp8", "int8_convrot"])
def test_a_pth_may_be_quantised_too(format: str, tmp_path: Path) -> None:
    parts, meant = FORMATS[format][0](weights(FLUX)[f"{LINEAR}.weight"])
    found = read_checkpoint(write(replaced(parts), tmp_path / "q.pth"), FLUX)
    assert torch.equal(found[f"{LINEAR}.weight"], meant)
    assert found[f"{LINEAR}.weight"].dtype == torch.float32
    assert found["s_embedder.proj.weight"].dtype == torch.bfloat16


def test_every_tensor_may_be_cast(tmp_path: Path) -> None:
    state = {name: value.to(torch.float8_e4m3fn) for name, value in weights(FLUX).items()}
    found = read_checkpoint(write(state, tmp_path / "cast.safetensors"), FLUX)
    assert all(torch.equal(found[name], state[name].float()) for name in state)


@pytest.mark.parametrize(("prefix", "named"), [("", ""), (CORE, ""), (CORE, CORE)])
def test_the_format_may_stand_in_the_files_metadata(
    prefix: str, named: str, tmp_path: Path
) -> None:
    parts, meant = FORMATS["int8_convrot"][0](weights(FLUX)[f"{LINEAR}.weight"])
    fields = json.loads(bytes(parts.pop("comfy_quant").tolist()))
    layers = {"format_version": "1.0", "layers": {named + LINEAR: fields}}
    state = {prefix + name: value for name, value in replaced(parts).items()}
    metadata = {"_quantization_metadata": json.dumps(layers)}
    found = read_checkpoint(write(state, tmp_path / "q.safetensors", metadata), FLUX)
    assert torch.equal(found[f"{LINEAR}.weight"], meant)


def test_four_neighbours_are_rotated_back_by_hand(tmp_path: Path) -> None:
    weight = torch.zeros(256, 256, dtype=torch.int8)
    weight[0, 4:8] = torch.tensor([5, 0, -3, 1])
    parts = {
        "weight": weight,
        "weight_scale": torch.tensor([3.0]),
        "comfy_quant": mark(format="int8_tensorwise", convrot=True, convrot_groupsize=4),
    }
    found = read_checkpoint(write(replaced(parts), tmp_path / "q.pth"), FLUX)
    turned = found[f"{LINEAR}.weight"]
    assert turned[0, 4:8].tolist() == [1.5, 13.5, 4.5, -10.5]  # (sum - 2 x mirrored) x 3 / 2
    assert torch.count_nonzero(turned) == 4


def test_quantised_weights_are_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, _ = FORMATS["scaled fp8"][0](weights(FLUX)[f"{LINEAR}.weight"])
    made: list[tuple[int, ...]] = []
    to_float = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: made.append(tuple(self.shape)) or to_float(self)
    )
    found = read_checkpoint(write(replaced(parts), tmp_path / "q.safetensors"), FLUX)
    assert made == []
    assert found[f"{LINEAR}.weight"].shape == (256, 256)
    assert made == [(256, 256), (1,)]


@pytest.mark.parametrize("format", ["scaled fp8", "cast", "mxfp8"])
def test_a_quantised_value_that_is_not_finite_is_refused(format: str, tmp_path: Path) -> None:
    parts, _ = FORMATS[format][0](weights(FLUX)[f"{LINEAR}.weight"])
    if format == "mxfp8":
        parts["weight_scale"].view(torch.uint8)[0, 0] = 255
    else:
        parts["weight"].view(torch.uint8)[7, 9] = 0x7F
    found = read_checkpoint(write(replaced(parts), tmp_path / "q.safetensors"), FLUX)
    with pytest.raises(PidInputError, match=f"NaN or infinity in {LINEAR}.weight of .*; pass"):
        found[f"{LINEAR}.weight"]


# Formats that are not


def _nvfp4() -> State:
    return {
        "weight": torch.zeros(256, 128, dtype=torch.uint8),
        "weight_scale": torch.zeros(256, 16, dtype=torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
        "comfy_quant": mark(format="nvfp4"),
    }


def _fp8(**parts: torch.Tensor) -> State:
    return {"weight": torch.zeros(256, 256, dtype=torch.float8_e4m3fn), **parts}


def _int8(rows: int = 256, **fields: Any) -> State:
    parts = {"weight": torch.zeros(256, 256, dtype=torch.int8), "weight_scale": torch.ones(rows, 1)}
    return parts | ({"comfy_quant": mark(**fields)} if fields else {})


ODD_RAW = torch.tensor(list(b"not json"), dtype=torch.uint8)
ONES = torch.ones(())
CONVROT: dict[str, Any] = {"format": "int8_tensorwise", "convrot": True}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (_nvfp4(), "(ComfyUI's nvfp4)"),
        (_int8(), "(scales beside int8)"),
        ({"weight": _int8()["weight"]}, "(int8 without a mark of its format)"),
        (_int8(2, format="int8_tensorwise"), "of int8 [256, 256] with scales [2, 1]"),
        (_int8(**CONVROT, convrot_groupsize=128), "(ComfyUI's int8_tensorwise of int8 [256, 256]"),
        (_int8(**CONVROT, convrot_groupsize="256"), "(ComfyUI's int8_tensorwise of int8"),
        (_int8(**CONVROT, convrot_groupsize=1024), "(ComfyUI's int8_tensorwise of int8"),
        (_int8(format="int8_blockwise", group_size=128), "(ComfyUI's int8_blockwise)"),
        (_int8(format="float8_e4m3fn"), "(ComfyUI's float8_e4m3fn of int8"),
        (_fp8(weight_scale=torch.ones(256, 1)), "float8_e4m3fn [256, 256] with scales [256, 1]"),
        (_fp8(comfy_quant=mark(format="float8_e4m3fn")), "(ComfyUI's float8_e4m3fn)"),
        (_fp8(weight_scale=ONES, comfy_quant=mark(format="float8_e5m2")), "float8_e5m2 of float8"),
        (_fp8(weight_scale=ONES, comfy_quant=ODD_RAW), "(ComfyUI's format without a name)"),
        (_fp8(weight_scale=ONES, comfy_quant=torch.ones(8)), "(ComfyUI's format without a name)"),
        (_fp8(weight_scale=torch.ones(256, 8), comfy_quant=mark(format="mxfp8")), "mxfp8 of"),
        (_fp8(weight_scale=ONES, pre_quant_scale=torch.ones(256)), "(ComfyUI's float8_e4m3fn)"),
        ({"weight": torch.zeros(256, 256), "scale_weight": ONES}, "(scales beside float32)"),
    ],
)  # fmt: skip
def test_other_formats_are_named_in_one_line(
    parts: State, words: str, suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(PidInputError) as caught:
        read_checkpoint(write(replaced(parts), (tmp_path / "q").with_suffix(suffix)), FLUX)
    message = str(caught.value)
    assert words in message
    assert message.startswith("expected weights of bfloat16, float16 or float32, or quantised in a")
    assert message.endswith("pass the bf16 file they were made of")
    assert "\n" not in message


def test_weights_of_other_networks_in_the_file_may_be_quantised_as_they_like(
    tmp_path: Path,
) -> None:
    state = {f"{CORE}{name}": value for name, value in weights(FLUX).items()}
    state |= {f"text_encoder.layer.{name}": value for name, value in _nvfp4().items()}
    found = read_checkpoint(write(state, tmp_path / "all.safetensors"), FLUX)
    assert list(found) == list(state_shapes(FLUX.config))


def test_scales_without_a_weight_are_extra_tensors(tmp_path: Path) -> None:
    state = weights(FLUX) | {"nothing.weight_scale": ONES, "nothing.comfy_quant": mark()}
    with pytest.raises(PidInputError, match=r"2 extra:\n +nothing\.comfy_quant"):
        read_checkpoint(write(state, tmp_path / "q.safetensors"), FLUX)
