"""`pid-doctor` on machines that are none: with and without packages, drivers and GPUs."""

import functools
import importlib.metadata
import json
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fakes.engines import VERSION, add_engines
from fakes.gpu import FakeRtxEngine, Gpu, fake_cuda, fake_tensorrt, install
from pid_runtime import __version__
from pid_runtime.backends import onnxruntime as backend_onnxruntime
from pid_runtime.command import doctor_bundle, doctor_checks
from pid_runtime.command.doctor_cli import main
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import standard_normal

EditBundle = Callable[..., Path]
RunCommand = Callable[..., tuple[int, str, str]]
Report = dict[str, Any]


@pytest.fixture
def report(run_command: RunCommand) -> Callable[..., Report]:
    """A function that runs the command: its JSON, with findings by name and the exit code."""

    def examine(*arguments: object) -> Report:
        code, out, err = run_command(main, *arguments, "--json", "--quiet")
        assert err == ""
        result = json.loads(out)
        assert result["works"] == (code == 0)
        result["code"] = code
        result["by_name"] = {each["name"]: each for each in result["findings"]}
        return result

    return examine


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine without nvidia-smi, and a function that puts one there which prints this."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(text: str, code: int = 0) -> None:
        file = folder / "nvidia-smi"
        file.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        file.chmod(0o755)

    return put


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_cuda(Gpu(has_driver=False)))


_packages = functools.cache(importlib.metadata.packages_distributions)


@pytest.fixture(autouse=True)
def _packages_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lists of all that is installed are a fifth of a report."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", _packages)


def state_of(report: Report, name: str) -> tuple[str, str]:
    found = report["by_name"][name]
    return found["state"], found["detail"]


def decodes_of(report: Report) -> dict[str, Any]:
    return {each["name"]: each for each in report["findings"] if each["part"] == "decode"}


