"""Reading checkpoints: the official layout, repackagings of it, and every kind of wrong file."""

import logging
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import State, halves, small, weights
from pid_ref.checkpoint import looks_like, read_checkpoint, state_shapes
from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.registry import CHECKPOINTS, REFUSED, Checkpoint
from pid_ref.weights import RandomWeights, random_tensor

Edit = Callable[[State], None]


FLUX = small("flux", "2k")
FLUX15 = small("flux", "2kto4k")


def official(state: State, **extra: torch.Tensor) -> State:
    return {f"net.{name}": tensor for name, tensor in state.items()} | extra


def write(folder: Path, checkpoint: Checkpoint, state: Any = None) -> Path:
    """A `.pth` as the hub has it: in a folder named after the checkpoint."""
    file = folder / checkpoint.name / "model_ema_bf16.pth"
    file.parent.mkdir()
    torch.save(official(weights(checkpoint)) if state is None else state, file)
    return file


def refusal(path: Path, wanted: Checkpoint | PidConfig) -> str:
    """The first line of what reading the file complains about."""
    with pytest.raises(PidInputError) as caught:
        read_checkpoint(path, wanted)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("expected ") and ", but got " in first and "; " in first
    assert all(line.startswith("  ") for line in rest)
    return first


# Files that are right


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=lambda c: c.name)
def test_official_files_of_every_checkpoint_load_into_the_network(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wanted = small(checkpoint.space.name, checkpoint.variant)
    state = read_checkpoint(write(tmp_path, wanted), wanted)
    expected = weights(wanted)
    assert list(state) == list(expected)
    PidNet(wanted.config).load_state_dict(dict(state), strict=True)
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("prefix", ["", "net."])
def test_safetensors_with_and_without_the_prefix(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "pid_flux1_1024_to_4096_4step_fp16.safetensors"
    expected = weights(FLUX, torch.float16)
    save_file({prefix + name: tensor for name, tensor in expected.items()}, file)
    state = read_checkpoint(file, FLUX)
    assert list(state) == list(state_shapes(FLUX.config))
    assert len(state) == len(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["core.", "module.", "model.diffusion_model."])
def test_any_common_prefix_is_taken_off_with_a_note(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(FLUX)
    state = {prefix + name: tensor for name, tensor in expected.items()}
    save_file(state | {"vae.scale": torch.ones(1)}, tmp_path / "prefixed.safetensors")
    with caplog.at_level(logging.INFO, logger="pid_ref"):
        found = read_checkpoint(tmp_path / "prefixed.safetensors", FLUX)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"begin with {prefix}, which is taken off" in caplog.text
    assert "1 of vae.*" in caplog.text


def test_two_networks_in_one_file_are_told_apart_by_the_user(tmp_path: Path) -> None:
    state = weights(FLUX)
    both = {f"{prefix}.{name}": tensor for prefix in "ab" for name, tensor in state.items()}
    torch.save(both, tmp_path / "both.pth")
    assert "got 2, under a., b.; save the one to use" in refusal(tmp_path / "both.pth", FLUX)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_dict_in_a_dict_is_opened(wrapper: str, tmp_path: Path) -> None:
    torch.save({wrapper: official(weights(FLUX)), "step": 3}, tmp_path / "wrapped.pth")
    assert list(read_checkpoint(tmp_path / "wrapped.pth", FLUX)) == list(weights(FLUX))


@pytest.mark.parametrize("layer", ["", ".0"])
def test_pixel_modulations_in_two_parts_are_joined(layer: str, tmp_path: Path) -> None:
    expected = weights(FLUX)
    split = halves(expected, FLUX.config.patch_size**2, layer)
    assert len(split) > len(expected)
    save_file(split, tmp_path / "split.safetensors")
    state = read_checkpoint(tmp_path / "split.safetensors", FLUX)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)

    del split[f"pixel_blocks.0.adaLN_modulation_mlp{layer}.bias"]
    save_file(split, tmp_path / "half.safetensors")
    message = refusal(tmp_path / "half.safetensors", FLUX)
    assert "a file whose tensors differ from it" in message
    assert "download" not in message


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    save_file(weights(FLUX), tmp_path / "weights.pth")
    assert len(read_checkpoint(tmp_path / "weights.pth", FLUX)) > 0
    torch.save(weights(FLUX), tmp_path / "weights.bin")
    assert len(read_checkpoint(tmp_path / "weights.bin", FLUX)) > 0
    (tmp_path / "weights.bin").rename(tmp_path / "weights.safetensors")
    assert "under a .safetensors name" in refusal(tmp_path / "weights.safetensors", FLUX)


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    file = write(tmp_path, FLUX)
    assert list(read_checkpoint(file.parent, FLUX)) == list(read_checkpoint(str(file), FLUX))


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    assert len(read_checkpoint(write(tmp_path, FLUX), FLUX.config)) > 0


def test_leftovers_of_training_are_skipped_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = torch.zeros(1)
    leftovers = {
        "net_ema.s_embedder.proj.weight": one,
        "net_ema.other": one,
        "fake_score.a": one,
        "discriminator.a": one,
        "repa_loss.a": one,
        "optimizer.whatever": one,
        "net.lq_proj.lq_aux_rgb_head.0.weight": one,
        "iteration": 7,
    }
    file = write(tmp_path, FLUX15, official(weights(FLUX15)) | leftovers)
    with caplog.at_level(logging.INFO, logger="pid_ref"):
        state = read_checkpoint(file, FLUX15)
    assert list(state) == list(state_shapes(FLUX15.config))
    for words in ("2 of net_ema.*", "1 of optimizer.*", "1 of lq_proj.lq_aux_rgb_head.*"):
        assert words in caplog.text


def test_leftovers_are_skipped_without_the_prefix_too(tmp_path: Path) -> None:
    extra = {"fake_score.a": torch.zeros(1), "lq_proj.lq_aux_rgb_head.3.bias": torch.zeros(1)}
    save_file(weights(FLUX15) | extra, tmp_path / "repack.safetensors")
    assert len(read_checkpoint(tmp_path / "repack.safetensors", FLUX15)) > 0


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    """Peak memory of an export depends on it: the file is 2.7 GB."""
    wanted = replace(FLUX, config=replace(FLUX.config, text_dim=2**21))
    name = "y_embedder.proj.weight"
    state = weights(FLUX) | {name: torch.zeros(16, 2**21, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "big.pth")
    save_file(state, tmp_path / "big.safetensors")
    for file in (tmp_path / "big.pth", tmp_path / "big.safetensors"):
        before = resident_bytes()
        found = read_checkpoint(file, wanted)
        assert resident_bytes() - before < 32e6, file  # The tensor alone has 67 MB.
        assert found[name].shape == (16, 2**21)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# Files that are wrong


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path, FLUX)
    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(file, FLUX)


def test_missing_paths(tmp_path: Path) -> None:
    assert "no file at" in refusal(tmp_path / "nothing.pth", FLUX)
    assert "no model_ema_bf16.pth in the folder" in refusal(tmp_path, FLUX)


@pytest.mark.parametrize("left", [0.0, 0.01, 0.03, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(suffix: str, left: float, tmp_path: Path) -> None:
    file = tmp_path / f"cut.{suffix}"
    if suffix == "pth":
        torch.save(official(weights(FLUX)), file)
    else:
        save_file(weights(FLUX), file)
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data))])
    message = refusal(file, FLUX)
    words = "nothing" if left == 0 else "cut short"
    assert words in message and (left == 0 or "download it again" in message), message
    assert str(file) in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>Access denied</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "something else"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file"),
        (b"PK\x03\x04" + bytes(1000), "cut short"),
        (struct.pack("<Q", 10) + b'{"a": nope', "damaged or foreign"),
        (struct.pack("<Q", 2**20) + b"{}", "cut short"),
        (struct.pack("<Q", 2) + b"{}" + bytes(8), "damaged or foreign"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "odd.pth").write_bytes(content)
    assert words in refusal(tmp_path / "odd.pth", FLUX)


