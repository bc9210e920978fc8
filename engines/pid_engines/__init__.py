"""Builds TensorRT engines from a bundle."""
