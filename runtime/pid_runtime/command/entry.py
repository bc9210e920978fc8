"""Where every command begins, so that one interrupted while its modules load says so in a line."""

import importlib
import sys

INTERRUPTED = 130
"""Exit code, as shells have it for Ctrl-C."""


def pid_bench() -> int:
    """`pid-bench`."""
    return _run("pid-bench", "pid_bench.cli")


def pid_build() -> int:
    """`pid-build`."""
    return _run("pid-build", "pid_engines.cli")


def pid_calibrate() -> int:
    """`pid-calibrate`."""
    return _run("pid-calibrate", "pid_export.calibrate_cli")


def pid_caption() -> int:
    """`pid-caption`."""
    return _run("pid-caption", "pid_pipelines.caption_cli")


def pid_decode() -> int:
    """`pid-decode`."""
    return _run("pid-decode", "pid_runtime.command.decode_cli")


def pid_doctor() -> int:
    """`pid-doctor`."""
    return _run("pid-doctor", "pid_runtime.command.doctor_cli")


def pid_export() -> int:
    """`pid-export`."""
    return _run("pid-export", "pid_export.cli")


def pid_generate() -> int:
    """`pid-generate`."""
    return _run("pid-generate", "pid_pipelines.generate_cli")


def pid_serve() -> int:
    """`pid-serve`."""
    return _run("pid-serve", "pid_serve.cli")


def pid_triton() -> int:
    """`pid-triton`."""
    return _run("pid-triton", "pid_serve.triton_cli")


def pid_upscale() -> int:
    """`pid-upscale`."""
    return _run("pid-upscale", "pid_pipelines.upscale_cli")


def pid_verify() -> int:
    """`pid-verify`."""
    return _run("pid-verify", "pid_export.verify_cli")


def _run(name: str, module: str) -> int:
    try:
        return importlib.import_module(module).main()
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return INTERRUPTED
