"""What a network is calibrated on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pid_export.calibration_inputs import SIGMAS, read_inputs, synthetic_inputs
from pid_export.errors import ExportInputError
from pid_ref.registry import NANO, NANO_STD
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import PACKED_DCT, Codec, FlowShift
from pid_runtime.command.decode_jobs import Settings, request_of
from pid_runtime.errors import PidRuntimeError
from pid_runtime.request import check_request


def test_latents_of_a_folder_and_their_captions(golden_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(golden_bundle)
    rng = np.random.default_rng(0)
    latents, captions = tmp_path / "latents", tmp_path / "captions"
    for folder in (latents, captions):
        folder.mkdir()
    kept = rng.standard_normal((2, 16, 2, 3), np.float32)
    text = rng.standard_normal((1, 12, 32), np.float32)
    save_file(
        {"latent": kept, "sigma": np.array([0.1, 0.2], np.float32)}, latents / "a.safetensors"
    )
    save_file({"caption": text}, captions / "a.safetensors")
    inputs, described = read_inputs(manifest, latents, captions)
    assert described == "2 latents"
    assert [float(each.sigma[0]) for each in inputs] == [np.float32(0.1), np.float32(0.2)]
    assert np.array_equal(np.concatenate([each.latent for each in inputs]), kept)
    assert all(each.caption is not None and np.array_equal(each.caption, text) for each in inputs)


def test_a_bundle_with_guidance_gets_a_negative_caption(
    free_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(free_bundle)
    sampler = replace(
        manifest.sampler, steps=25, rule="dpm++2m", guidance=5.0, flow_shift=FlowShift(6.0, 2048)
    )
    manifest = replace(manifest, sampler=sampler)
    for each in synthetic_inputs(manifest):
        assert each.negative is not None and each.caption is not None
        assert each.negative.shape == each.caption.shape
        assert not np.array_equal(each.negative, each.caption)
    rng = np.random.default_rng(0)
    latent, caption, negative = (
        rng.standard_normal(shape, np.float32) for shape in ((16, 2, 3), (7, 32), (1, 7, 32))
    )
    save_file({"latent": latent, "caption": caption}, tmp_path / "a.safetensors")
    ((zeros,), _) = read_inputs(manifest, tmp_path)
    assert "zeros stand for the negative caption" in caplog.text
    assert zeros.negative is not None and zeros.negative.shape == (1, 7, 32)
    assert not zeros.negative.any()
    caplog.clear()
    ((given,), _) = read_inputs(manifest, tmp_path, None, negative)
    np.testing.assert_array_equal(given.negative, negative)
    assert not caplog.text
    request = request_of(manifest, given, Settings(), 0)
    assert [branch.weight for branch in request.branches] == [-4, 5]
    with pytest.raises(PidRuntimeError, match="a negative of as many tokens as the caption, 7"):
        read_inputs(manifest, tmp_path, None, negative[:, :6])


def test_what_does_not_fit_is_refused(golden_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(golden_bundle)
    with pytest.raises(ExportInputError, match="is not there"):
        read_inputs(manifest, tmp_path / "none")
    with pytest.raises(PidRuntimeError, match="but got none in"):
        read_inputs(manifest, tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 2, 2), np.float32))
    with pytest.raises(PidRuntimeError, match="16"):
        read_inputs(manifest, tmp_path)


def test_photographs_of_a_space_with_a_codec(golden_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(golden_bundle)
    model = {**manifest.model, "scale": NANO.space.scale}
    manifest = replace(manifest, model=model, codec=Codec(PACKED_DCT, NANO_STD))
    Image.new("RGB", (50, 30), "teal").save(tmp_path / "a.png")
    inputs, described = read_inputs(manifest, tmp_path)
    assert described == "1 photograph"
    assert [float(each.sigma[0]) for each in inputs] == [np.float32(each) for each in SIGMAS]
    assert inputs[0].latent.shape == (1, 192, 4, 7)


def test_made_up_latents_fit_the_smallest_bundle(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle)
    for each in synthetic_inputs(manifest):
        check_request(manifest, each.latent, each.caption, sigma=each.sigma)
