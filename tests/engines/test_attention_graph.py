"""The attention that engines are built from."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from pid_engines.attention_graph import attention_graph
from pid_runtime.bundle.folder import read_manifest


def test_attention_of_8_bit_numbers_is_that_of_the_bundle(fp8_twin: Path) -> None:
    """But for when its weights are divided by their sum, which is before they are rounded.

    So the numbers differ by what rounding weights costs, and their size says that the scales agree.
    """
    graph = read_manifest(fp8_twin).graphs["attention"]
    rng = np.random.default_rng(0)
    width, scales = int(graph.inputs["q"].shape[-1]), graph.options["fp8_scales"]
    values = {
        name: (rng.standard_normal((1, rows, width), np.float32) * size).astype(
            ml_dtypes.float8_e4m3fn
        )
        for name, rows, size in (("q", 7, 90), ("k", 19, 90), ("v", 19, 90))
    }
    feed = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            value.view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN
        )
        for name, value in values.items()
    }
    rounded = onnx.load_from_string(attention_graph(graph))
    for constant in rounded.graph.initializer:  # bfloat16, which the CPU does not multiply
        if constant.name.endswith("_scale"):
            array = np.array(scales[constant.name.removesuffix("_scale")], np.float32)
            constant.CopyFrom(numpy_helper.from_array(array, constant.name))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    found = [
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        .run_with_ort_values(None, feed)[0]
        .numpy()
        .view(ml_dtypes.float8_e4m3fn)
        .astype(np.float32)
        for source in (str(fp8_twin / graph.file), rounded.SerializeToString())
    ]
    want, got = found
    assert want.shape == got.shape == (1, 7, width)
    assert np.abs(want - got).max() <= 0.1 * np.abs(want).max()
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.999


def test_attention_is_that_of_the_bundle(golden_bundle: Path) -> None:
    """The graph that engines are built from computes the same as the one it stands for."""
    graph = read_manifest(golden_bundle).graphs["attention"]
    rng = np.random.default_rng(0)
    width = int(graph.inputs["q"].shape[-1])
    feed = {
        name: rng.standard_normal((1, rows, width), np.float32)
        for name, rows in (("q", 7), ("k", 19), ("v", 19))
    }
    want, got = (
        np.asarray(
            ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        )
        for source in (golden_bundle / graph.file, attention_graph(graph))
    )
    assert want.shape == got.shape and np.abs(want - got).max() <= 1e-5
