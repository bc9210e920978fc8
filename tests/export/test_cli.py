"""`pid-export` as a user meets it: what it writes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pid_export import bundle, cli, graphs, verify_cli
from pid_export.bundle import config_of, dimensions_of, network_of, parse_buckets, weight_slots
from pid_export.cli import main
from pid_export.errors import ExportInputError
from pid_export.graphs import ExportError, GraphExporter, Placed, check_graph
from pid_export.program import GraphSpec, build_program
from pid_export.verify import load_network
from pid_export.weights_file import WeightsWriter
from pid_ref.checkpoint import state_shapes
from pid_ref.config import PidConfig
from pid_ref.registry import CHECKPOINTS, NANO, Checkpoint, find_checkpoint
from pid_ref.sampler import sample
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import FlowShift, Manifest
from pid_runtime.decoder import Decoder
from places import GOLDEN
from small_network import DIMENSIONS

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
Edit = Callable[[onnx.ModelProto], object]

SEED = 7
BUCKETS = "tiny=64,small=1024"


def reduced(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, **DIMENSIONS))


FLUX = reduced(find_checkpoint("flux", "2k"))


class Export(NamedTuple):
    """The command with its inputs in place."""

    folder: Path
    run_command: RunCommand
    refusal_of: Refusal

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def config(self) -> Path:
        path = self.folder / "config.json"
        path.write_text(json.dumps(DIMENSIONS))
        return path

    @property
    def network(self) -> list[object]:
        return ["--config", self.config, "--buckets", BUCKETS]

    @property
    def random(self) -> list[object]:
        return [*self.network, "--random-weights", SEED]

    def run(self, *arguments: object, output: str = "bundle") -> Manifest:
        """An export without complaint."""
        path = self.folder / output
        code, _, err = self.run_command(main, *arguments, "--quiet", "-o", path)
        assert (code, err) == (0, "")
        assert sorted(path.iterdir()) == sorted(
            [*(path / name for name in read_manifest(path).files), path / "manifest.json"]
        )
        return read_manifest(path)

    def refusal(self, *arguments: object, output: Path | None = None) -> str:
        """The one line of an export that was refused, and left everything as it was."""
        before = tree(self.folder)
        text = self.refusal_of(main, *arguments, "-o", output or self.bundle)
        assert text.startswith("pid-export: expected ") and ", but " in text
        assert tree(self.folder) == before
        return text

    def verify(self, backend: str, *arguments: object) -> None:
        code, out, _ = self.run_command(
            verify_cli.main, self.bundle, "--backend", backend, "--quiet", *arguments
        )
        assert code == 0, out


@pytest.fixture
def export(tmp_path: Path, run_command: RunCommand, refusal: Refusal) -> Export:
    export = Export(tmp_path, run_command, refusal)
    assert export.config.exists()
    return export


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def official(folder: Path) -> Path:
    """A `.pth` as the hub has them, of the network of `DIMENSIONS`."""
    source = RandomWeights(state_shapes(FLUX.config), SEED)
    path = folder / "weights.pth"
    torch.save({f"net.{name}": source[name].bfloat16() for name in source}, path)
    return path


# What is written


def test_a_small_network(export: Export) -> None:
    code, out, _ = export.run_command(main, *export.random, "-o", export.bundle, "--json")
    result, manifest = json.loads(out), read_manifest(export.bundle)
    assert code == 0
    assert result["bundle"] == str(export.bundle)
    assert result["bytes"] == sum(file.bytes for file in manifest.files.values())
    assert result["graphs"] == len(manifest.graphs)
    assert result["arena_bytes"].keys() == {"tiny", "small"}
    assert 0 < result["seconds"] < 600 and result["peak_rss_bytes"] > 1e8
    assert manifest.model["name"] == "custom"
    assert manifest.model["weights"] == {"random_seed": SEED}
    assert config_of(manifest.network) == FLUX.config
    assert manifest.sampler.steps == 4 and manifest.precision == "fp32"
    export.verify("onnxruntime")
    export.verify("torch", "--size", "256x32", "--seed", 3)


def test_a_small_network_of_a_space(export: Export) -> None:
    weights = official(export.folder)
    network = ["--space", "flux", "--variant", "2k", *export.network]
    manifest = export.run(*network, "--random-weights", SEED)
    assert config_of(manifest.network) == FLUX.config
    assert manifest.model["name"] == "custom flux 2k (v1)"
    assert manifest.model["space"] == "flux" and manifest.model["token_width"] == 64
    assert not {"checkpoint", "weights_license"} & manifest.model.keys()
    manifest = export.run(*network, "--checkpoint", weights, output="real")
    assert manifest.model["weights"]["file"] == "weights.pth"
    assert "non-commercial" in manifest.model["weights_license"]
    assert "expected weights with --config" in export.refusal(*network, output=export.folder / "x")
    v1pt5 = ["--space", "flux", "--variant", "2kto4k", *export.network, "--random-weights", SEED]
    assert config_of(export.run(*v1pt5, output="v1pt5").network).latent_gate == "token"


def test_the_same_twice_is_the_same_bundle(export: Export) -> None:
    export.run(*export.random)
    export.run(*export.random, output="again")
    assert tree(export.bundle) == tree(export.folder / "again")


def test_a_checkpoint_and_its_repackaging(export: Export) -> None:
    file = official(export.folder)
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    repack = export.folder / "repack.safetensors"
    save_file({name.removeprefix("net."): tensor for name, tensor in state.items()}, repack)
    first = export.run(*export.network, "--checkpoint", file)
    second = export.run(*export.network, "--checkpoint", repack, output="second")
    assert first.model["weights"]["file"] == "weights.pth"
    assert second.model["weights"]["file"] == "repack.safetensors"
    assert first.files == second.files and first.graphs == second.graphs
    names = set(tree(export.bundle)) - {"manifest.json"}
    for name in names:
        assert (export.bundle / name).read_bytes() == (export.folder / "second" / name).read_bytes()
    export.verify("onnxruntime", "--checkpoint", file)


def test_a_folder_with_the_official_file(export: Export) -> None:
    folder = export.folder / "PiD_res2k_sr4x_official_flux_distill_4step"
    folder.mkdir()
    official(export.folder).rename(folder / "model_ema_bf16.pth")
    manifest = export.run(*export.network, "--checkpoint", folder)
    assert manifest.model["weights"]["file"] == "model_ema_bf16.pth"
    export.verify("torch", "--checkpoint", folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(export: Export, precision: str) -> None:
    # One block alone is first and last at once.
    shallow = export.folder / "shallow.json"
    shallow.write_text(json.dumps(asdict(NANO.config) | {"patch_depth": 1}))
    how = ["--random-weights", SEED, "--buckets", BUCKETS, "--precision", precision]
    manifest = export.run("--config", shallow, *how)
    assert manifest.precision == precision
    dtype = {"fp16": "F16", "bf16": "BF16"}[precision]
    with safe_open(export.bundle / "weights.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            entry = weights.get_slice(name)
            matrix = len(entry.get_shape()) > 1 and name.endswith("weight")
            if matrix and not name.endswith(("rope.weight", "velocity.weight")):
                assert entry.get_dtype() == dtype
    check_files(export.bundle)
    export.verify("torch")
    if precision == "fp16":
        export.verify("onnxruntime")
    else:
        text = export.refusal_of(verify_cli.main, export.bundle, "--backend", "onnxruntime")
        assert "no bf16 kernels" in text


@pytest.mark.parametrize("steps", [1, 2])
def test_default_steps(export: Export, steps: int) -> None:
    manifest = export.run(*export.random, "--steps", steps)
    assert manifest.sampler.steps == steps
    assert sorted(manifest.sampler.schedules) == ["1", "2", "4"]
    shown: list[tuple[int, int]] = []
    with Decoder.open(export.bundle) as pid:
        pid.decode(np.zeros((1, 16, 1, 1)), progress=lambda *done: shown.append(done))
    assert shown == [(step + 1, steps) for step in range(steps)]


def test_arbitrary_timesteps(export: Export) -> None:
    manifest = export.run(*export.random, "--arbitrary-timesteps")
    assert manifest.sampler.times == () and "timestep" in manifest.graphs
    check_files(export.bundle)
    export.verify("onnxruntime")
    net = load_network(FLUX.config, RandomWeights(state_shapes(FLUX.config), SEED))
    times = [1.0, 0.93, 0.7, 0.55, 0.3, 0.1, 0.0]
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((2, 16, 2, 1), np.float32)
    caption = rng.standard_normal((2, 7, 32), np.float32)
    sigma = np.array([0.0, 0.5], np.float32)
    noises = [rng.standard_normal((2, 3, 64, 32), np.float32) for _ in range(6)]
    z, y, s, first, *later = map(torch.from_numpy, (latent, caption, sigma, *noises))
    for rule in ("sde", "ode"):
        want = sample(net, z, y, s, first, later, times=times, rule=rule).clamp(-1, 1)
        for backend in ("onnxruntime", "torch"):
            with Decoder.open(export.bundle, backend) as pid:
                got = pid.decode(
                    latent,
                    caption,
                    sigma=sigma,
                    noise=noises[0],
                    step_noise=noises[1:],
                    times=times,
                    rule=rule,
                )
            assert np.abs(got - want.numpy()).max() <= 1e-4


@pytest.fixture
def reduced_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command think that the released networks are small."""
    monkeypatch.setattr(cli, "find_checkpoint", lambda *names: reduced(find_checkpoint(*names)))


