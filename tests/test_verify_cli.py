"""`pid-verify` on bundles: what is right passes, and what is wrong is found where it is."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pid_export import verify
from pid_export.verify import compare
from pid_export.verify_cli import main
from pid_ref.checkpoint import state_shapes
from pid_ref.sampler import timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.backend_torch import TorchSession
from pid_runtime.decoder import BACKENDS
from pid_runtime.manifest import Manifest, Sizes, read_manifest

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
EditBundle = Callable[..., Path]
Fields = dict[str, Any]
Change = Callable[[NDArray[np.float32]], object]


def failures(run_command: RunCommand, bundle: Path, *arguments: object) -> list[str]:
    """Outputs that a verification found wrong."""
    code, out, err = run_command(main, bundle, "--json", "--quiet", *arguments)
    result: Fields = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    wrong = [each["name"] for each in result["comparisons"] if not each["passed"]]
    assert err == "" and result["passed"] == (not wrong) and code == (1 if wrong else 0)
    return wrong


def graphs_of(names: list[str]) -> set[str]:
    return {name.partition(" ")[0] for name in names}


# What is right


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_good_bundle_passes(
    golden_bundle: Path, run_command: RunCommand, backend: str
) -> None:
    code, out, err = run_command(main, golden_bundle, "--backend", backend, "--json")
    result: Fields = json.loads(out)
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert result["passed"] is True and result["tolerance"] == 1e-4
    assert result["bundle"] == str(golden_bundle) and result["backend"] == backend
    assert result["size"] == [96, 64] and result["precision"] == "fp32"
    comparisons = {each["name"]: each for each in result["comparisons"]}
    assert list(comparisons)[-1] == "whole decode"
    assert graphs_of(list(comparisons)) == {*read_manifest(golden_bundle).graphs, "whole"}
    for name, each in comparisons.items():
        assert each["passed"] and each["max_abs_error"] == each["percentiles"][3] <= 1e-4
        assert each["percentiles"] == sorted(each["percentiles"])
        assert 0.01 < each["scale"] < (10 if "bytes" not in name else 255)


def test_every_output_is_compared(golden_bundle: Path, run_command: RunCommand) -> None:
    _, out, _ = run_command(main, golden_bundle, "--json")
    seen = [each["name"] for each in json.loads(out)["comparisons"]]
    wanted: list[str] = []
    for section in json.loads((golden_bundle / "manifest.json").read_text())["program"].values():
        for each in section:
            if "noise" in each:
                wanted.append(each["graph"])
            for operand in each.get("outputs", {}).values():
                buffer = operand if isinstance(operand, str) else operand["buffer"]
                wanted.append(f"{each['run']} {buffer}")
    assert seen == [*wanted, "whole decode"]


def test_text(golden_bundle: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command(main, golden_bundle, "--size", "64x128")
    header, *lines, summary = out.splitlines()
    assert code == 0
    assert header.split() == ["output", "median", "p90", "p99", "max", "rms"]
    assert all(line.startswith("ok   ") for line in lines) and len(lines) > 30
    assert summary == (
        "passed: 64x128, fp32, onnxruntime, tolerance 1e-04 x rms (at least 1) of the reference"
    )


def test_other_inputs(chunked_bundle: Path, run_command: RunCommand) -> None:
    """Stages of several chunks, another shape and another seed."""
    assert failures(run_command, chunked_bundle, "--size", "96X128", "--seed", 5) == []


# Comparisons


def test_errors_have_a_distribution() -> None:
    want = np.zeros((10, 100), np.float32)
    got = np.arange(1000, dtype=np.float32).reshape(10, 100) * np.float32(1e-7)
    result = compare("x", got, want, 1e-4)
    assert result.passed and result.max_abs_error == pytest.approx(999e-7)
    assert result.percentiles == pytest.approx((499.5e-7, 899.1e-7, 989.01e-7, 999e-7))
    assert (result.scale, result.worst) == (0, (9, 99))
    assert not compare("x", got, want, 9.98e-5).passed


def test_the_tolerance_grows_with_the_scale() -> None:
    want = np.full(100, -8, np.float32)
    assert compare("x", want + 7e-4, want, 1e-4).passed
    assert not compare("x", want + 9e-4, want, 1e-4).passed
    assert not compare("x", want / 100 + 2e-4, want / 100, 1e-4).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["got", "want", "both"])
def test_nothing_infinite_passes(value: float, where: str) -> None:
    got, want = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    if where != "want":
        got[1, 2] = value
    if where != "got":
        want[1, 2] = value
    result = compare("x", got, want, np.inf)
    assert not result.passed and result.worst == (1, 2)
    assert result.max_abs_error == np.inf and result.percentiles == (np.inf,) * 4


# Stages that compute something else


class Stages(NamedTuple):
    """An open bundle on torch, with what the reference says of every buffer."""

    bundle: Path
    manifest: Manifest
    session: TorchSession
    values: verify.Values
    sizes: Sizes

    def failing(self) -> set[str]:
        comparisons = verify.verify_stages(
            self.bundle, self.manifest, self.session, self.values, self.sizes
        )
        return graphs_of([each.name for each in comparisons if not each.passed])


@pytest.fixture(scope="module", params=["golden_bundle", "free_bundle"])
def stages(request: pytest.FixtureRequest) -> Iterator[Stages]:
    bundle: Path = request.getfixturevalue(request.param)
    manifest = read_manifest(bundle)
    times = list(timesteps(4))
    case = verify.random_case(manifest, 64, 32, 0, len(times) - 1)
    net = verify.reference_network(manifest, None)
    values, sizes = verify.stage_values(manifest, net, case, times)
    session = TorchSession(bundle, manifest)
    yield Stages(bundle, manifest, session, values, sizes)
    session.close()


def test_every_weight_counts(stages: Stages) -> None:
    """With the sign of any one tensor turned, its graph fails and no other."""
    assert stages.failing() == set()
    graphs = [name for name, graph in stages.manifest.graphs.items() if graph.weights_bytes]
    if "timestep" in graphs:  # the other graphs are those of the other bundle
        graphs = ["timestep"]
    for graph in graphs:
        for key, tensor in stages.session._stages[graph].state_dict().items():
            tensor.neg_()
            assert stages.failing() == {graph}, f"{graph}.{key}"
            tensor.neg_()
    assert stages.failing() == set()


def test_unread_outputs_fail(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that writes nothing does not pass with what an earlier one left."""

    def bind(graph: str, tensors: Any) -> Callable[[], None]:
        return (lambda: None) if graph == "attention" else real(graph, tensors)

    real = stages.session.bind
    monkeypatch.setattr(stages.session, "bind", bind)
    assert stages.failing() == {"attention"}


