"""The model of Triton's Python backend, without Triton: requests of several shapes at once."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pid_runtime.decoder import Decoder
from pid_serve.triton_model import TritonPythonModel

LATENT = np.linspace(-1, 1, 16 * 2 * 3, dtype=np.float32).reshape(1, 16, 2, 3)


class FakeTensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class FakeResponse:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.images = [tensor.as_numpy() for tensor in output_tensors]
        self.error = error


class FakeError(Exception):
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"


class FakeLogger:
    @staticmethod
    def log_error(text: str) -> None:
        assert "division" in text


class FakeRequest:
    def __init__(self, latent: Any = LATENT, cancelled: bool = False, **others: Any) -> None:
        self._inputs = {"latent": latent, **others}
        self._cancelled = cancelled

    def inputs(self) -> list[FakeTensor]:
        return [FakeTensor(*each) for each in self._inputs.items()]

    def is_cancelled(self) -> bool:
        return self._cancelled


@pytest.fixture
def open_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], TritonPythonModel]]:
    models: list[TritonPythonModel] = []

    def open_it(bundle: Path) -> TritonPythonModel:
        models.append(opened(bundle, tmp_path, monkeypatch))
        return models[-1]

    yield open_it
    for each in models:
        each.finalize()


@pytest.fixture
def model(
    golden_bundle: Path, open_model: Callable[[Path], TritonPythonModel]
) -> TritonPythonModel:
    return open_model(golden_bundle)


def opened(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    """The model of a repository with this bundle."""
    shutil.copytree(bundle, tmp_path / "1" / "bundle")
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceResponse = FakeTensor, FakeResponse
    fake.TritonError, fake.Logger = FakeError, FakeLogger
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    model = TritonPythonModel()
    parameters = {"backend": {"string_value": "onnxruntime"}, "threads": {"string_value": "1"}}
    model.initialize(
        {
            "model_config": json.dumps({"parameters": parameters}),
            "model_instance_kind": "CPU",
            "model_repository": str(tmp_path),
            "model_version": "1",
        }
    )
    return model


def test_requests_of_several_shapes(model: TritonPythonModel, golden_bundle: Path) -> None:
    seeds = np.array([[5], [9]], np.uint64)
    other = LATENT[..., :2]
    found = model.execute(
        [
            FakeRequest(np.concatenate([LATENT, -LATENT]), seed=seeds),
            FakeRequest(other, sigma=np.array([[0.5]], np.float32)),
            FakeRequest(),
            FakeRequest(steps=np.array([[2]], np.int32)),
        ]
    )
    with Decoder.open(golden_bundle) as pid:
        wanted = [
            pid.decode(np.concatenate([LATENT, -LATENT]), seed=[5, 9], output="uint8"),
            pid.decode(other, sigma=0.5, output="uint8"),
            pid.decode(LATENT, output="uint8"),
            pid.decode(LATENT, steps=2, output="uint8"),
        ]
    for response, images in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(response.images[0], images)


def test_requests_with_guidance(
    open_model: Callable[[Path], TritonPythonModel], undistilled: Path
) -> None:
    caption, negative = np.random.default_rng(1).standard_normal((2, 1, 12, 32), np.float32)
    both = {"caption": caption, "negative": negative}
    five, three = np.array([[5]], np.float32), np.array([[3]], np.float32)
    found = open_model(undistilled).execute(
        [
            FakeRequest(**both),
            FakeRequest(**both, guidance=three),
            FakeRequest(-LATENT, **both, guidance=five),
            FakeRequest(-LATENT, caption=caption),
        ]
    )
    with Decoder.open(undistilled) as pid:
        wanted = [
            pid.decode(LATENT, **both, output="uint8"),
            pid.decode(LATENT, **both, guidance=3, output="uint8"),
            pid.decode(-LATENT, **both, output="uint8"),
        ]
    for response, images in zip(found, wanted, strict=False):
        np.testing.assert_array_equal(response.images[0], images)
    message, kind = found[3].error.args
    assert "a negative caption for guidance 5" in message and kind == FakeError.INVALID_ARG


def test_one_at_fault_does_not_fail_the_others(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = model.execute([FakeRequest(), FakeRequest(LATENT * np.nan), FakeRequest()])
    assert [len(each.images) for each in found] == [1, 0, 1]
    message, kind = found[1].error.args
    assert "finite latent" in message and kind == FakeError.INVALID_ARG

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division")

    monkeypatch.setattr(Decoder, "decode", fail)
    (response,) = model.execute([FakeRequest()])
    assert response.error.args == ("the decode failed", FakeError.INTERNAL)


def test_a_batch_that_nobody_waits_for_ends(model: TritonPythonModel) -> None:
    gone, here = FakeRequest(cancelled=True), FakeRequest()
    assert model.execute([gone])[0].error.args[1] == FakeError.CANCELLED
    assert [len(each.images) for each in model.execute([gone, here])] == [1, 1]