def _first_of_their_kind() -> Iterator[str]:
    seen: set[tuple[PidConfig, bool]] = set()
    for checkpoint in CHECKPOINTS.values():
        kind = (checkpoint.config, checkpoint.distilled)
        if kind not in seen:
            yield checkpoint.name
        seen.add(kind)


FIRST_OF_THEIR_KIND = frozenset(_first_of_their_kind())


@pytest.mark.usefixtures("reduced_registry")
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=lambda c: c.name)
def test_every_checkpoint(export: Export, checkpoint: Checkpoint) -> None:
    names = ["--space", checkpoint.space.names[-1], "--variant", checkpoint.variant]
    arguments = [*names, "--random-weights", SEED, "--buckets", BUCKETS]
    manifest = export.run(*arguments)
    sampler = manifest.sampler
    if checkpoint.distilled:
        assert (sampler.steps, sampler.rule, sampler.guidance) == (4, "sde", 1)
    else:
        assert (sampler.steps, sampler.rule, sampler.guidance) == (25, "dpm++2m", 5)
        assert sampler.times == () and sampler.flow_shift == FlowShift(6.0, 2048)
    model = manifest.model
    assert model["checkpoint"] == checkpoint.name and model["version"] == checkpoint.version
    assert model["space"] == checkpoint.space.name and model["variant"] == checkpoint.variant
    assert model["latent_convention"] == checkpoint.space.convention
    assert model["distilled"] == checkpoint.distilled
    assert "weights_license" not in model
    ours = checkpoint is NANO
    assert (model["trained_sizes"] == []) == (not model["captioned"]) == ours
    assert (manifest.codec is not None) == ours
    assert config_of(manifest.network) == reduced(checkpoint).config
    if checkpoint.name in FIRST_OF_THEIR_KIND:
        check_files(export.bundle)
        multiple = checkpoint.config.size_multiple
        export.verify("onnxruntime", "--size", f"{2 * multiple}x{multiple}")