def test_only_a_file_that_ends_too_early_is_to_be_downloaded_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", weight=np.zeros(1))
    message = refusal(tmp_path / "arrays.npz", FLUX)
    assert "that PyTorch can read, but got a damaged or foreign file" in message
    assert "again" not in message
    unknown = b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}'
    (tmp_path / "new.safetensors").write_bytes(struct.pack("<Q", len(unknown)) + unknown + b"1")
    message = refusal(tmp_path / "new.safetensors", FLUX)
    assert "that safetensors can read" in message and "Q4" in message
    assert "again" not in message


def test_damage_inside_the_pickle(tmp_path: Path) -> None:
    """Whatever the damage does to the parser, it is reported as the file's fault."""
    file = tmp_path / "damaged.pth"
    torch.save(official(weights(FLUX)), file)
    data = file.read_bytes()
    start = data.index(b"data.pkl") + 64
    changed = 0
    for offset in range(start, start + 2000, 37):
        file.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            read_checkpoint(file, FLUX)
        except PidInputError:
            changed += 1
    assert changed > 10


class Harmful:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the checkpoint ran code",))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"net.a": Harmful()}, tmp_path / "harmful.pth")
    assert "could run code" in refusal(tmp_path / "harmful.pth", FLUX)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful()))
    assert "a pickle of no zip archive" in refusal(tmp_path / "plain.pth", FLUX)


