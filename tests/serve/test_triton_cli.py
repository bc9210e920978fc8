"""`pid-triton`: what it writes and refuses, and a real tritonserver that serves it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pid_bench import load
from pid_runtime.decoder import Decoder
from pid_serve import triton_cli
from places import ROOT

LATENT = np.linspace(-1, 1, 16 * 2 * 3, dtype=np.float32).reshape(1, 16, 2, 3)
Refusal = Callable[..., str]
RunCommand = Callable[..., tuple[int, str, str]]


def test_a_model_repository(golden_bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    made = tmp_path / "repository"
    options = ["--name", "golden", "--batch", 4, "--threads", 2, "--warm-up", "100x64"]
    code, out, err = run_command(triton_cli.main, golden_bundle, "-o", made, *options)
    assert (code, err) == (0, "") and "model golden" in out
    assert [path.name for path in made.iterdir()] == ["golden"]
    bundle = made / "golden" / "1" / "bundle"
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert files == {path.name: path.read_bytes() for path in golden_bundle.iterdir()}
    config = (made / "golden" / "config.pbtxt").read_text()
    for line in (
        'name: "golden"',
        "max_batch_size: 4",
        'input { name: "latent" data_type: TYPE_FP32 dims: [16, -1, -1] }',
        'input { name: "seed" data_type: TYPE_UINT64 dims: [1] optional: true }',
        "instance_group { count: 1 kind: KIND_CPU }",
        'parameters { key: "threads" value { string_value: "2" } }',
        "    max_queue_size: 16",
    ):
        assert line in config.splitlines()
    assert "dims: [16, 2, 3] zero_data: true" in config
    gpus = ["--name", "b", "--gpus", "0,1", "--instances", 2, "--backend", "tensorrt"]
    assert run_command(triton_cli.main, golden_bundle, "-o", made, *gpus)[0] == 0
    config = (made / "b" / "config.pbtxt").read_text()
    assert "instance_group { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] }" in config


def test_what_the_command_refuses(golden_bundle: Path, tmp_path: Path, refusal: Refusal) -> None:
    made = tmp_path / "repository"
    (tmp_path / "taken" / "golden").mkdir(parents=True)
    for bundle, output, more, message in (
        (tmp_path, made, [], "expected a bundle"),
        (golden_bundle, made, ["--name", "a b"], "expected a name of"),
        (golden_bundle, made, ["--backend", "tensorrt"], "give --gpus 0"),
        (golden_bundle, made, ["--gpus", "x"], "expected GPUs such as 0,1"),
        (golden_bundle, made, ["--batch", "0"], "expected a whole number above 0"),
        (golden_bundle, made, ["--warm-up", "9x9"], "expected a --warm-up of at least 32x32"),
        (golden_bundle, made, ["--warm-up", "9999x9999"], "expected an image of at most"),
        (golden_bundle, tmp_path / "taken", ["--name", "golden"], "expected a new model"),
    ):
        assert message in refusal(triton_cli.main, bundle, "-o", output, *more)
    assert not made.exists()


@dataclass(frozen=True)
class Triton:
    """What it takes to run tritonserver and ask it."""

    home: Path
    """Of nvidia-pytriton, unpacked."""
    backends: Path
    python: Path
    """With numpy < 2, which its Python backend wants, and all that is installed here."""
    client: str
    """PYTHONPATH of tritonclient."""


def pip(*arguments: str | Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, arguments),
        "-q",
        "--disable-pip-version-check",
    ]
    if subprocess.run(command, check=False).returncode:
        pytest.skip(f"pip could not get {arguments[-1]}")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Triton:
    """From the wheel of nvidia-pytriton, which is not installed."""
    folder = tmp_path_factory.mktemp("triton")
    pip("download", "--no-deps", "-d", folder, "nvidia-pytriton==0.7.0")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    numpy, client = folder / "numpy", folder / "client"
    pip("install", "--target", numpy, "numpy==1.26.4")
    pip("install", "--target", client, "tritonclient[http,grpc]==2.73.0")
    home, backends = folder / "pytriton" / "tritonserver", folder / "backends"
    shutil.copytree(home / "backends" / "python", backends / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    shutil.copy(home / "python_backend_stubs" / version / stub, backends / "python" / stub)
    for program in (home / "bin" / "tritonserver", backends / "python" / stub):
        program.chmod(0o755)
    # The stub reads no PYTHONPATH.
    subprocess.run(
        [os.path.realpath(sys.executable), "-m", "venv", "--without-pip", folder / "venv"],
        check=True,
    )
    own = folder / "venv" / "lib" / f"python{version}" / "site-packages"
    paths = [numpy, ROOT / "runtime", ROOT, sysconfig.get_path("purelib")]
    (own / "tree.pth").write_text("\n".join(map(str, paths)))
    return Triton(home, backends, folder / "venv" / "bin", f"{client}:{numpy}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as taken:
        bound = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in bound]


@contextlib.contextmanager
def serving(triton: Triton, repository: Path, log: Path) -> Generator[tuple[int, int]]:
    """A tritonserver; gives its ports for HTTP and gRPC."""
    http, grpc, metrics = free_ports(3)
    command = [
        triton.home / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={triton.backends}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--allow-gpu-metrics=false",
        "--model-control-mode=explicit",
        "--load-model=*",
    ]
    libraries = f"{triton.home.parents[1] / 'nvidia_pytriton.libs'}"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{libraries}:{sysconfig.get_config_var('LIBDIR')}",
        "PATH": f"{triton.python}:{os.environ['PATH']}",
    }
    with (
        log.open("wb") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready")
                    break
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.2)
            yield http, grpc
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_a_real_server(triton: Triton, golden_bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    options = ["--name", "golden", "--batch", "4", "--threads", "1", "--warm-up", "96x64"]
    assert triton_cli.main([str(golden_bundle), "-o", str(repository), *options]) == 0
    latent, result = tmp_path / "latent.npy", tmp_path / "result.npz"
    np.save(latent, LATENT)
    with serving(triton, repository, tmp_path / "log") as ports:
        subprocess.run(
            [sys.executable, ROOT / "tests" / "triton_client.py", *map(str, ports), latent, result],
            env={**os.environ, "PYTHONPATH": triton.client},
            check=True,
        )
        asked = ("--url", f"http://127.0.0.1:{ports[0]}", "--triton", "golden", "--clients", "1,2")
        few = ("--requests", "6", "--latent", "3x2")
        assert load.main([str(golden_bundle), *asked, *few]) == 0
    with Decoder.open(golden_bundle) as pid:
        wanted = pid.decode(LATENT, sigma=0.2, seed=7, steps=2, output="uint8")
        many = [pid.decode(LATENT, seed=seed, output="uint8")[0] for seed in range(8)]
    found = np.load(result)
    for name in ("http_image", "grpc_image", "again"):
        np.testing.assert_array_equal(found[name], wanted)
    np.testing.assert_array_equal(found["many"], np.stack(many))
    assert found["reloaded"].all()
    for kind, status in (("http", "400"), ("grpc", "StatusCode.INVALID_ARGUMENT")):
        refused = [str(each) for each in found[f"{kind}_refused"]]
        assert all(each.startswith(status) for each in refused)
        assert re.search("unexpected shape", refused[0]) and "finite latent" in refused[1]
        assert "1, 2, 4 steps" in refused[2] and "sigma in [0, 1]" in refused[3]