def test_kinds_of_checkpoints() -> None:
    assert len(CHECKPOINTS) == 17 and len(FIRST_OF_THEIR_KIND) == 10


# Graphs


SYMBOLS: dict[str, Mapping[str, Sequence[str]]] = {
    "latent": {"latent": "Bhw", "latent_tokens": ["B", "Hs", "Ws"]},
    "caption": {"caption": "BT", "y": "BT"},
    "text": {"x": "BT", "attended": "BT", "next_x": "BT", "q": "BT", "k": "BT", "v": "BT"},
    "image": {"x": "BL", "attended": "BL", "next_x": "BL", "q": "BL", "k": "BL", "v": "BL"},
    "attention": {"q": "BQ", "k": "BS", "v": "BS", "attended": "BQ"},
    "pixel_attention": {"q": "BQ", "k": "BS", "v": "BS", "attended": "BQ"},
    "pixel": dict.fromkeys(("x", "attended", "state", "s", "pixels", "q", "k", "v"), "BL"),
    "update": dict.fromkeys(("attended", "state", "s", "pixels", "noise", "next_state"), "BL"),
    "patchify": {"image": ["B", "Hs", "Ws"], "tokens": ["B", "Hs", "Ws"]},
    "unpatchify": {"image": ["B", "Hs", "Ws"], "tokens": ["B", "Hs", "Ws"]},
    "unpatchify_bytes": {"image": ["B", "Hs", "Ws"], "tokens": ["B", "Hs", "Ws"]},
    "timestep": {"timestep": "", "modulation": "", "time_embedding": ""},
}
"""The symbolic axes of every port, by graph (`text.3` is a text)."""

