"""`pid-verify` on bundles: what is right passes, and a fault is found in the stage it is in."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from altered import Change, alter, tensors_of
from fakes.engines import add_engines
from fakes.gpu import FakeRtxEngine, Gpu, fake_cuda, fake_tensorrt, install
from pid_export import verify
from pid_export.bundle import config_of
from pid_export.verify import compare
from pid_export.verify_cli import main
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.registry import find_checkpoint
from pid_ref.sampler import timesteps
from pid_ref.weights import RandomWeights
from pid_runtime.backends.torch import TorchGraphs
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.decoder import Bundle
from places import GOLDEN

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
Fields = dict[str, Any]
Edit = Callable[[Fields], object]
EditBundle = Callable[..., Path]

WEIGHTS = {
    "latent": "latent.conv_in.weight",
    "caption": "caption.proj.weight",
    "text.0": "text.0.enter.v.weight",
    "text.1": "text.1.leave.w2.weight",
    "text.2": "text.2.leave.proj.weight",
    "text.3": "text.3.enter.qk.weight",
    "image.0": "image.0.embed.weight",
    "image.1": "image.1.enter.v.weight",
    "image.2": "image.2.gate.feature.weight",
    "image.3": "image.3.leave.w1.weight",
    "pixel.0": "pixel.0.enter.compress.weight",
    "pixel.1": "pixel.1.enter.shift.weight",
    "update": "update.velocity.weight",
}
"""Every graph that has weights, and one of them."""


def verified(
    run_command: RunCommand, bundle: Path, *arguments: object
) -> tuple[list[str], list[str]]:
    """Names of what a verification compared, and of what it found wrong."""
    code, out, err = run_command(main, bundle, "--json", "--quiet", *arguments)
    result: Fields = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    wrong = [each["name"] for each in result["comparisons"] if not each["passed"]]
    assert (code, err) == (1 if wrong else 0, "")
    assert result["passed"] is (not wrong)
    return [each["name"] for each in result["comparisons"]], wrong


def failures(run_command: RunCommand, bundle: Path, *arguments: object) -> list[str]:
    return verified(run_command, bundle, *arguments)[1]


def graphs_of(names: list[str]) -> set[str]:
    """The first words of names such as "image.0 q.0"."""
    return {name.partition(" ")[0] for name in names}


def outputs_of(bundle: Path) -> list[str]:
    """Every output of every instruction, in the order they run, from the manifest itself."""
    program: Fields = json.loads((bundle / "manifest.json").read_text())["program"]
    names: list[str] = []
    for section in ("prologue", "timestep", "step", "image", "image_bytes"):
        for each in program[section]:
            if "noise" in each:
                names.append(each["graph"])
            for operand in each.get("outputs", {}).values():
                buffer = operand if isinstance(operand, str) else operand["buffer"]
                names.append(f"{each['run']} {buffer}")
    return names


# What is right


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_an_intact_bundle_passes(
    golden_bundle: Path, run_command: RunCommand, backend: str
) -> None:
    code, out, err = run_command(main, golden_bundle, "--backend", backend, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    result: Fields = json.loads(out)
    comparisons: list[Fields] = result.pop("comparisons")
    assert result == {
        "bundle": str(golden_bundle),
        "backend": backend,
        "precision": "fp32",
        "size": [96, 64],
        "tolerance": 1e-4,
        "passed": True,
    }
    names = [each["name"] for each in comparisons]
    sampler = ["schedule 1", "schedule 2", "schedule 4", "table modulation", "table time_embedding"]
    assert names == [*sampler, *outputs_of(golden_bundle), "whole decode"]
    assert {*read_manifest(golden_bundle).graphs} <= graphs_of(names)
    for each in comparisons:
        assert each["passed"] is True
        assert 0 <= each["max_abs_error"] == each["percentiles"][-1] <= 1e-4
        assert each["percentiles"] == sorted(each["percentiles"])
        # of order 1, or else an error of 1e-4 would say nothing
        assert 0.1 < each["scale"] < (2 if "bytes" not in each["name"] else 255)


def test_text_says_the_same(golden_bundle: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command(main, golden_bundle, "--size", "64x128")
    header, *lines, summary = out.splitlines()
    assert code == 0
    assert header.split() == ["output", "median", "p90", "p99", "max", "rms"]
    assert all(line.startswith("ok   ") for line in lines)
    listed = [line[5:37].rstrip() for line in lines]
    assert listed[-1] == "whole decode" and set(outputs_of(golden_bundle)) <= set(listed)
    assert summary == (
        "passed: 64x128, fp32, onnxruntime, tolerance 1e-04 x rms (at least 1) of the reference"
    )


def test_chunks_another_shape_and_another_seed(
    chunked_bundle: Path, run_command: RunCommand
) -> None:
    assert (
        failures(run_command, chunked_bundle, "--size", "96X128", "--seed", 5, "--backend", "torch")
        == []
    )


# How an error is judged


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
    small = np.full(100, -0.08, np.float32)
    assert not compare("x", small + 2e-4, small, 1e-4).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["got", "want", "both"])
def test_what_is_not_finite_does_not_pass(value: float, where: str) -> None:
    got, want = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    if where != "want":
        got[1, 2] = value
    if where != "got":
        want[1, 2] = value
    result = compare("x", got, want, math.inf)
    assert not result.passed and result.worst == (1, 2)
    assert result.max_abs_error == math.inf and result.percentiles == (math.inf,) * 4


# Weights altered on the disk, with hashes that fit


def turn(values: NDArray[np.float32]) -> None:
    values[:] *= -1


def nudge(values: NDArray[np.float32]) -> None:
    values.reshape(-1)[0] += 0.05


def transpose(values: NDArray[np.float32]) -> None:
    values[:] = values.swapaxes(0, 1).copy()


def spoil(values: NDArray[np.float32]) -> None:
    values.reshape(-1)[-1] = math.nan


def test_the_weights_below_are_of_every_graph(golden_bundle: Path) -> None:
    tensors = tensors_of(golden_bundle)
    assert set(WEIGHTS) == set(tensors)
    assert all(weight in tensors[graph] for graph, weight in WEIGHTS.items())


@pytest.mark.parametrize("graph", WEIGHTS)
def test_the_graph_with_the_fault_is_named(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand, graph: str
) -> None:
    altered = alter(golden_bundle, tmp_path, {WEIGHTS[graph]: turn})
    wrong = failures(run_command, altered, "--backend", "torch")
    assert wrong[0].startswith(f"{graph} ") and wrong[-1] == "whole decode"
    assert graphs_of(wrong) == {graph, "whole"}


def test_small_faults_in_the_graphs_themselves(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """Of several faults every one is found, as each graph gets what it should."""
    changes: dict[str, Change] = {
        "latent.conv_mid.weight": transpose,
        "image.3.leave.w2.weight": nudge,
        "pixel.0.enter.shift.bias": nudge,
    }
    wrong = failures(run_command, alter(golden_bundle, tmp_path, changes))
    assert graphs_of(wrong) == {"latent", "image.3", "pixel.0", "whole"}


def test_every_tensor_counts(golden_bundle: Path, tmp_path: Path) -> None:
    """The sign of any one tensor, turned, is seen in its graph: tried on one of each graph."""
    manifest, times = read_manifest(golden_bundle), list(timesteps(4))
    inputs = verify.random_inputs(manifest, 64, 32, 0, len(times) - 1)
    net = verify.reference_network(manifest, None)
    values, sizes = verify.stage_values(manifest, net, inputs, times)
    tensors = tensors_of(golden_bundle)
    for i in range(max(map(len, tensors.values()))):
        turned = {graph: keys[i] for graph, keys in tensors.items() if i < len(keys)}
        altered = alter(golden_bundle, tmp_path, dict.fromkeys(turned.values(), turn))
        with Bundle.open(altered, "torch", manifest=manifest, verify=False) as bundle:
            comparisons = verify.verify_stages(bundle, values, sizes)
            wrong = graphs_of([each.name for each in comparisons if not each.passed])
        assert wrong == set(turned), turned


def test_every_graph_of_a_lean_engine_set_is_compared(
    edit_bundle: EditBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its program keeps only slices of what they write."""
    bundle, gpu = edit_bundle(), Gpu()
    plain = read_manifest(bundle, verify=False)
    add_engines(bundle, "lean", is_lean=True)
    library = fake_tensorrt(gpu, bundle, FakeRtxEngine)
    install(monkeypatch, {**fake_cuda(gpu), "tensorrt_rtx": library})
    manifest, times = read_manifest(bundle, verify=False), list(timesteps(4))
    inputs = verify.random_inputs(manifest, 64, 96, 0, len(times) - 1)
    net = verify.reference_network(manifest, None)
    values, sizes = verify.stage_values(manifest, net, inputs, times)
    with Bundle.open(bundle, "tensorrt", manifest=manifest) as opened:
        comparisons = list(verify.verify_stages(opened, values, sizes))
        assert [each for each in comparisons if not each.passed] == []
        assert graphs_of([each.name for each in comparisons]) == set(plain.graphs)
        with opened.decoder() as decoder:
            want = verify.reference_image(manifest, net, inputs, times)
            assert verify.verify_decode(decoder, inputs, times, want).passed
    assert not gpu.memory