def own_packages(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """A pid-trt with some extras, and these packages installed."""
    provided = Message()
    for extra in ("cpu", "cuda", "export", "dev"):
        provided["Provides-Extra"] = extra
    own = SimpleNamespace(
        requires=[
            "numpy>=1.26",
            "onnxruntime>=1.21.1; extra == 'cpu'",
            "onnxruntime-gpu[cuda]>=1.21.1; extra == 'cuda'",
            "onnx-ir>=0.1.16; extra == 'export'",
            "onnx>=1.18; extra == 'export'",
            "ruff; extra == 'dev'",
        ],
        metadata=provided,
    )

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    gpu = SimpleNamespace(requires=["numpy", "cublas; extra == 'cuda'", "dali; extra == 'dali'"])
    of = {"pid-trt": own, "onnxruntime-gpu": gpu}
    monkeypatch.setattr(doctor_checks.metadata, "distribution", lambda name: of[name])
    monkeypatch.setattr(doctor_checks.metadata, "version", version)


# what is said


def test_a_machine_without_a_gpu_is_no_fault(run_command: RunCommand) -> None:
    code, out, err = run_command(main)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["machine", "pid-trt", "ok", __version__]
    assert any(line.split()[:3] == ["gpu", "cuda-python", "missing"] for line in lines)
    assert any(line.split()[:4] == ["backend", "onnxruntime", "cpu", "ok"] for line in lines)
    assert lines[-1].startswith("next: ")
    columns = {line.index(f" {line.split()[1]}") for line in lines[:-1]}
    assert len(columns) == 1


def test_without_a_backend_it_says_what_to_install(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = ("onnxruntime", "torch", "tensorrt", "tensorrt_lean", "tensorrt_rtx", "cuda.core")
    install(monkeypatch, dict.fromkeys(modules))
    found = report()
    assert found["code"] == 0
    assert found["next"].startswith("no backend: pip install 'pid-trt[cpu]'")
    assert state_of(found, "torch") == ("missing", "pip install 'pid-trt[torch]'")
    assert state_of(found, "tensorrt-rtx") == ("missing", "pip install 'pid-trt[tensorrt-rtx]'")
    assert state_of(found, "0") == ("missing", "nvidia-smi is not there")


def test_without_a_bundle_it_says_how_to_make_one(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    has: dict[str, str] = {"numpy": "2.0", "onnxruntime": "1.22.0"}
    own_packages(monkeypatch, has)
    assert report()["next"].startswith("no bundle: pip install 'pid-trt[export]'")
    own_packages(monkeypatch, has | {"onnx": "1.18.0", "onnx-ir": "0.1.16"})
    assert "pid-export --space nano -o nano, and then pid-doctor nano" in report()["next"]


# packages


def test_extras_are_those_of_the_metadata(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_packages(monkeypatch, {"numpy": "2.0", "onnxruntime": "1.22.0", "onnx": "1.18.0"})
    found = report()
    assert state_of(found, "needed") == ("ok", "numpy 2.0")
    assert state_of(found, "cpu") == ("ok", "onnxruntime 1.22.0")
    assert state_of(found, "export") == ("missing", "without onnx-ir")
    assert "dev" not in found["by_name"] and found["code"] == 0
    assert found["by_name"]["cpu"]["values"] == {"versions": {"onnxruntime": "1.22.0"}}


def test_an_extra_has_the_extras_of_its_packages(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    has = {"numpy": "2.0", "onnxruntime-gpu": "1.22.0"}
    own_packages(monkeypatch, has)
    assert state_of(report(), "cuda") == ("missing", "without cublas")
    own_packages(monkeypatch, has | {"cublas": "13.0"})
    assert state_of(report(), "cuda") == ("ok", "onnxruntime-gpu 1.22.0, cublas 13.0")


@pytest.mark.parametrize(
    ("versions", "name", "detail"),
    [
        (
            {"numpy": "2.0", "onnxruntime": "1.20.0"},
            "cpu",
            "expected onnxruntime>=1.21.1, but got 1.20.0; pip install --upgrade 'pid-trt[cpu]'",
        ),
        (
            {"numpy": "1.9"},
            "needed",
            "expected numpy>=1.26, but got 1.9; pip install --upgrade 'pid-trt'",
        ),
        ({}, "needed", "without numpy"),
    ],
)
def test_packages_that_will_not_do(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    name: str,
    detail: str,
) -> None:
    own_packages(monkeypatch, versions)
    found = report()
    assert (found["code"], *state_of(found, name)) == (1, "wrong", detail)
    assert found["next"].startswith("mend what is wrong, first ") and detail in found["next"]


def test_two_packages_of_onnx_runtime_are_wrong(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu", "onnxruntime"]}
    monkeypatch.setattr(doctor_checks.metadata, "packages_distributions", lambda: both)
    found = report()
    state, detail = state_of(found, "onnxruntime")
    assert (found["code"], state) == (1, "wrong")
    assert "pip uninstall onnxruntime onnxruntime-gpu, then install one" in detail


def test_files_that_are_not_installed(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_checks.metadata, "distribution", absent)
    found = report()
    assert state_of(found, "pid-trt") == (
        "missing",
        "it runs from its files; pip install . in the clone",
    )


# GPUs


def test_a_gpu_is_described(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
) -> None:
    nvidia_smi("NVIDIA GeForce RTX 4090, 580.95.05, 8.9, 23000, 24564")
    install(monkeypatch, fake_cuda(Gpu(free=1 << 29)))
    found = report()
    assert state_of(found, "0") == (
        "ok",
        "NVIDIA GeForce RTX 4090, driver 580.95.05, compute capability 8.9, 24.1 of 25.8 GB free",
    )
    assert found["by_name"]["0"]["values"]["total_bytes"] == 24564 << 20
    device = found["by_name"]["cuda-python"]
    assert (device["state"], device["values"]["target"]) == ("ok", "sm89")
    assert device["values"]["free_bytes"] == 1 << 29
    assert device["values"]["total_bytes"] == 1 << 30


def test_a_gpu_that_does_not_say_its_memory(
    report: Callable[..., Report], nvidia_smi: Callable[..., None]
) -> None:
    nvidia_smi("NVIDIA GB10, 580.95.05, 12.1, [N/A], [N/A]")
    found = report()
    assert state_of(found, "0") == ("ok", "NVIDIA GB10, driver 580.95.05, compute capability 12.1")


@pytest.mark.parametrize("there", [True, False])
def test_a_driver_that_is_too_old_is_wrong_where_there_is_a_gpu(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
    there: bool,
) -> None:
    if there:
        nvidia_smi("NVIDIA GeForce RTX 4090, 550.1, 8.9, 23000, 24564")
    install(monkeypatch, fake_cuda(Gpu(driver=12040)))
    state, detail = state_of(report(), "cuda-python")
    assert state == ("wrong" if there else "missing")
    assert "expected a driver for CUDA 13 or newer" in detail


def test_what_nvidia_smi_complains_of_is_told(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
) -> None:
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch\nmore", 18)
    install(monkeypatch, {"cuda.core": None})
    said = "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch"
    assert state_of(report(), "0") == ("missing", said)


def test_a_container_with_the_driver_only_has_a_gpu(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(pointer: Any) -> int:
        pointer._obj.value = 2
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count)
    monkeypatch.setattr(doctor_checks.ctypes, "CDLL", lambda name: driver)
    install(monkeypatch, {"cuda.core": None})
    found = report()
    assert state_of(found, "driver") == ("ok", "2 GPUs, but nvidia-smi is not there")
    assert found["next"].startswith("nothing uses the GPU: ")


# backends


def test_providers_that_load_wait_for_a_gpu(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_onnxruntime, "find_provider", lambda name: name)
    state, detail = state_of(report(), "onnxruntime nvtensorrtrtx")
    assert state == "missing" and detail.endswith(", but there is no GPU")
    install(monkeypatch, fake_cuda(Gpu()))
    assert state_of(report(), "onnxruntime nvtensorrtrtx")[0] == "ok"


@pytest.mark.parametrize("there", [True, False])
def test_a_provider_that_does_not_load(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
    there: bool,
) -> None:
    reason = "expected CUDAExecutionProvider to load, but libcudnn.so.9: no; pip install it"

    def find(name: str) -> str:
        if name == "cuda":
            raise PidRuntimeError(reason)
        return name

    if there:
        nvidia_smi("NVIDIA GeForce RTX 4090, 580.95.05, 8.9, 23000, 24564")
        install(monkeypatch, fake_cuda(Gpu()))
    monkeypatch.setattr(backend_onnxruntime, "find_provider", find)
    monkeypatch.setattr(backend_onnxruntime, "is_installed", lambda name: True)
    found = report()
    assert state_of(found, "onnxruntime cuda") == ("wrong" if there else "missing", reason)
    assert found["code"] == int(there)


def test_providers_that_are_not_installed_say_only_what_to_install(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {"onnxruntime_ep_nv_tensorrt_rtx": None})
    ort = backend_onnxruntime.ort
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    found = report()
    assert state_of(found, "onnxruntime nvtensorrtrtx") == (
        "missing",
        "pip install 'pid-trt[rtx-provider]'",
    )
    state, detail = state_of(found, "onnxruntime cuda")
    assert state == "missing" and detail.startswith("GPU providers come with pip install")


def test_a_package_that_does_not_load_is_wrong(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: no\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    found = report()
    detail = "installed, but does not load: libnvinfer.so.11: no"
    assert (found["code"], *state_of(found, "tensorrt")) == (1, "wrong", detail)


@pytest.mark.parametrize(
    ("available", "cuda", "there", "state"),
    [
        (True, "13.0", True, "ok"),
        (False, None, True, "missing"),
        (False, "13.0", True, "wrong"),
        (False, "13.0", False, "missing"),
    ],
)
def test_what_torch_runs_on(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
    available: bool,
    cuda: str | None,
    there: bool,
    state: str,
) -> None:
    if there:
        nvidia_smi("NVIDIA GeForce RTX 4090, 580.95.05, 8.9, 23000, 24564")
        install(monkeypatch, fake_cuda(Gpu()))
    torch = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: available),
    )
    install(monkeypatch, {"torch": torch})
    found = report()
    assert state_of(found, "torch cpu") == ("ok", "PyTorch 2.13.0")
    assert found["by_name"]["torch cuda"]["state"] == state


def test_a_library_that_only_runs_engines(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = SimpleNamespace(__version__="11.4")
    install(monkeypatch, {"tensorrt": None, "tensorrt_lean": lean})
    assert state_of(report(), "tensorrt") == ("ok", "TensorRT 11.4, tensorrt_lean, runs engines")
    install(monkeypatch, {"tensorrt": lean})
    assert state_of(report(), "tensorrt")[1].endswith("tensorrt, builds engines and runs them")
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)  # without Polygraphy
    found = report()
    assert state_of(found, "tensorrt")[1].endswith(
        "runs engines; to build them, pip install 'pid-trt[tensorrt]'"
    )
    assert not found["by_name"]["tensorrt"]["values"]["builds"]


@pytest.mark.parametrize("python", [True, False])
def test_a_library_that_is_not_for_this_gpu(
    report: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[..., None],
    golden_bundle: Path,
    python: bool,
) -> None:
    """TensorRT for RTX on an H100, whether or not cuda-python sees that."""
    library = fake_tensorrt(Gpu(), golden_bundle, FakeRtxEngine)
    absent: dict[str, Any] = {"tensorrt": None, "tensorrt_lean": None, "cuda.core": None}
    install(monkeypatch, {**absent, "tensorrt_rtx": library})
    if python:
        install(monkeypatch, fake_cuda(Gpu(capability=(9, 0))))
    else:
        nvidia_smi("NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81000, 81559")
    found = report(golden_bundle)
    assert state_of(found, "tensorrt-rtx") == (
        "missing",
        f"TensorRT for RTX {VERSION}, tensorrt_rtx, runs no engines on this GPU, sm90; "
        "TensorRT does: pip install 'pid-trt[tensorrt]'",
    )
    assert "tensorrt" not in decodes_of(found) and found["code"] == 0


# a bundle


def test_backends_are_compared_with_each_other(
    report: Callable[..., Report], golden_bundle: Path
) -> None:
    found = report(golden_bundle)
    assert found["code"] == 0 and state_of(found, "files")[0] == "ok"
    first, second = decodes_of(found).values()
    assert (first["name"], second["name"]) == ("onnxruntime cpu", "torch cpu")
    assert first["detail"].startswith("128x128 in ")
    assert first["detail"].endswith("s with loading, nothing to compare with")
    assert second["detail"].endswith(" from onnxruntime cpu's")
    assert second["values"]["rms"] < 1e-5
    np.testing.assert_allclose(
        first["values"]["fingerprint"], second["values"]["fingerprint"], rtol=0, atol=1e-4
    )


def test_an_image_that_is_not_the_known_one_is_wrong(
    report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, edit_bundle: EditBundle
) -> None:
    bundle = edit_bundle(lambda fields: fields["model"]["weights"].update(sha256="0"))
    with Decoder.open(bundle) as decoder:
        image = decoder.decode(doctor_bundle.sample_latent(decoder.manifest))
    for change, code in ((0.0, 0), (0.004, 0), (0.01, 1)):
        noisy = image + change * standard_normal(9, 0, image.size).reshape(image.shape)
        known = {"0": tuple(doctor_bundle.fingerprint(noisy))}
        monkeypatch.setattr(doctor_bundle, "KNOWN_DECODES", known)
        found = report(bundle)
        assert found["code"] == code
        for each in decodes_of(found).values():
            assert each["values"]["compared_with"] == "the known image"
            assert each["values"]["rms"] == pytest.approx(change, rel=0.5, abs=1e-5)
    assert "expected at most 0.005 from the known image, but got 0.0" in found["next"]


def test_a_decode_that_fails_is_wrong(report: Callable[..., Report], spoilt_bundle: Path) -> None:
    found = report(spoilt_bundle)
    assert found["code"] == 1
    for each in decodes_of(found).values():
        assert each["state"] == "wrong" and "step 3 of 4 gave NaN" in each["detail"]


def test_a_bundle_that_a_backend_is_not_for(
    report: Callable[..., Report], bf16_bundle: Path
) -> None:
    found = report(bf16_bundle)
    assert found["code"] == 0
    each = decodes_of(found)
    assert each["onnxruntime cpu"]["state"] == "missing"
    assert "has no bf16 kernels" in each["onnxruntime cpu"]["detail"]
    assert each["torch cpu"]["state"] == "ok"


def test_an_altered_bundle_is_wrong_and_not_decoded(
    report: Callable[..., Report], edit_bundle: EditBundle
) -> None:
    bundle = edit_bundle()
    weights = bundle / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = report(bundle)
    state, detail = state_of(found, "files")
    assert (found["code"], state) == (1, "wrong") and "was altered" in detail
    assert decodes_of(found) == {}


def test_no_bundle_is_bad_input(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert f"expected a bundle (a folder with manifest.json), but got {tmp_path}" in refusal(
        main, tmp_path
    )


# engines


@pytest.fixture
def with_engines(edit_bundle: EditBundle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines for sm86 and sm89, and what runs them on an sm89."""
    bundle = edit_bundle()
    add_engines(bundle, "rtx")
    gpu = Gpu()
    library = fake_tensorrt(gpu, bundle, FakeRtxEngine)
    install(monkeypatch, {**fake_cuda(gpu), "tensorrt_rtx": library})
    return bundle


def test_engines_that_run_here_decode(report: Callable[..., Report], with_engines: Path) -> None:
    found = report(with_engines)
    detail = f"tensorrt-rtx {VERSION} for sm86, sm89, runs here"
    assert (found["code"], *state_of(found, "rtx")) == (0, "ok", detail)
    assert list(decodes_of(found)) == ["onnxruntime cpu", "torch cpu", "tensorrt"]
    assert decodes_of(found)["tensorrt"]["values"]["rms"] < 1e-5


def test_engines_for_other_gpus_are_not_tried(
    report: Callable[..., Report], with_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fake_cuda(Gpu(capability=(12, 0))))
    found = report(with_engines)
    state, detail = state_of(found, "rtx")
    build = f"pid-build {with_engines} --flavor tensorrt-rtx --target sm120"
    assert (state, detail) == ("missing", f"was built for sm86, sm89; build them: {build}")
    assert "tensorrt" not in decodes_of(found) and found["code"] == 0
    install(monkeypatch, fake_cuda(Gpu(capability=(9, 0))))
    detail = state_of(report(with_engines), "rtx")[1]
    build = f"pid-build {with_engines} --flavor tensorrt --target sm90"
    assert detail == f"was built for sm86, sm89; build them: {build}"
    install(monkeypatch, fake_cuda(Gpu(has_driver=False)))
    assert state_of(report(with_engines), "rtx")[1].endswith("there is no such GPU here")


def test_engines_that_were_altered_are_wrong(
    report: Callable[..., Report], with_engines: Path
) -> None:
    next((with_engines / "engines" / "rtx").glob("*.engine")).write_bytes(b"other")
    found = report(with_engines)
    state, detail = state_of(found, "rtx")
    assert (found["code"], state) == (1, "wrong") and "bytes instead of" in detail


def test_a_bundle_without_engines_says_how_to_build_them(
    report: Callable[..., Report], golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fake_cuda(Gpu()))
    each = decodes_of(report(golden_bundle))["tensorrt"]
    assert each["state"] == "missing"
    assert "it has none; export it again with --precision bf16, and build them" in each["detail"]