COMMON = {
    "modulation": "",
    "time_embedding": "",
    "update": "",
    "sigma": "B",
    "latent_tokens": "BL",
    "pixel_columns": "L",
    "pixel_rows": "L",
}


def wanted_symbols(graph: str, port: str) -> list[str]:
    kind = graph.partition(".")[0]
    if port.startswith("rope_"):
        return ["T"] if kind == "text" else ["L"]
    return list(SYMBOLS[kind][port] if port in SYMBOLS[kind] else COMMON[port])


def check_files(bundle: Path) -> None:
    """Check a bundle's graphs as they are on the disk: symbols, validity, weights stored once."""
    manifest = read_manifest(bundle, verify=False)
    with safe_open(bundle / "weights.safetensors", "pt") as weights:
        stored = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    offsets = data_offsets(bundle)
    used = {name for name in stored if name.startswith("table.")}
    for name, graph in manifest.graphs.items():
        path = bundle / graph.file
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            symbols = [dim.dim_param for dim in dims if dim.dim_param]
            assert symbols == wanted_symbols(name, value.name), (name, value.name)
            assert all(dim.dim_param or dim.dim_value > 0 for dim in dims)
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= 1 << 16
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            key = f"{name}.{tensor.name}"
            assert place["location"] == "weights.safetensors"
            assert (int(place["offset"]), int(place["length"])) == offsets[key]
            assert list(tensor.dims) == stored[key]
            assert key not in used
            used.add(key)
        assert path.stat().st_size < 1 << 18
    assert used == set(stored)
    ends = 0
    for begin, length in sorted(offsets.values()):
        assert begin == ends or ends == 0  # nothing overlaps and nothing is left over
        ends = begin + length
    assert ends == (bundle / "weights.safetensors").stat().st_size