def test_no_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "flat dict of tensors" in refusal(tmp_path / "list.pth", FLUX)


def drop(state: State) -> None:
    del state["s_embedder.proj.bias"], state["lq_proj.gate_modules.0.log_alpha"]


def behead(state: State) -> None:
    del state["lq_proj.latent_proj.0.weight"]


def add(state: State) -> None:
    state["patch_blocks.9.attn.qkv_x.weight"] = torch.zeros(2, 3)


def reshape(state: State) -> None:
    state["s_embedder.proj.weight"] = torch.zeros(16, 5)


def integer(state: State) -> None:
    state["pixel_embedder.proj.bias"] = torch.zeros(4, dtype=torch.int32)


def double(state: State) -> None:
    state["pixel_embedder.proj.bias"] = torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("edit", "listing"),
    [
        (
            drop,
            [
                "  2 missing:",
                "    lq_proj.gate_modules.0.log_alpha []",
                "    s_embedder.proj.bias [16]",
            ],
        ),
        (behead, ["  1 missing:", "    lq_proj.latent_proj.0.weight [8, 16, 3, 3]"]),
        (add, ["  1 extra:", "    patch_blocks.9.attn.qkv_x.weight [2, 3]"]),
        (reshape, ["  1 misshapen:", "    s_embedder.proj.weight [16, 5], expected [16, 768]"]),
        (integer, ["  1 not bfloat16, float16 or float32:", "    pixel_embedder.proj.bias"]),
        (double, ["  1 not bfloat16, float16 or float32:", "    pixel_embedder.proj.bias"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_listed(
    edit: Edit, listing: list[str], suffix: str, tmp_path: Path
) -> None:
    state = weights(FLUX)
    edit(state)
    file = tmp_path / f"edited.{suffix}"
    torch.save(official(state), file) if suffix == "pth" else save_file(state, file)
    with pytest.raises(PidInputError) as caught:
        read_checkpoint(file, FLUX)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("expected flux 2k (v1), but got a file whose tensors differ")
    assert len(lines) == 1 + len(listing)
    for line, wanted in zip(lines[1:], listing, strict=True):
        assert line.startswith(wanted)


def test_something_that_is_no_tensor_under_a_tensors_name(tmp_path: Path) -> None:
    state = official(weights(FLUX)) | {"net.s_embedder.proj.bias": 3}
    torch.save(state, tmp_path / "mixed.pth")
    with pytest.raises(PidInputError, match=r"s_embedder\.proj\.bias int"):
        read_checkpoint(tmp_path / "mixed.pth", FLUX)


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    torch.save({"net.one": torch.zeros(1)}, tmp_path / "one.pth")
    with pytest.raises(PidInputError) as caught:
        read_checkpoint(tmp_path / "one.pth", FLUX)
    lines = str(caught.value).splitlines()
    count = len(state_shapes(FLUX.config))
    assert f"  {count} missing:" in lines
    assert f"    and {count - 10} more" in lines
    assert len(lines) == 1 + 12 + 2


@pytest.mark.parametrize(
    ("asked", "given", "seen"),
    [
        ("flux 2k", "flux2 2k", "looks like flux2 v1"),
        ("flux 2k", "sdxl 2kto4k", "looks like sdxl v1"),
        ("dinov2 2k", "siglip 2k", "looks like siglip v1"),
        ("flux 2kto4k", "flux 2kto4k-v1", "looks like flux, sd3 or qwenimage v1"),
        ("sd3 2k", "flux 2kto4k", "looks like flux or qwenimage v1.5"),
        ("flux2 2kto4k", "flux2 2k", "looks like flux2 v1"),
        ("flux2 2k", "flux2 2kto4k", "looks like flux2 v1.5"),
    ],
)
def test_a_file_of_another_space_or_version_is_recognised(
    asked: str, given: str, seen: str, tmp_path: Path
) -> None:
    wanted, other = (small(*name.split()) for name in (asked, given))
    file = tmp_path / "unnamed.pth"
    torch.save(official(weights(other)), file)
    message = refusal(file, wanted)
    assert message.startswith(f"expected {wanted.label}, but got what {seen} ")
    assert "ask for that space and version" in message


def test_spaces_of_equal_shapes_are_taken_as_asked_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(official(weights(FLUX)), tmp_path / "unnamed.pth")
    with caplog.at_level(logging.INFO, logger="pid_ref"):
        read_checkpoint(tmp_path / "unnamed.pth", small("sd3", "2k"))
    assert "fit flux, sd3 or qwenimage v1" in caplog.text
    assert "taken as sd3 2k (v1)" in caplog.text


def test_a_folders_name_tells_what_shapes_do_not(tmp_path: Path) -> None:
    file = write(tmp_path, FLUX)
    message = refusal(file, small("sd3", "2k"))
    assert "expected sd3 2k (v1), but got flux 2k (v1) by its name" in message
    assert "flux 2k (v1) by its name" in refusal(file.parent, small("flux", "2kto4k-v1"))


def test_a_repackagings_name_tells_the_space(tmp_path: Path) -> None:
    file = tmp_path / "pid_sd3_512_to_2048_4step_bf16.safetensors"
    save_file(weights(FLUX), file)
    message = refusal(file, FLUX)
    assert "expected flux 2k (v1), but got a file for sd3 by its name pid_sd3_512" in message
    assert "--force-space" in message
    assert len(read_checkpoint(file, FLUX, force_space=True)) > 0
    assert len(read_checkpoint(file, small("sd3", "2k"))) > 0


def test_a_value_that_is_not_finite_is_refused_when_read(tmp_path: Path) -> None:
    state = weights(FLUX)
    bad = "patch_blocks.1.attn.proj_x.weight"
    state[bad][0, 1] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    found = read_checkpoint(tmp_path / "nan.safetensors", FLUX)
    with pytest.raises(PidInputError, match=f"NaN or infinity in {bad} of .*nan.safetensors; "):
        dict(found)


def test_an_undistilled_repackaging_is_not_taken_for_the_student(tmp_path: Path) -> None:
    file = tmp_path / "pid_1.5_flux1_Undistilled_bf16.safetensors"
    save_file(weights(FLUX15), file)
    assert "undistilled" in refusal(file, FLUX15)
    assert len(read_checkpoint(file, small("flux", "2kto4k-undistilled"))) > 0


def test_refused_checkpoints_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = small("flux2", "2kto4k-v1")
    (name,) = REFUSED
    file = write(tmp_path, replace(wanted, name=name))
    for asked in (wanted, wanted.config):
        message = refusal(file, asked)
        assert "colours drift" in message and "_2606" in message
    monkeypatch.chdir(file.parent)
    assert "colours drift" in refusal(Path("model_ema_bf16.pth"), wanted)


# What the helpers say


def test_looks_like_names_every_released_network() -> None:
    seen = {looks_like(state_shapes(each.config)) for each in CHECKPOINTS.values()}
    assert seen == {
        "flux, sd3 or qwenimage v1",
        "flux2 v1",
        "sdxl v1",
        "dinov2 v1",
        "siglip v1",
        "flux or qwenimage v1.5",
        "flux2 v1.5",
        "nano v1.5",
    }


def test_looks_like_says_what_is_unusual() -> None:
    assert looks_like({}) == "no PiD decoder"
    odd = PidConfig(latent_channels=24)
    assert looks_like(state_shapes(odd)) == "a 24-channel v1 of no released kind"
    words = looks_like(state_shapes(FLUX.config))
    assert words == "flux, sd3 or qwenimage v1 of latent hidden size 8"


def test_state_shapes_are_not_shared() -> None:
    state_shapes(FLUX.config).clear()
    assert state_shapes(FLUX.config)


# Random weights


@pytest.mark.parametrize(
    ("name", "shape", "mean", "spread"),
    [
        ("lq_proj.gate_modules.0.log_alpha", (), math.log(5.0), 0.1),
        ("final_layer.norm.weight", (64,), 1.0, 0.1),
        ("final_layer.linear.bias", (64,), 0.0, 0.1),
        ("y_pos_embedding", (1, 8, 16), 0.0, 0.5),
        ("s_embedder.proj.weight", (8, 25), 0.0, 0.2),
        ("lq_proj.latent_proj.0.weight", (4, 4, 5, 5), 0.0, 0.1),
    ],
)
def test_random_weights_follow_the_golden_rule(
    name: str, shape: tuple[int, ...], mean: float, spread: float
) -> None:
    seed = 2**32 - 5
    generator = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    expected = mean + spread * generator.standard_normal(shape)
    value = random_tensor(name, shape, seed)
    assert value.dtype == np.float32 and value.shape == shape
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    state = RandomWeights({name: shape}, seed)
    assert torch.equal(state[name], torch.from_numpy(value))


def test_random_weights_are_a_mapping_of_the_shapes() -> None:
    shapes = state_shapes(FLUX.config)
    state = RandomWeights(shapes, seed=0)
    assert list(state) == list(shapes) and len(state) == len(shapes)
    with pytest.raises(KeyError):
        state["nothing"]
    other = RandomWeights(shapes, seed=1)
    name = "s_embedder.proj.weight"
    assert not torch.equal(state[name], other[name])
