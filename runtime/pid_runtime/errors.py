"""What the runtime raises when its input, not its code, is at fault."""

import re

_SHORTAGES = (
    "out of memory",
    "out_of_memory",
    "allocate memory",  # torch, ONNX Runtime and the system: can't, cannot, failed to
    "bad_alloc",
    "bad allocation",
)
"""What libraries say when memory runs out, in lower case."""


class InputError(ValueError):
    """What the user gave is at fault; every package has a class of its own below this one.

    The message is one line: what was expected, what came, and how to fix it. Commands print it and
    exit with 2.
    """


class PidRuntimeError(InputError):
    """Bad input to the runtime: a broken bundle, a latent of the wrong shape, no such provider."""


class NotFiniteError(PidRuntimeError):
    """A decode gave NaN or infinity."""


class OutOfMemoryError(PidRuntimeError):
    """The host or the device has too little memory for what was asked."""


def memory_shortage(error: BaseException) -> str | None:
    """What came instead of enough memory, "too little (..)"; None for any other error."""
    text = " ".join(str(error).split())
    known = isinstance(error, MemoryError | OutOfMemoryError)
    if not known and not any(words in text.lower() for words in _SHORTAGES):
        return None
    wanted = re.search(r"requested buffer of size (\d+)", text)
    if wanted is not None:
        text = f"ONNX Runtime wanted {int(wanted[1]) / 1e9:.2f} GB more"
    elif "onnxruntime" in text.lower():  # lines of C++
        text = "ONNX Runtime ran out of it"
    return f"too little ({text[:200]})" if text else "too little"