def data_offsets(bundle: Path) -> dict[str, tuple[int, int]]:
    """Offset in the file and bytes of every tensor, from the safetensors header."""
    with (bundle / "weights.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__")
    return {
        name: (
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


@pytest.mark.parametrize("name", ["golden_bundle", "free_bundle"])
def test_files_are_valid_and_symbolic(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # A copy: onnx takes hard links, which pid-triton makes of the bundle, for an attack.
    check_files(shutil.copytree(request.getfixturevalue(name), tmp_path / name))


def graph_of(bundle: Path, name: str) -> tuple[onnx.ModelProto, GraphSpec]:
    manifest = read_manifest(bundle, verify=False)
    program = build_program(config_of(manifest.network), "fp32", len(manifest.sampler.times))
    content = (bundle / manifest.graphs[name].file).read_bytes()
    check_graph(name, content, program.graphs[name])
    return onnx.load_from_string(content), program.graphs[name]


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("latent", "latent"),
        ("latent", "latent_tokens"),
        ("caption", "y"),
        ("text.1", "k"),
        ("image.0", "x"),
        ("image.0", "sigma"),
        ("image.1", "q"),
        ("attention", "q"),
        ("attention", "v"),
        ("pixel.0", "pixel_rows"),
        ("pixel.1", "attended"),
        ("update", "next_state"),
        ("patchify", "image"),
    ],
)
def test_a_specialised_axis_is_an_error(golden_bundle: Path, name: str, port: str) -> None:
    model, spec = graph_of(golden_bundle, name)
    (value,) = (v for v in (*model.graph.input, *model.graph.output) if v.name == port)
    dims = value.type.tensor_type.shape.dim
    symbols = [axis for axis, dim in enumerate(dims) if dim.dim_param]
    for axis in symbols:
        symbol = dims[axis].dim_param
        dims[axis].dim_value = 60
        with pytest.raises(ExportError, match=f"expected {port} of shape"):
            check_graph(name, model.SerializeToString(), spec)
        dims[axis].dim_param = symbol
    check_graph(name, model.SerializeToString(), spec)


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def retype(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def invent_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def add_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(1 << 15, np.float32), "ballast")
    model.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (drop_output, "expected ports"),
        (retype, "is not float32"),
        (invent_operator, "NoSuchOperator"),
        (add_constant, "bytes of constants"),
    ],
)
def test_a_graph_unlike_its_manifest_is_an_error(
    golden_bundle: Path, edit: Edit, part: str
) -> None:
    model, spec = graph_of(golden_bundle, "image.1")
    edit(model)
    with pytest.raises((ExportError, onnx.checker.ValidationError), match=part):
        check_graph("image.1", model.SerializeToString(), spec)


@pytest.mark.parametrize(("version", "gigabytes"), [("v1", 1.84), ("v1.5", 1.94)])
def test_full_size_fits_the_budget(version: str, gigabytes: float) -> None:
    """The brief allows 1.95 GB in bf16; a plain export of v1 takes 2.68."""
    for checkpoint in CHECKPOINTS.values():
        if checkpoint.version != version or not checkpoint.distilled or checkpoint is NANO:
            continue
        slots = weight_slots(checkpoint.config, build_program(checkpoint.config, "bf16", 5), "bf16")
        size = sum(slot.bytes for slot in slots.values())
        assert gigabytes - 0.02 < size / 1e9 < gigabytes + 0.02 and size <= 1.95e9


# What is refused


def test_buckets() -> None:
    assert parse_buckets("2k,4k") == (("2k", 18816), ("4k", 65536))
    assert parse_buckets("3k") == (("3k", 36864),)
    assert parse_buckets("3k,a=5", 32) == (("3k", 9216), ("a", 5))  # as many pixels
    assert parse_buckets(" preview=1024 , 2k") == (("preview", 1024), ("2k", 18816))
    assert parse_buckets("2k=100,all=1048576") == (("2k", 100), ("all", 1 << 20))


NO_BUCKETS = """
5k 2k, 2k,2k a=1,a=2 a=0 a=-1 a=1.5 a= =5 a=1048577 2K é=5 a/b=5 ../a=5 a=² a=٣ 2k;4k
"""


