"""What a decoder on the TensorRT backend is made of, for tests that look inside."""

from pid_runtime.backends.device import CudaDevice
from pid_runtime.backends.tensorrt import TensorRtGraphs
from pid_runtime.decoder import Decoder


def graphs_of(decoder: Decoder) -> TensorRtGraphs:
    graphs = decoder.graphs
    assert isinstance(graphs, TensorRtGraphs)
    return graphs


def device_of(decoder: Decoder) -> CudaDevice:
    device = decoder.memory
    assert isinstance(device, CudaDevice)
    return device