# Bundles altered on the disk, with hashes that fit


def alter(bundle: Path, folder: Path, tensor: str, change: Change) -> Path:
    """A copy whose `tensor` was changed, and whose manifest agrees with that."""
    copy = folder / "altered"
    shutil.copytree(bundle, copy)
    file = copy / "weights.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header: Fields = json.loads(content[8:start])
    begin, end = header[tensor]["data_offsets"]
    values = np.frombuffer(content, np.float32, (end - begin) // 4, start + begin)
    change(values.reshape(header[tensor]["shape"]))
    file.write_bytes(content)
    path = copy / "manifest.json"
    manifest: Fields = json.loads(path.read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    for name, graph in manifest["graphs"].items():
        digest = hashlib.sha256()
        for key, entry in header.items():
            if key.startswith(f"{name}."):
                begin, end = entry["data_offsets"]
                digest.update(content[start + begin : start + end])
        changed = digest.hexdigest() != graph["weights_sha256"]
        assert changed == tensor.startswith(f"{name}.")
        graph["weights_sha256"] = digest.hexdigest()
    path.write_text(json.dumps(manifest))
    return copy


def turn(values: NDArray[np.float32]) -> None:
    values[:] *= -1


def drop(values: NDArray[np.float32]) -> None:
    values[:] = 0


def swap(values: NDArray[np.float32]) -> None:
    values[:] = values.swapaxes(-1, -2).copy()


def nudge(values: NDArray[np.float32]) -> None:
    values.reshape(-1)[0] += 0.05


def spoil(values: NDArray[np.float32]) -> None:
    values.reshape(-1)[-1] = np.nan


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("latent.conv_mid.weight", swap),  # rows for columns
        ("caption.norm", nudge),
        ("text.1.leave.w2.weight", nudge),
        ("text.3.rope.weight", turn),
        ("image.0.embed.weight", nudge),
        ("image.2.gate.alpha", drop),
        ("image.3.enter.qk.weight", swap),
        ("pixel.0.enter.compress.bias", nudge),
        ("pixel.1.leave.gate_mlp.bias", drop),
        ("update.velocity.weight", turn),
    ],
)
def test_the_stage_with_the_fault_is_named(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand, tensor: str, change: Change
) -> None:
    with safe_open(golden_bundle / "weights.safetensors", "np") as weights:
        stored = sorted(weights.keys())
    if tensor not in stored:  # the fold decides on names: any tensor of the stage does as well
        graph = next(key for key in read_manifest(golden_bundle).graphs if tensor.startswith(key))
        tensor = next(key for key in stored if key.startswith(f"{graph}.") and key[-6:] == "weight")
    graph = ".".join(tensor.split(".")[: 2 if tensor.split(".")[1].isdecimal() else 1])
    copy = alter(golden_bundle, tmp_path, tensor, change)
    wrong = failures(run_command, copy, "--backend", "onnxruntime")
    assert graphs_of(wrong) == {graph, "whole"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_fails(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand, backend: str
) -> None:
    copy = alter(golden_bundle, tmp_path, "update.velocity.bias", spoil)
    code, out, _ = run_command(main, copy, "--backend", backend)
    lines = {line[5:37].strip(): line.split() for line in out.splitlines()}
    for name in ("update next_state", "whole decode"):
        assert lines[name][0] == "FAIL" and lines[name][-5:-1] == ["inf"] * 4
    assert code == 1 and out.splitlines()[-1].startswith("FAILED: 96x64, fp32")
    wrong = failures(run_command, copy, "--backend", backend)
    assert wrong == ["update next_state", "whole decode"]
    _, out, _ = run_command(main, copy, "--backend", backend, "--json")
    assert json.loads(out)["comparisons"][-1]["max_abs_error"] is None


def test_a_table_of_a_later_step(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """Stages are verified in the first step: other rows show in the whole decode alone."""

    def change(rows: NDArray[np.float32]) -> None:
        rows[row] *= 1.1

    sampler = read_manifest(golden_bundle).sampler
    row = sampler.schedules["4"][0]
    first = alter(golden_bundle, tmp_path / "first", "table.modulation", change)
    assert len(graphs_of(failures(run_command, first, "--backend", "torch"))) > 5
    row = sampler.schedules["4"][2]
    later = alter(golden_bundle, tmp_path / "later", "table.modulation", change)
    assert failures(run_command, later, "--backend", "torch") == ["whole decode"]


def swap_keys_and_values(fields: Fields) -> None:
    attend = fields["program"]["step"][2]
    assert attend["run"] == "attention"
    inputs = attend["inputs"]
    inputs["k"], inputs["v"] = inputs["v"], inputs["k"]


def modulate_by_the_text(fields: Fields) -> None:
    image = next(each for each in fields["program"]["step"] if each.get("run") == "image.2")
    image["inputs"]["modulation"]["start"][1] = 1


def turn_faster(fields: Fields) -> None:
    for part in ("cos", "sin"):
        fields["buffers"][f"text_rope_{part}"]["source"]["theta"] = 100.0


def swap_rows_and_columns(fields: Fields) -> None:
    for name, axis in (("pixel_columns", "row"), ("pixel_rows", "column")):
        fields["buffers"][name]["source"]["axis"] = axis


def read_the_latent_late(fields: Fields) -> None:
    """Give image.2 the tokens of image.0 instead of those of image.1."""
    image = next(each for each in fields["program"]["step"] if each.get("run") == "image.2")
    image["inputs"]["x"] = "x.0"


def visit_other_times(fields: Fields) -> None:
    fields["sampler"]["schedules"]["4"][2] = fields["sampler"]["schedules"]["1"][0]


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (swap_keys_and_values, {"attention"}),
        (modulate_by_the_text, {"image.2"}),
        (turn_faster, {"text.0", "text.1", "text.2", "text.3"}),
        (swap_rows_and_columns, {"pixel.0", "pixel.1"}),
    ],
)
def test_a_program_that_is_wired_otherwise(
    edit_bundle: EditBundle,
    run_command: RunCommand,
    edit: Callable[[Fields], None],
    wrong: set[str],
) -> None:
    found = failures(run_command, edit_bundle(edit), "--backend", "torch")
    assert graphs_of(found) == {*wrong, "whole"}


