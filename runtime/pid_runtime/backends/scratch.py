"""The memory that ONNX Runtime's sessions work in on the CPU: one arena for all of a process.

Without it each of thirty sessions would keep an arena of its own. ONNX Runtime keeps what the
arena once had, so whoever stops decoding gives back what no run uses.
"""

import functools

import numpy as np
import onnxruntime as ort

from pid_runtime.backends.memory import trim_heap

_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX model that copies one number, x to y: an arena shrinks at the end of a run only."""


def use_shared_arena(options: ort.SessionOptions) -> None:
    """Let sessions with these options work in the arena."""
    _register()
    options.add_session_config_entry("session.use_env_allocators", "1")


def give_back() -> None:
    """Return to the system what no run of any session uses now."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _copying_session().run(None, {"x": np.zeros(1, np.float32)}, options)
    trim_heap()


@functools.cache
def _register() -> None:
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


@functools.cache
def _copying_session() -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    use_shared_arena(options)
    return ort.InferenceSession(_IDENTITY, options, ["CPUExecutionProvider"])