@pytest.mark.parametrize("text", ["", "a b=5", "a=" + "9" * 5000, *NO_BUCKETS.split()])
def test_other_buckets_are_refused(export: Export, text: str) -> None:
    with pytest.raises(ExportInputError, match="expected"):
        parse_buckets(text)
    assert "bucket" in export.refusal("--config", export.config, "--buckets", text)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--space", "fluxx", "--variant", "2k"], "did you mean 'flux'?"),
        (["--space", "flux", "--variant", "8k"], "2k, 2kto4k"),
        (["--space", "dinov2", "--variant", "2kto4k"], "dinov2 was released in"),
        (["--space", "flux"], "a variant of flux (2k, 2kto4k, "),
        (["--variant", "2k"], "but got only --variant"),
        ([], "but got neither"),
        (["--space", "flux", "--variant", "2k", "--precision", "fp9"], "int8 or int8-fp32"),
        (["--space", "flux", "--variant", "2k", "--steps", "3"], "1, 2 or 4 steps, but got 3"),
        (["--space", "flux", "--variant", "2k", "--steps", "0"], "1, 2 or 4 steps, but got 0"),
    ],
)
def test_requests_that_make_no_sense(
    export: Export, arguments: list[str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pid_ref import hub

    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("nothing is to be downloaded"))
    assert part in export.refusal(*arguments)


@pytest.mark.parametrize(
    "what", [("--caption-encoder", "encoder"), ("--vae", "ae.safetensors", "--space", "flux")]
)
def test_options_of_decoders_are_of_nothing_else(
    what: tuple[str, ...], refusal: Refusal, tmp_path: Path
) -> None:
    for option in (
        ("--variant", "2k"),
        ("--config", "config.json"),
        ("--checkpoint", "model.pth"),
        ("--force-space",),
        ("--random-weights", 0),
        ("--buckets", "2k"),
        ("--steps", 4),
        ("--arbitrary-timesteps",),
    ):
        told = f"expected no {option[0]} with {what[0]}, but got one; drop it"
        assert told in refusal(main, *what, *option, "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_are_said_once(export: Export) -> None:
    file = official(export.folder)
    assert "got both" in export.refusal(*export.random, "--checkpoint", file)
    assert "got none" in export.refusal(*export.network)
    for seed in ("-1", 2**32):
        text = export.refusal(*export.network, "--random-weights", seed)
        assert "a seed in [0, 2^32)" in text


@pytest.mark.parametrize(
    "arguments", [["--random-weights", "x"], ["--steps", "two"], ["--no-such"], ["--config"]]
)
def test_arguments_that_cannot_be_read(export: Export, arguments: list[str]) -> None:
    text = export.refusal_of(main, *arguments, "-o", export.bundle)
    assert "try pid-export --help" in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("not JSON", "dimensions as JSON"),
        ("[]", "a JSON object"),
        ('{"hiden_size": 64}', "'hiden_size'"),
        ('{"hidden_size": "64"}', "hidden_size to be an integer"),
        ('{"hidden_size": 100}', "hidden_size to be a multiple of 96"),
        ('{"num_heads": 0}', "num_heads to be an integer from 1"),
        ('{"latent_padding": "none"}', "latent_padding"),
        ('{"text_max_length": 1}', "text_max_length of at least 2"),
    ],
)
def test_configurations_that_make_no_network(export: Export, text: str, part: str) -> None:
    path = export.folder / "wrong.json"
    path.write_text(text)
    assert part in export.refusal("--config", path, "--random-weights", 0)


def test_configurations_that_cannot_be_read(export: Export) -> None:
    binary = export.folder / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    for path in (export.folder / "none.json", export.folder, binary):
        text = export.refusal("--config", path, "--random-weights", 0)
        assert "file of network dimensions" in text


def test_captions_may_be_short() -> None:
    config = replace(FLUX.config, text_max_length=2)
    program = build_program(config, "fp32", 5)
    slots = weight_slots(config, program, "fp32")
    placed = {name: Placed(0, slot.bytes) for name, slot in slots.items()}
    exporter = GraphExporter(dimensions_of(network_of(config)), "fp32")
    for name in ("caption", "text.0"):
        spec = program.graphs[name]
        check_graph(name, exporter.export(name, spec, placed), spec)


def test_checkpoints_that_do_not_fit(export: Export) -> None:
    file = official(export.folder)
    garbage, cut = export.folder / "garbage.pth", export.folder / "cut.pth"
    garbage.write_bytes(b"no checkpoint")
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for path, part in (
        (export.folder / "none.pth", "no file at"),
        (export.folder, "no model_ema_bf16.pth in the folder"),
        (garbage, "something else"),
        (cut, "that was cut short"),
    ):
        assert part in export.refusal(*export.network, "--checkpoint", path)