@pytest.mark.parametrize("edit", [read_the_latent_late])
def test_only_the_whole_decode_shows_the_wiring(
    edit_bundle: EditBundle, run_command: RunCommand, edit: Callable[[Fields], None]
) -> None:
    """A stage computes as it should from what it reads, but reads the wrong buffer."""
    found = failures(run_command, edit_bundle(edit), "--backend", "torch")
    assert "whole decode" in found


# What is refused


def test_one_thing_at_a_time(golden_bundle: Path, refusal: Refusal) -> None:
    assert "BUNDLE or --golden FILE, but got neither" in refusal(main)
    golden = Path(__file__).parent / "golden" / "flux_2k.safetensors"
    assert "but got both" in refusal(main, golden_bundle, "--golden", golden)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--backend", "tensorflow"], "a backend of onnxruntime, torch"),
        (["--device", "nosuch"], "providers"),
        (["--device", "cpu:x"], "a device such as cuda:0"),
        (["--backend", "torch", "--device", "nosuch"], "a device torch can use"),
        (["--seed", "-1"], "a seed of at least 0"),
        (["--size", "big"], "a size such as 512x512"),
        (["--size", "64"], "a size such as 512x512"),
        (["--size", "64x"], "a size such as 512x512"),
        (["--size", "-64x64"], "a size such as 512x512"),
        (["--size", "64x64x64"], "a size such as 512x512"),
        (["--size", "0x64"], "multiples of 32, but got 0x64"),
        (["--size", "100x64"], "multiples of 32, but got 100x64; 96x64"),
        (["--size", "1024x1024"], "at most 1024 patch tokens"),
        (["--size", "99999968x99999968"], "at most 1024 patch tokens"),
    ],
)
def test_arguments(
    golden_bundle: Path, refusal: Refusal, arguments: list[str], part: str
) -> None:
    assert part in refusal(main, golden_bundle, *arguments)