def test_a_fault_that_no_image_shows(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """With queries and keys both turned, attention is what it was."""
    altered = alter(golden_bundle, tmp_path, {"pixel.1.enter.enter.rope.weight": turn})
    wrong = failures(run_command, altered, "--backend", "torch")
    assert wrong == ["pixel.1 pixel_q.1", "pixel.1 pixel_k.1"]


def test_tables_of_times_that_are_not_visited(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """Stages run at the first time and the decode at those of four steps, not at that of one."""
    schedules = read_manifest(golden_bundle).sampler.schedules

    def change(rows: NDArray[np.float32]) -> None:
        turn(rows[row])

    row = schedules["4"][2]
    later = alter(golden_bundle, tmp_path, {"table.modulation": change})
    assert failures(run_command, later, "--backend", "torch") == [
        "table modulation",
        "whole decode",
    ]
    row = schedules["1"][0]
    assert row not in schedules["4"]
    changes: dict[str, Change] = {"table.modulation": change, "table.time_embedding": change}
    unused = alter(golden_bundle, tmp_path, changes)
    assert failures(run_command, unused, "--backend", "torch") == [
        "table modulation",
        "table time_embedding",
    ]


def test_nan_fails(golden_bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    altered = alter(golden_bundle, tmp_path, {"update.velocity.bias": spoil})
    code, out, _ = run_command(main, altered)
    assert code == 1 and out.splitlines()[-1].startswith("FAILED: 96x64, fp32, onnxruntime, ")
    failed = [line for line in out.splitlines() if not line.startswith("ok ")][1:-1]
    assert [line[5:37].rstrip() for line in failed] == ["update next_state", "whole decode"]
    for line in failed:
        assert line.startswith("FAIL ") and line.split()[-5:-1] == ["inf"] * 4
    code, out, _ = run_command(main, altered, "--backend", "torch", "--json")
    result: Fields = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    last = result["comparisons"][-1]
    assert code == 1 and result["passed"] is False
    assert (last["passed"], last["max_abs_error"], last["percentiles"]) == (False, None, [None] * 4)


def test_nan_in_a_table_and_in_the_prologue_fails(
    golden_bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    def change(rows: NDArray[np.float32]) -> None:
        spoil(rows[read_manifest(golden_bundle).sampler.schedules["1"][0]])

    changes = {"table.modulation": change, "caption.norm": spoil}
    altered = alter(golden_bundle, tmp_path, changes)
    wrong = failures(run_command, altered, "--backend", "torch")
    assert wrong == ["table modulation", "caption y.0", "whole decode"]


# Programs that do something else


def step_of(fields: Fields, graph: str) -> Fields:
    """The first instruction of a step that runs a graph."""
    return next(each for each in fields["program"]["step"] if each.get("run") == graph)


def swap(graph: str, ports: str, first: str, second: str) -> Edit:
    def edit(fields: Fields) -> None:
        operands = step_of(fields, graph)[ports]
        operands[first], operands[second] = operands[second], operands[first]

    return edit


def modulate_as_the_text(fields: Fields) -> None:
    step_of(fields, "image.2")["inputs"]["modulation"]["start"][1] = 1


def turn_the_text_faster(fields: Fields) -> None:
    for part in ("cos", "sin"):
        fields["buffers"][f"text_rope_{part}"]["source"]["theta"] = 100.0


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (swap("attention", "inputs", "q", "k"), ["attention attended.0"]),
        (swap("pixel_attention", "inputs", "k", "v"), ["pixel_attention pixel_attended.0"]),
        (swap("text.1", "outputs", "q", "k"), ["text.1 k.1", "text.1 q.1"]),
        (swap("image.1", "inputs", "rope_cos", "rope_sin"), ["image.1 q.1", "image.1 k.1"]),
        (swap("update", "inputs", "noise", "state"), ["update next_state"]),
        (modulate_as_the_text, [f"image.2 {name}.2" for name in "xqkv"]),
        # the last block has no queries of the text
        (
            turn_the_text_faster,
            [*(f"text.{i} {n}.{i}" for i in range(3) for n in "qk"), "text.3 k.3"],
        ),
    ],
)
def test_other_operands(
    edit_bundle: EditBundle, run_command: RunCommand, edit: Edit, wrong: list[str]
) -> None:
    found = failures(run_command, edit_bundle(edit), "--backend", "torch")
    assert found == [*wrong, "whole decode"]


def put_two_in_one_place(fields: Fields) -> None:
    offsets = fields["buckets"]["tiny"]["offsets"]
    offsets["y.0"] = offsets["latent_tokens"]


@pytest.mark.parametrize(
    "edit",
    [
        # the memory of the stages holds this noise, but the decode must not find it there
        pytest.param(lambda fields: fields["program"]["prologue"].pop(), id="no first noise"),
        pytest.param(lambda fields: fields["program"]["step"].pop(-3), id="no noise"),
        pytest.param(lambda fields: fields["program"]["step"].pop(), id="no copy of the state"),
        pytest.param(
            lambda fields: fields["program"]["step"].remove(step_of(fields, "text.3")), id="no text"
        ),
        pytest.param(put_two_in_one_place, id="two in one place"),
    ],
)
def test_only_the_whole_decode_shows_it(
    edit_bundle: EditBundle, run_command: RunCommand, edit: Edit
) -> None:
    """Every stage that runs is right: what is wrong is what happens between them."""
    found = failures(run_command, edit_bundle(edit), "--backend", "torch")
    assert found == ["whole decode"]


def test_outputs_that_nothing_reads_are_compared(
    edit_bundle: EditBundle, run_command: RunCommand
) -> None:
    """Neither is part of the decode to a float image."""

    def edit(fields: Fields) -> None:
        extra = {"run": "patchify", "inputs": {"image": "image"}, "outputs": {"tokens": "noise"}}
        fields["program"]["image"].append(extra)
        fields["program"]["image_bytes"][0]["inputs"]["tokens"] = "next_state"

    compared, wrong = verified(run_command, edit_bundle(edit), "--backend", "torch")
    assert compared[-3:] == ["patchify noise", "unpatchify_bytes image_bytes", "whole decode"]
    assert wrong == ["patchify noise", "unpatchify_bytes image_bytes"]


def test_what_a_graph_does_not_write_fails(
    edit_bundle: EditBundle, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the right values were left by an earlier run: every second run does nothing."""

    def edit(fields: Fields) -> None:
        for section, index in (("prologue", 1), ("image_bytes", 0)):
            again = fields["program"][section][index]
            twice.append(again["run"])
            fields["program"][section].insert(index, again)

    def bind(graphs: TorchGraphs, graph: str, tensors: Any, scratch: Any) -> Callable[[], None]:
        bound.append(graph)
        idle = graph in twice and bound.count(graph) % 2 == 0
        return (lambda: None) if idle else real(graphs, graph, tensors, scratch)

    twice: list[str] = []
    bound: list[str] = []
    real = TorchGraphs.bind
    monkeypatch.setattr(TorchGraphs, "bind", bind)
    found = failures(run_command, edit_bundle(edit), "--backend", "torch")
    assert twice == ["caption", "unpatchify_bytes"]
    assert found == ["caption y.0", "unpatchify_bytes image_bytes"]


def test_schedules_are_those_of_the_student(
    edit_bundle: EditBundle, run_command: RunCommand
) -> None:
    """The decode visits the same times on both sides, so it cannot tell."""
    others = {"1": [1], "2": [1, 2], "4": [0, 2, 3, 4]}
    bundle = edit_bundle(lambda fields: fields["sampler"].update(schedules=others))
    found = failures(run_command, bundle, "--backend", "torch")
    assert found == ["schedule 1", "schedule 2", "schedule 4"]


# What is refused


def test_one_thing_at_a_time(golden_bundle: Path, refusal: Refusal) -> None:
    assert "BUNDLE or --golden FILE, but got neither" in refusal(main)
    golden = GOLDEN / "flux_2k.safetensors"
    assert "but got both" in refusal(main, golden_bundle, "--golden", golden)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--backend", "tensorflow"], "a backend of onnxruntime, "),
        (["--device", "nosuch"], "providers"),
        (["--device", "cpu:x"], "a device such as cuda:0"),
        (["--backend", "torch", "--device", "nosuch"], "a device torch can use"),
        (["--seed", "-1"], "a whole number from 0 to 2^64 - 1, but got '-1'"),
        (["--seed", "one"], "a whole number from 0 to 2^64 - 1, but got 'one'"),
        (["--size", ""], "a size such as 512x512, but got ''"),
        (["--size", "big"], "a size such as 512x512"),
        (["--size", "64"], "a size such as 512x512"),
        (["--size", "64x"], "a size such as 512x512"),
        (["--size=-64x64"], "a size such as 512x512"),
        (["--size", "64x64x64"], "a size such as 512x512"),
        (["--size", "64x6\u0664"], "a size such as 512x512"),
        (["--size", f"{'9' * 5000}x64"], "a size such as 512x512"),
        (["--size", "0x64"], "multiples of 32, but got 0x64; 32x64"),
        (["--size", "100x64"], "multiples of 32, but got 100x64; 96x64"),
        (["--size", "1024x1024"], "at most 0.262 megapixels"),
        (["--size", "99999968x99999968"], "at most 0.262 megapixels"),
        (["--checkpoint", "model.pth"], "no checkpoint, as this bundle's weights are random"),
    ],
)
def test_arguments(golden_bundle: Path, refusal: Refusal, arguments: list[str], part: str) -> None:
    assert part in refusal(main, golden_bundle, *arguments)


def save_checkpoint(path: Path, config: PidConfig, seed: int) -> Path:
    source = RandomWeights(state_shapes(config), seed)
    torch.save({f"net.{name}": source[name] for name in source}, path)
    return path


@pytest.fixture
def checkpoint(golden_bundle: Path, tmp_path: Path) -> Path:
    """A file with the weights of `golden_bundle`."""
    manifest = read_manifest(golden_bundle)
    seed: int = manifest.model["weights"]["random_seed"]
    return save_checkpoint(tmp_path / "checkpoint.pth", config_of(manifest.network), seed)


@pytest.fixture
def from_checkpoint(edit_bundle: EditBundle, checkpoint: Path) -> Path:
    """The same bundle, as if it was exported from that file."""
    origin = {
        "file": checkpoint.name,
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    }
    return edit_bundle(lambda fields: fields["model"].update(weights=origin))


def test_a_bundle_of_a_checkpoint(
    from_checkpoint: Path, checkpoint: Path, run_command: RunCommand
) -> None:
    arguments = ("--checkpoint", checkpoint, "--backend", "torch")
    assert failures(run_command, from_checkpoint, *arguments) == []


def test_the_hubs_cache_is_looked_in(
    from_checkpoint: Path,
    checkpoint: Path,
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = find_checkpoint("flux", "2k")
    manifest = from_checkpoint / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["model"]["checkpoint"] = released.name
    manifest.write_text(json.dumps(fields))
    repository = tmp_path / "models--nvidia--PiD"
    file = repository / "snapshots" / "0123" / released.hub_path
    file.parent.mkdir(parents=True)
    file.symlink_to(checkpoint)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert failures(run_command, from_checkpoint, "--backend", "torch") == []


def test_a_missing_checkpoint(from_checkpoint: Path, refusal: Refusal, tmp_path: Path) -> None:
    text = refusal(main, from_checkpoint)
    assert "made from, checkpoint.pth, but got none; add --checkpoint PATH" in text
    for path, part in (
        (tmp_path / "none.pth", f"no file at {tmp_path / 'none.pth'}"),
        (tmp_path, f"no model_ema_bf16.pth in the folder {tmp_path}"),
    ):
        assert part in refusal(main, from_checkpoint, "--checkpoint", path)


def test_another_checkpoint(from_checkpoint: Path, refusal: Refusal, tmp_path: Path) -> None:
    config = config_of(read_manifest(from_checkpoint).network)
    for other in (
        save_checkpoint(tmp_path / "values.pth", config, 1),
        save_checkpoint(tmp_path / "dimensions.pth", replace(config, hidden_size=128), 0),
        save_checkpoint(tmp_path / "depth.pth", replace(config, patch_depth=3), 0),
        from_checkpoint / "manifest.json",
    ):
        text = refusal(main, from_checkpoint, "--checkpoint", other)
        assert f"checkpoint.pth, but got other contents in {other}; pass that file" in text


def test_weights_that_are_not_the_checkpoints(
    edit_bundle: EditBundle, checkpoint: Path, run_command: RunCommand
) -> None:
    """The hash is that of the file, but the bundle was not made from it."""
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)
    head = "net.final_layer.linear.weight"
    torch.save(state | {head: -state[head]}, checkpoint)
    origin = {"file": "other", "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    bundle = edit_bundle(lambda fields: fields["model"].update(weights=origin))
    wrong = failures(run_command, bundle, "--checkpoint", checkpoint, "--backend", "torch")
    assert wrong == ["update next_state", "whole decode"]


@pytest.mark.parametrize(
    "origin",
    [
        None,
        {},
        "somewhere",
        {"random_seed": "7"},
        {"random_seed": None},
        {"file": "model.pth"},
        {"sha256": "0" * 64},
        {"file": 3, "sha256": 4},
    ],
)
def test_weights_of_unknown_origin(
    edit_bundle: EditBundle, refusal: Refusal, checkpoint: Path, origin: object
) -> None:
    bundle = edit_bundle(lambda fields: fields["model"].update(weights=origin))
    for arguments in ([], ["--checkpoint", checkpoint]):
        assert "says where its weights came from" in refusal(main, bundle, *arguments)


def rename_a_buffer(fields: Fields) -> None:
    renamed = json.loads(json.dumps(fields).replace('"y.1"', '"why"'))
    fields.clear()
    fields.update(renamed)


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda fields: fields["network"].pop("latent_interval"), "'latent_interval' among"),
        (lambda fields: fields["network"].update(num_heads=0), "num_heads to be an integer"),
        (lambda fields: fields["network"].update(num_heads="2"), "num_heads to be an integer"),
        (lambda fields: fields["network"].update(hidden_size=128), "but got 'attended.0' of 2304"),
        (lambda fields: fields["network"].update(patch_depth=3), "but got 'attended.2' of 2304"),
        (lambda fields: fields["network"].update(patch_depth=5), "but got 'attended.3' of 1536"),
        (rename_a_buffer, "but got 'why' of 768 values"),
        (lambda fields: fields["program"].update(image_bytes=[]), "a graph that writes 'image_by"),
        (swap("image.0", "inputs", "x", "latent_tokens"), "inside buffer"),
    ],
)
def test_programs_of_another_network(
    edit_bundle: EditBundle, refusal: Refusal, edit: Edit, part: str
) -> None:
    assert part in refusal(main, edit_bundle(edit))


def test_what_is_no_bundle(
    golden_bundle: Path, refusal: Refusal, tmp_path: Path, edit_bundle: EditBundle
) -> None:
    for path in (tmp_path, tmp_path / "none", golden_bundle / "weights.safetensors"):
        text = refusal(main, path)
        assert "expected a bundle (a folder with manifest.json)" in text and str(path) in text
    bundle = edit_bundle()
    (bundle / "manifest.json").write_text("{}")
    assert "expected a pid-bundle manifest" in refusal(main, bundle)


def test_altered_files(edit_bundle: EditBundle, refusal: Refusal) -> None:
    bundle = edit_bundle()
    for name in ("weights.safetensors", "caption.onnx"):
        file = bundle / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        text = refusal(main, bundle)
        assert f"{file} was altered" in text and "export or copy the bundle again" in text
        file.write_bytes(content[:-1])
        assert f"expected {file} to have {len(content)} bytes" in refusal(main, bundle)
        file.unlink()
        assert f"has no file {name}" in refusal(main, bundle)
        file.write_bytes(content)


def test_a_graph_that_is_none(edit_bundle: EditBundle, refusal: Refusal) -> None:
    content = b"no graph"

    def edit(fields: Fields) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        fields["files"]["caption.onnx"] = {"bytes": len(content), "sha256": sha256}

    bundle = edit_bundle(edit)
    (bundle / "caption.onnx").write_bytes(content)
    assert "cannot load caption.onnx" in refusal(main, bundle)
