"""bf16 and fp16 programs against float32, and what stays float32 in them.

The measure is the reference run as the public code runs it, float32 weights under bf16 autocast:
a bundle's images may not be further from float32 than its images are, by more than a tenth.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from pid_export.golden import Golden, decode_golden, export_golden, read_golden
from pid_export.verify import load_network
from pid_ref.network import unpatchify
from pid_ref.sampler import sample
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Decoder
from places import GOLDEN

SHARED = "flux_2k"
"""The network of `bf16_bundle`."""

FILES = (
    SHARED,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("flux_v1pt5", "flux_2k_real_heads", "flux2_2k")
    ),
)
ALLOWANCE = 1.1

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
SENSITIVE = ("ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Pow", "Cos", "Sin")
"""What norms, tables and embeddings of time are made of."""


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(GOLDEN / f"{request.param}.safetensors")


@pytest.fixture(scope="module")
def autocast_error(golden: Golden) -> float:
    """Error of the reference under bf16 autocast."""
    inputs = golden.inputs
    noise = [torch.from_numpy(each) for each in inputs.noise]
    latent, caption, sigma = (
        torch.from_numpy(each) for each in (inputs.latent, inputs.caption, inputs.sigma)
    )
    with torch.autocast("cpu", torch.bfloat16):
        net = load_network(golden.config, golden.weights)
        image = sample(net, latent, caption, sigma, noise[0], noise[1:], steps=len(golden.states))
    return rms(image.numpy() - golden.states[-1])


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def bundle(
    golden: Golden, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if (golden.path.stem, request.param) == (SHARED, "bf16"):
        return request.getfixturevalue("bf16_bundle")
    return export(golden, request.param, tmp_path_factory.mktemp("precision"))


def test_no_worse_than_autocast(golden: Golden, autocast_error: float, bundle: Path) -> None:
    is_bf16 = read_manifest(bundle, verify=False).precision == "bf16"
    # three bits more in float16
    most = ALLOWANCE * autocast_error if is_bf16 else autocast_error / 4
    for backend in ("torch",) if is_bf16 else ("torch", "onnxruntime"):
        with Decoder.open(bundle, backend) as decoder:
            assert 0 < rms(decode(decoder, golden) - golden.states[-1]) <= most, backend


def test_the_measure_can_fail(golden: Golden, autocast_error: float, bundle: Path) -> None:
    """A state kept in eight bits is found out."""
    with Decoder.open(bundle, "torch") as decoder:
        graphs: Any = decoder.graphs
        stage = graphs._stages["update"]
        stage.register_forward_hook(
            lambda module, inputs, state: state.to(torch.float8_e4m3fn).float()
        )
        rounded = rms(decode(decoder, golden) - golden.states[-1])
    assert rounded > ALLOWANCE * autocast_error


def test_what_stays_float32(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    exact = {"state", "next_state", "noise", "noise_image", "step_noise_image", "image"}
    for name, buffer in manifest.buffers.items():
        if name in exact or buffer.kind in ("input", "schedule", "table", "constant"):
            assert buffer.dtype == "float32", name
    found: set[str] = set()
    for graph in manifest.graphs.values():
        found |= sensitive_halves(bundle / graph.file)
    assert found == set()


def test_halves_are_found(tmp_path: Path) -> None:
    half = onnx.TensorProto.BFLOAT16
    values = [onnx.helper.make_tensor_value_info(name, half, ["B", 4]) for name in "xy"]
    node = onnx.helper.make_node("ReduceMean", ["x"], ["y"], name="mean")
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", values[:1], values[1:]),
            opset_imports=[onnx.helper.make_opsetid("", 22)],
        ),
        tmp_path / "g.onnx",
    )
    assert sensitive_halves(tmp_path / "g.onnx") == {"g.onnx: ReduceMean of x"}


def sensitive_halves(path: Path) -> set[str]:
    """Operators that need float32 and are given less."""
    model = onnx.shape_inference.infer_shapes(
        onnx.load(path, load_external_data=False), strict_mode=False
    )
    graph = model.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return {
        f"{path.name}: {node.op_type} of {name}"
        for node in graph.node
        if node.op_type in SENSITIVE
        for name in node.input
        if types.get(name) in HALVES
    }


def export(golden: Golden, precision: str, folder: Path) -> Path:
    bundle = folder / precision
    manifest = export_golden(golden, bundle, precision=precision)
    assert manifest.precision == precision
    return bundle


def decode(decoder: Decoder, golden: Golden) -> NDArray[np.float32]:
    """The state after the last step, `[B, 3, H, W]`, not clamped."""
    decode_golden(golden, decoder)
    tokens = torch.from_numpy(decoder.state())
    height, width = golden.velocity.shape[-2:]
    return unpatchify(tokens, height, width, golden.config.patch_size).numpy()


def rms(difference: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
