"""Where tests lie: a module's test file lies as the module does, or a list here says where."""

from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest

from places import ROOT

MIRRORS = {
    "pid_ref": "reference",
    "runtime/pid_runtime": "runtime",
    "runtime/pid_pipelines": "pipelines",
    "runtime/pid_serve": "serve",
    "export/pid_export": "export",
    "engines/pid_engines": "engines",
    "bench/pid_bench": "bench",
    "tools": "tools",
}
"""Folders of modules, and of their tests in `tests/`."""

ELSEWHERE = {
    "reference/test_reference.py": "pid_ref: config network sampler weights",
    "reference/test_checkpoint.py": "pid_ref: tensor_files",
    "runtime/test_decoder.py": (
        "runtime/pid_runtime: interpreter request backends/choice backends/graphs backends/memory"
    ),
    "runtime/test_denoise.py": "runtime/pid_runtime: plan",
    "export/test_golden_guided.py": "pid_ref: guided_sampler",
    "runtime/test_tables.py": "runtime/pid_runtime: bundle/sizes",
    "runtime/backends/test_kernels.py": (
        "runtime/pid_runtime: backends/blending; tools: compile_kernels"
    ),
    "runtime/backends/test_tensorrt.py": "runtime/pid_runtime: backends/device backends/dlpack",
    "runtime/bundle/test_manifest.py": (
        "runtime/pid_runtime: bundle/folder bundle/json_reader bundle/manifest_check"
    ),
    "runtime/command/test_doctor_cli.py": (
        "runtime/pid_runtime: command/doctor_bundle command/doctor_checks"
    ),
    "runtime/command/test_decode_cli.py": (
        "runtime/pid_runtime: __main__ latents command/decode_jobs command/decode_options"
        " command/latent_files command/latent_options command/torch_files"
    ),
    "pipelines/test_captions.py": (
        "runtime/pid_pipelines: caption_cache caption_model caption_tokens"
    ),
    "pipelines/test_caption_cli.py": "runtime/pid_pipelines: prompts",
    "pipelines/test_generate_cli.py": "runtime/pid_pipelines: generate_jobs",
    "pipelines/test_vae_files.py": "runtime/pid_pipelines: vaes",
    "pipelines/test_upscale_cli.py": (
        "runtime/pid_pipelines: before_decoding upscale_codecs upscale_jobs"
    ),
    "serve/test_app.py": ("runtime/pid_serve: bodies cli guard listening metrics service sessions"),
    "export/test_against.py": "export/pid_export: against_cli",
    "export/test_captioner.py": (
        "runtime/pid_pipelines: captioner graph_files; export/pid_export: traced_model"
    ),
    "export/test_vae.py": "runtime/pid_pipelines: vae_graphs",
    "export/test_cli.py": "export/pid_export: bundle graphs",
    "export/test_fold.py": "export/pid_export: program",
    "export/test_fp8_export.py": "export/pid_export: calibrate_cli",
    "export/test_verify_cli.py": "export/pid_export: reference verify",
    "engines/test_build.py": ("engines/pid_engines: cli engine_set options processes tasks worker"),
    "engines/test_flavors.py": "runtime/pid_runtime: bundle/flavors",
    "bench/test_cli.py": (
        "bench/pid_bench: cases contenders counting hardware images materials measure run runner"
        " selection worker"
    ),
    "bench/test_report.py": "bench/pid_bench: compare render reported tables",
    "bench/test_cascades.py": "bench/pid_bench: diffusers_modules rrdbnet",
    "bench/test_work.py": "bench/pid_bench: pid_stages stage",
    "end_to_end/test_nano_space.py": "runtime/pid_runtime: nano/codec",
    "end_to_end/test_nano_quality.py": "tools: quality",
    "tools/test_train_nano.py": "tools: nano_crops nano_sketch",
    # On both backends every graph: the program of each golden file.
    "export/test_golden.py": (
        "runtime/pid_runtime: backends/torch; export/pid_export: contrib golden_captions"
        " golden_latents onnx_ports"
    ),
}
"""Test files, and the modules without one of their own that they test."""

UNTESTED = {
    "tools/calibrate_nano.py": "wrote pid_ref/nano/nano.calibration.json, by pid-calibrate",
    "tools/cpp_decode.py": "a race between the runtimes, run by hand",
    "tools/demo.py": "its decodes are those of end_to_end/test_nano_quality.py",
    "tools/evaluate_nano.py": "wrote bench/results/nano.json, which test_nano_quality.py reads",
    "tools/nano_photos.py": "what the training was given",
    "tools/page_screenshot.py": "took docs/serving-page.jpg",
    "tools/plot_nano_log.py": "drew docs/nano-training.svg",
    "tools/precision.py": "wrote bench/results/precision.json",
}
"""Programs that nothing but people run."""


def modules() -> set[str]:
    """Every module, by its path; an `errors` only has classes for others to raise."""
    files = [file for folder in MIRRORS for file in (ROOT / folder).rglob("*.py")]
    left_out = ("__init__.py", "errors.py")
    return {file.relative_to(ROOT).as_posix() for file in files if file.name not in left_out}


def files_of_tests() -> set[str]:
    folder = ROOT / "tests"
    return {file.relative_to(folder).as_posix() for file in folder.rglob("test_*.py")}


def mirrored(module: str) -> str:
    """Where the tests of a module lie: bench/test_cli.py for bench/pid_bench/cli.py."""
    folder = next(folder for folder in MIRRORS if module.startswith(f"{folder}/"))
    path = PurePosixPath(MIRRORS[folder], module.removeprefix(f"{folder}/"))
    return path.with_name(f"test_{path.name}").as_posix()


def elsewhere() -> list[str]:
    found: list[str] = []
    for listed in "; ".join(ELSEWHERE.values()).split("; "):
        folder, names = listed.split(": ")
        found += [f"{folder}/{name}.py" for name in names.split()]
    return found


def misplaced(modules: Iterable[str], tests: set[str], listed: Iterable[str]) -> set[str]:
    """Modules with neither a test file nor a line in the lists, or with both."""
    listed = set(listed)
    return {module for module in modules if (mirrored(module) in tests) == (module in listed)}


def test_each_module_has_its_tests_in_one_place() -> None:
    listed = [*elsewhere(), *UNTESTED]
    assert misplaced(modules(), files_of_tests(), listed) == set()
    assert set(listed) - modules() == set() and len(set(listed)) == len(listed)
    assert set(ELSEWHERE) - files_of_tests() == set()


@pytest.mark.parametrize(
    ("module", "found", "listed", "wrong"),
    [
        ("bench/pid_bench/cli.py", {"bench/test_cli.py"}, [], False),
        ("bench/pid_bench/cli.py", {"engines/test_cli.py", "bench/test_work.py"}, [], True),
        ("bench/pid_bench/cli.py", {"bench/test_cli.py"}, ["bench/pid_bench/cli.py"], True),
        ("runtime/pid_runtime/nano/codec.py", set(), ["runtime/pid_runtime/nano/codec.py"], False),
        ("runtime/pid_runtime/nano/codec.py", {"runtime/test_codec.py"}, [], True),
    ],
)
def test_a_module_without_tests_is_found(
    module: str, found: set[str], listed: list[str], wrong: bool
) -> None:
    assert misplaced([module], found, listed) == ({module} if wrong else set())