def test_a_checkpoint_with_nan_leaves_no_bundle(export: Export) -> None:
    state = torch.load(official(export.folder))
    name = "net.patch_blocks.1.attn.proj_x.weight"
    state[name][3, 5] = float("nan")
    torch.save(state, export.folder / "weights.pth")
    text = export.refusal(*export.network, "--checkpoint", export.folder / "weights.pth")
    assert f"NaN or infinity in {name} of" in text


def test_a_name_of_another_space_can_be_overruled(export: Export) -> None:
    file = official(export.folder).rename(export.folder / "pid_sd3_bf16.pth")
    asked = ("--space", "flux", "--variant", "2k", "--checkpoint", file)
    text = export.refusal(*asked)
    assert "a file for sd3 by its name pid_sd3_bf16.pth" in text
    # Then its tensors are looked at, which are of a smaller network.
    code, _, err = export.run_command(main, *asked, "--force-space", "-o", export.bundle)
    assert code == 2
    assert "misshapen" in err


def test_the_list_has_every_checkpoint(run_command: RunCommand) -> None:
    code, out, _ = run_command(main, "--list")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(CHECKPOINTS)
    assert "flux       2k                  v1       384-672       1536-2688" in out
    code, out, _ = run_command(main, "--list", "--json")
    rows = json.loads(out)["checkpoints"]
    assert {row["checkpoint"] for row in rows} == set(CHECKPOINTS)
    assert [row["variant"] for row in rows if row["superseded"]] == ["2kto4k-v1"] * 3
    assert rows[-1]["native"] is None


