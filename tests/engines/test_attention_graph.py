"""The attention that engines are built from."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from pid_engines.attention_graph import attention_graph
from pid_runtime.bundle.folder import read_manifest


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
