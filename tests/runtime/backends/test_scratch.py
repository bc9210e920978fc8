"""What ONNX Runtime works in goes back to the system when a decoder is closed."""

import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from pid_runtime.backends import scratch

SCRIPT = """
import sys
import numpy as np
from pid_runtime import Bundle

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def decode(decoder):
    decoder.decode(np.zeros((2, 16, 16, 16), np.float32), steps=1)

with Bundle.open(sys.argv[1], threads=1) as bundle:
    with bundle.decoder() as decoder:
        decode(decoder)
        before_close = resident()
    closed = resident()
    with bundle.decoder() as decoder:
        decode(decoder)
        again = resident()
print(before_close, closed, again, resident())
"""


def test_the_model_is_what_onnx_would_write() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == scratch._IDENTITY


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_goes_back(golden_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, golden_bundle], capture_output=True, text=True, check=True
    )
    decoding, closed, again, end = map(float, done.stdout.split())
    assert decoding - closed > 80, done.stdout
    assert again - end > 80, done.stdout