def test_a_superseded_checkpoint_says_so(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    old = reduced(find_checkpoint("flux", "2kto4k-v1"))
    monkeypatch.setattr(cli, "find_checkpoint", lambda *_: old)
    asked = ("--space", "flux", "--variant", "2kto4k-v1", "--random-weights", -1)
    code, _, err = export.run_command(main, *asked, "-o", export.bundle)
    assert code == 2
    assert "flux 2kto4k-v1 (v1) is superseded by the v1.5 checkpoint" in err


def test_a_checkpoint_of_another_network_is_listed(export: Export) -> None:
    """More than one line: the tensors that differ follow the sentence."""
    file = official(export.folder)
    other = export.folder / "other.json"
    other.write_text(json.dumps(DIMENSIONS | {"latent_channels": 4}))
    before = tree(export.folder)
    code, out, err = export.run_command(
        main, "--config", other, "--checkpoint", file, "-o", export.bundle
    )
    first, *rest = err.splitlines()
    assert (code, out) == (2, "")
    assert first.startswith("pid-export: expected sdxl v1") and "flux, sd3 or qwenimage v1" in first
    assert rest[0] == "  1 misshapen:" and "lq_proj.latent_proj.0.weight" in rest[1]
    assert tree(export.folder) == before


# Where it is written


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link", "dangling"])
def test_what_is_there_is_left_alone(export: Export, kind: str) -> None:
    if kind == "file":
        export.bundle.write_text("precious")
    elif kind == "dangling":
        export.bundle.symlink_to(export.folder / "nowhere")
    elif kind == "link":
        (export.folder / "elsewhere").mkdir()
        export.bundle.symlink_to(export.folder / "elsewhere")
    else:
        export.bundle.mkdir()
    if kind == "folder":
        (export.bundle / "precious.txt").write_text("precious")
    assert "exists already" in export.refusal(*export.random)


def test_parents_are_made(export: Export) -> None:
    export.run(*export.random, output="new/deep/bundle")


def test_a_file_in_the_way_of_the_parent(export: Export) -> None:
    (export.folder / "file").write_text("precious")
    text = export.refusal(*export.random, output=export.folder / "file" / "bundle")
    assert "expected to write" in text and "-o" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written(export: Export) -> None:
    locked = export.folder / "locked"
    locked.mkdir(mode=0o500)
    assert "Permission denied" in export.refusal(*export.random, output=locked / "bundle")


def test_no_space(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(export.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    text = export.refusal(*export.random)
    assert "GB of free disk" in text and f"{export.folder} has 0.00 GB" in text


def test_no_space_halfway(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(writer: WeightsWriter, *arguments: Any) -> bytes:
        if writer.size > 1_000_000:
            raise OSError(28, "No space left on device")
        return real(writer, *arguments)

    real = WeightsWriter.write
    monkeypatch.setattr(WeightsWriter, "write", write)
    before = tree(export.folder)
    text = export.refusal_of(main, *export.random, "-o", export.bundle)
    assert "no space left" in text and tree(export.folder) == before


def test_somebody_else_was_faster(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(manifest: Manifest) -> None:
        export.bundle.mkdir()
        (export.bundle / "theirs").write_text("precious")

    monkeypatch.setattr(bundle, "check_manifest", check)
    text = export.refusal_of(main, *export.random, "-o", export.bundle)
    assert "exists already" in text
    assert tree(export.bundle) == {"theirs": b"precious"}
    assert sorted(export.folder.iterdir()) == [export.bundle, export.folder / "config.json"]


# Ends that come early


def start(export: Export) -> tuple[subprocess.Popen[str], Path]:
    """An export in another process, and its folder, once its weights are written."""
    arguments = [str(a) for a in (*export.random, "-o", export.bundle)]
    code = "import sys; from pid_export.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
    )
    for _ in range(1200):
        for partial in export.folder.glob(f".bundle.{process.pid}.*.partial"):
            if (partial / "latent.onnx").exists():
                return process, partial
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the export wrote nothing: {process.communicate()}")


@pytest.mark.slow
def test_killed(export: Export) -> None:
    process, partial = start(export)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not export.bundle.exists() and partial.exists()
    running = export.folder / f".bundle.{os.getpid()}.abc.partial"
    others = export.folder / ".bundles.1.abc.partial"
    running.mkdir()
    others.mkdir()
    export.run(*export.random)
    assert not partial.exists() and running.exists() and others.exists()
    export.verify("onnxruntime")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped(export: Export, number: signal.Signals) -> None:
    process, _ = start(export)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("pid-export: interrupted\n")
    assert list(export.folder.iterdir()) == [export.folder / "config.json"]


def test_an_error_in_the_exporter_is_a_traceback_and_leaves_nothing(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(manifest: Manifest) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(bundle, "check_manifest", check)
    with pytest.raises(AssertionError, match="a bug"):
        main([str(a) for a in (*export.random, "-o", export.bundle)])
    assert list(export.folder.iterdir()) == [export.folder / "config.json"]


def test_dimensions_are_those_of_the_golden_file(tmp_path: Path) -> None:
    """They are the same so that stages need not be traced twice: a trace takes a second."""
    with safe_open(GOLDEN / "flux_2k.safetensors", "np") as file:
        config = PidConfig.from_upstream(json.loads(file.metadata()["config"]))
    assert replace(config, patch_depth=2, pixel_depth=1) == FLUX.config


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_a_stage_is_traced(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in a callback of torch from C++, it would abort the process."""
    done: list[str] = []

    def interrupted(*_: object) -> bytes:
        signal.raise_signal(number)
        done.append("traced")
        return b""

    def raise_(*_: object) -> None:
        raise KeyboardInterrupt

    spec = next(iter(build_program(NANO.config, "fp32", 5).graphs.values()))
    exporter = GraphExporter(dimensions_of(network_of(NANO.config)), "fp32")
    monkeypatch.setattr(graphs, "_trace", interrupted)
    monkeypatch.setattr(GraphExporter, "_traces", {})
    before = signal.signal(number, raise_)
    try:
        with pytest.raises(KeyboardInterrupt):
            exporter.export("one", spec, {})
        assert signal.getsignal(number) is raise_
    finally:
        signal.signal(number, before)
    assert done == ["traced"]
