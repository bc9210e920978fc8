"""The C++ runtime's own tests (runtime/cpp/tests), and the fuzz targets of its readers."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cpp_build import executable, run, tool
from cpp_data import manifest_tests
from pid_runtime.bundle.manifest import MANIFEST_FILE


def ctest(folder: Path, data: Path, environment: Mapping[str, str] | None = None) -> None:
    command = (tool("ctest"), "--test-dir", folder, "--output-on-failure", "--no-tests=error")
    output = run(*command, environment={"PID_TEST_DATA": str(data), **(environment or {})})
    assert "100% tests passed" in output and "Skipped" not in output, output


def test_unit_and_api_tests(built: Path, data: Path) -> None:
    ctest(built, data)


@pytest.mark.slow
def test_as_it_is_shipped(shipped: Path, data: Path) -> None:
    ctest(shipped, data)


@pytest.mark.slow
def test_with_address_and_undefined_behavior_sanitizers(sanitized: Path, data: Path) -> None:
    # What is slow without optimisation, the fuzz targets do as well.
    slow = "-Manifests.Mutated*:Noise.IsStandardNormal"
    asan = "allocator_may_return_null=1:detect_leaks=1"
    ctest(sanitized, data, {"ASAN_OPTIONS": asan, "GTEST_FILTER": slow})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["manifest", "safetensors"])
def test_fuzz(sanitized: Path, data: Path, tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if target == "manifest":
        small = json.dumps(manifest_tests().TREES[False])
        (corpus / "small").write_text(small)
        (corpus / "bundle").write_bytes((data / "v1" / MANIFEST_FILE).read_bytes())
    else:
        save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.uint8)}, corpus / "two")
        save_file({"latent": np.zeros((1, 2, 1, 1), np.float16)}, corpus / "latent")
    limits = ("-max_total_time=5", "-runs=20000", "-max_len=200000", "-seed=1")
    # Not the peak of resident memory: a process begins with that of the one that forked it.
    memory = ("-rss_limit_mb=0", "-malloc_limit_mb=1024")
    output = run(executable(sanitized, f"fuzz_{target}"), corpus, *limits, *memory)
    assert re.search(r"Done \d+ (runs|in)", output), output
