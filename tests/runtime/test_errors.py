"""Memory that runs out is told from other errors, in the words of every library."""

import pytest

from pid_runtime.errors import NotFiniteError, OutOfMemoryError, memory_shortage

ONNX_RUNTIME = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. Name:'a' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:359 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to "
    "allocate memory for requested buffer of size 134217728\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "too little"),
        (MemoryError("Unable to allocate 2 GiB"), "too little (Unable to allocate 2 GiB)"),
        (RuntimeError(ONNX_RUNTIME), "too little (ONNX Runtime wanted 0.13 GB more)"),
        (
            RuntimeError(
                "[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc"
            ),
            "too little (ONNX Runtime ran out of it)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n you tried"),
            "too little ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried)",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "too little (CUDA out of memory. Tried to allocate 2.00 GiB.)",
        ),
        (OutOfMemoryError("expected 2 GB"), "too little (expected 2 GB)"),
    ],
)
def test_shortages(error: Exception, said: str) -> None:
    assert memory_shortage(error) == said


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel"), NotFiniteError("NaN"), ValueError(), KeyError("memory")]
)
def test_other_errors(error: Exception) -> None:
    assert memory_shortage(error) is None