def test_the_largest_size_of_a_bundle(golden_bundle: Path, run_command: RunCommand) -> None:
    assert failures(run_command, golden_bundle, "--size", "512x512", "--backend", "torch") == []


@pytest.fixture
def checkpoint(golden_bundle: Path, tmp_path: Path) -> Path:
    config = verify.config_of(read_manifest(golden_bundle).network)
    source = RandomWeights(state_shapes(config), 1)
    path = tmp_path / "checkpoint.pth"
    torch.save({f"net.{name}": source[name] for name in source}, path)
    return path


def from_file(fields: Fields, file: Path) -> None:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    fields["model"]["weights"] = {"file": file.name, "sha256": sha256}


def test_a_checkpoint_is_needed(
    edit_bundle: EditBundle, checkpoint: Path, refusal: Refusal, tmp_path: Path
) -> None:
    bundle = edit_bundle(lambda fields: from_file(fields, checkpoint))
    assert "checkpoint.pth, but got none; add --checkpoint PATH" in refusal(main, bundle)
    for path, part in (
        (tmp_path / "none.pth", "no file at"),
        (tmp_path, "no model_ema_bf16.pth"),
        (bundle / "manifest.json", "something else"),
        (bundle / "weights.safetensors", "holds no PiD decoder"),
    ):
        code, out, err = run_refused(bundle, path)
        assert (code, out) == (2, "") and part in err.splitlines()[0]


def test_another_checkpoint(
    edit_bundle: EditBundle, checkpoint: Path, refusal: Refusal, run_command: RunCommand
) -> None:
    bundle = edit_bundle(lambda fields: from_file(fields, checkpoint))
    wrong = failures(run_command, bundle, "--checkpoint", checkpoint, "--backend", "torch")
    assert len(graphs_of(wrong)) > 10  # the hash fits, but the weights are another seed's
    state: Fields = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"net.final_layer.linear.bias": torch.zeros(3)}, checkpoint)
    text = refusal(main, bundle, "--checkpoint", checkpoint)
    assert "but got other contents in" in text and "checkpoint.pth" in text


@pytest.mark.parametrize("origin", [None, {}, "somewhere", {"file": 3}])
def test_weights_of_unknown_origin(
    edit_bundle: EditBundle, refusal: Refusal, origin: object
) -> None:
    bundle = edit_bundle(lambda fields: fields["model"].update(weights=origin))
    assert "says where its weights came from" in refusal(main, bundle)


def test_a_network_that_is_not_said(edit_bundle: EditBundle, refusal: Refusal) -> None:
    bundle = edit_bundle(lambda fields: fields["network"].pop("latent_interval"))
    assert "'latent_interval' among the network's dimensions" in refusal(main, bundle)
    bundle = edit_bundle(lambda fields: fields["network"].update(num_heads=0))
    assert "num_heads to be an integer" in refusal(main, bundle)


def test_broken_bundles(edit_bundle: EditBundle, refusal: Refusal, tmp_path: Path) -> None:
    assert "cannot read" in refusal(main, tmp_path / "none")
    bundle = edit_bundle()
    (bundle / "caption.onnx").unlink()
    assert "no file caption.onnx" in refusal(main, bundle)
    bundle = edit_bundle()
    with (bundle / "weights.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\xff\xff")
    assert "was altered" in refusal(main, bundle)
