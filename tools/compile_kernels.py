"""Compiles the kernels for GPUs to PTX, which drivers translate for the GPU they find.

    python tools/compile_kernels.py            # writes runtime/pid_runtime/backends/kernels.ptx
    python tools/compile_kernels.py --check    # says whether that is what the source gives

By an old NVRTC, which it fetches, so that drivers as old as CUDA 12.1's read it, and for the oldest
architecture that is still supported.
"""

import argparse
import ctypes
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILER = "nvidia-cuda-nvrtc-cu12==12.1.105"
ARCHITECTURE = "compute_75"
SOURCE = Path(__file__).resolve().parents[1] / "runtime/pid_runtime/backends/kernels.cu"
PTX = SOURCE.with_suffix(".ptx")


def main() -> int:
    """Compile, and write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    compiled = heading(SOURCE) + compile_ptx(SOURCE.read_bytes())
    if not check:
        PTX.write_text(compiled)
        return 0
    is_same = PTX.read_text() == compiled
    sys.stdout.write(f"{PTX} {'is' if is_same else 'is not'} what {SOURCE.name} gives\n")
    return 0 if is_same else 1


def heading(source: Path) -> str:
    """The first line of what is written: by it a test knows that the source has not changed."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return f"// {source.name} {digest}, by tools/compile_kernels.py\n"


def compile_ptx(source: bytes) -> str:
    """PTX of a CUDA source. Raises `RuntimeError` with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, COMPILER], check=True)
        (library,) = Path(folder).glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
        nvrtc = ctypes.CDLL(str(library))
        program = ctypes.c_void_p()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None)
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={ARCHITECTURE}".encode())
        if nvrtc.nvrtcCompileProgram(program, 1, options):
            raise RuntimeError(_text(nvrtc, program, "ProgramLog"))
        lines = _text(nvrtc, program, "PTX").splitlines(keepends=True)
        return "".join(line for line in lines if line.strip() and not _is_constant(line))


def _is_constant(line: str) -> bool:
    """Whether a line is one of the names of architectures that NVRTC defines unasked."""
    return line.startswith(".global ") and "2nv6target6detail" in line


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


if __name__ == "__main__":
    sys.exit(main())
