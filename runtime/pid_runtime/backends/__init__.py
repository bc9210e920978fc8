"""What runs graphs and holds memory: ONNX Runtime, PyTorch and TensorRT."""
