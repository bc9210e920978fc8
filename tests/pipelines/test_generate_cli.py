"""`pid-generate`, with small generators saved as diffusers saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fakes.generators import PARTS, small_pipeline
from pid_pipelines import generators
from pid_pipelines.backbones import BACKBONES, find_backbone
from pid_pipelines.captions import CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generate_cli import main
from pid_pipelines.generate_jobs import Results, plan_jobs, plan_size, plan_steps
from pid_pipelines.generator_run import run
from pid_pipelines.generators import find_generator, load_generator, take_vae
from pid_ref.registry import SPACES
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command.images import to_uint8
from pid_runtime.command.sampling_options import Sampling
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from places import GOLDEN
from ray_nodes import run_on_cluster

ENCODER = GOLDEN / "captions" / "encoder"
QUICK = ("--encoder", ENCODER, "--generator-dtype", "fp32", "--steps", 2, "--threads", 1)

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
EditBundle = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PID_CAPTION_CACHE", str(tmp_path / "captions"))


@pytest.fixture
def bundle(edit_bundle: EditBundle) -> Path:
    """The small network of golden file flux_2k, as one of space flux."""
    model = {"name": "small", "space": "flux", "captioned": True}
    return edit_bundle(lambda manifest: manifest.update(model=model))


@pytest.fixture(scope="session")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generator in a folder."""
    folder = tmp_path_factory.mktemp("generators") / "zimage"
    small_pipeline("zimage").save_pretrained(folder)
    return folder


@pytest.fixture
def small(bundle: Path, zimage: Path) -> tuple[object, ...]:
    """Arguments of a quick run."""
    own = ("--backbone", "zimage", "--model", zimage, "--size", "384x256", "--generator-steps", 4)
    return (bundle, *own, *QUICK)


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def generated(text: str, seed: int, at: list[int], **options: Any) -> list[Any]:
    """Latents of the small generator, by hand."""
    call = {
        "prompt": text,
        "guidance_scale": 5.0,
        "max_sequence_length": 512,
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "generator": torch.Generator().manual_seed(seed),
    }
    return run(small_pipeline("zimage"), SPACES["flux"], call, at=at, **options)


def test_prompts_steps_baselines_and_results(
    small: tuple[object, ...], run_command: RunCommand, tmp_path: Path
) -> None:
    bundle, out = Path(str(small[0])), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a boat\n\na house\n")
    options = (
        *small,
        "--prompt-file",
        tmp_path / "prompts.txt",
        "--decode-at",
        "end,3",
        "--seed",
        7,
    )
    code, text, err = run_command(main, *options, "--baseline", "-o", out, "--json")
    assert code == 0, err
    assert err == f"1 of 3 lines of {tmp_path / 'prompts.txt'} are empty and left out\n"
    result = json.loads(text)
    names = [
        f"{n:04}{step}{vae}.png" for n in (1, 2) for step in ("-step3", "") for vae in ("", "-vae")
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "results.jsonl"])
    assert result["failed"] == [] and result["generator_steps_saved"] == 0

    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [name for name in names if "vae" not in name]
    vae = take_vae(small_pipeline("zimage"), "cpu")
    with CaptionEncoder(ENCODER, width=32) as encoder, Decoder.open(bundle, threads=1) as pid:
        for number, text in enumerate(("a boat", "a house")):
            caption = encoder.encode([text], 12)
            for line, caught in zip(
                lines[2 * number : 2 * number + 2], generated(text, 7 + number, [3]), strict=True
            ):
                wanted = pid.decode(
                    caught.latent,
                    caption,
                    sigma=caught.sigma,
                    seed=7 + number,
                    steps=2,
                    output="uint8",
                )
                np.testing.assert_array_equal(pixels(out / line["image"]), wanted[0])
                native = to_uint8(vae.decode(caught.latent))[0]
                np.testing.assert_array_equal(pixels(out / line["vae"]), native)
                assert line["prompt"] == text and line["seed"] == 7 + number
                assert line["sigma"] == caught.sigma
                assert line["generator"]["decoded_step"] == caught.step
    about = lines[0]
    assert about["generator"] == {
        "backbone": "zimage",
        "model": str(small[4]),
        "revision": None,
        "dtype": "fp32",
        "steps": 4,
        "guidance": 5.0,
        "width": 96,
        "height": 64,
        "decoded_step": 3,
    }
    assert about["steps"] == 2 and len(about["bundle_sha256"]) == 64
    assert set(about["versions"]) >= {"pid-trt", "torch", "diffusers", "transformers"}
    with Image.open(out / "0001.png") as picture:
        record = json.loads(picture.info["pid-trt"])
    assert record["prompt"] == "a boat" and record["generator"]["steps"] == 4


def test_one_picture_of_a_generator_that_stops(
    small: tuple[object, ...], run_command: RunCommand, tmp_path: Path
) -> None:
    bundle, image = Path(str(small[0])), tmp_path / "boat.png"
    options = (*small, "--prompt", "a boat", "-o", image)
    code, text, err = run_command(main, *options, "--stop-at", 3)
    assert (code, err) == (0, "") and len(text.splitlines()) == 2
    assert text.endswith("stopped after 3 of 4 steps: 1 saved for each prompt\n")
    (caught,) = generated("a boat", 0, [], stop_at=3)
    with CaptionEncoder(ENCODER, width=32) as encoder, Decoder.open(bundle, threads=1) as pid:
        caption = encoder.encode(["a boat"], 12)
        wanted = pid.decode(caught.latent, caption, sigma=caught.sigma, steps=2, output="uint8")
    np.testing.assert_array_equal(pixels(image), wanted[0])
    assert not (tmp_path / "results.jsonl").exists()
    # Without the end among the steps to decode, the generator stops by itself.
    code, text, _ = run_command(main, *options, "--decode-at", 2, "--overwrite", "--json")
    assert code == 0 and json.loads(text)["generator_steps_saved"] == 2


def test_what_is_there_is_not_made_again(
    small: tuple[object, ...], run_command: RunCommand, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = (*small, "--prompt-file", tmp_path / "prompts.txt", "-o", out)
    assert run_command(main, *options)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    whole = pixels(out / "0002.png")
    (out / "0002.png").unlink()
    with (out / "results.jsonl").open("a") as file:
        file.write('{"image": "cut sh')
    code, text, _ = run_command(main, *options, "--skip-existing", "--json")
    result = json.loads(text)
    assert code == 0 and result["skipped"] == 2 and len(result["images"]) == 1
    np.testing.assert_array_equal(pixels(out / "0002.png"), whole)
    assert {p.name for p in out.glob("*.png") if p.stat().st_mtime_ns == before[p.name]} == {
        "0001.png",
        "0003.png",
    }
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["0001.png", "0003.png", "0002.png"]
    # Nothing is loaded where nothing is to do.
    code, text, _ = run_command(main, *options, "--skip-existing", "--model", "nobody/nothing")
    assert (code, text) == (0, "3 pictures were there already\n")


def test_a_prompt_that_fails_is_reported(
    small: tuple[object, ...],
    run_command: RunCommand,
    refusal: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Decoder.decode

    def fail(decoder: Decoder, *args: Any, **options: Any) -> Any:
        if options["seed"] == 1:
            raise PidRuntimeError("expected luck, but got none")
        return real(decoder, *args, **options)

    monkeypatch.setattr(Decoder, "decode", fail)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = (*small, "--prompt-file", tmp_path / "prompts.txt", "-o", tmp_path / "out")
    code, text, err = run_command(main, *options)
    assert code == 1 and text.endswith("1 of 3 prompts failed\n")
    assert err == "error: 'two': expected luck, but got none\n"
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["0001.png", "0003.png"]
    line = refusal(main, *small, "--prompt", "two", "--seed", 1, "-o", tmp_path / "two")
    assert "expected luck" in line and not (tmp_path / "two").exists()


@pytest.mark.parametrize("backbone", PARTS)
def test_every_class_is_saved_found_and_loaded(backbone: str, tmp_path: Path) -> None:
    pipe, spec = small_pipeline(backbone), BACKBONES[backbone]
    pipe.save_pretrained(tmp_path)
    source = find_generator(spec, str(tmp_path))
    assert source.model == str(tmp_path) and source.revision is None
    loaded = load_generator(spec, source, dtype="fp32")
    assert type(loaded) is type(pipe)
    call = {spec.prompt_argument: "a boat", "height": 64, "width": 64, "num_inference_steps": 1}
    one, other = (
        run(each, SPACES[spec.space], {**call, "generator": torch.Generator().manual_seed(1)})[0]
        for each in (pipe, loaded)
    )
    np.testing.assert_allclose(one.latent, other.latent, rtol=0, atol=1e-5)
    half = load_generator(spec, source)
    assert next(half.vae.parameters()).dtype is torch.bfloat16
    vae = take_vae(half, "cpu")
    assert vae.decode(one.latent).shape == (1, 3, 64, 64)


def test_sizes(bundle: Path, golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle, verify=False)
    flux = find_backbone("flux")
    size = plan_size(manifest, flux, (384, 256), Sampling())
    assert (size.generated, size.decoded) == ((64, 96), (256, 384))
    manifest.model["trained_sizes"] = [[128, 128], [256, 256], [512, 256], [1024, 1024]]
    assert plan_size(manifest, flux, None, Sampling()).decoded == (256, 256)
    for wanted, nearest in (
        ((380, 256), "380x256; nearest are 320x256 or 384x256"),
        ((400, 300), "400x300; nearest are 384x256 or 448x320"),
        ((0, 40), "0x40; nearest are 64x64"),
    ):
        with pytest.raises(PipelineInputError, match=f"multiples of 64 .* but got {nearest}$"):
            plan_size(manifest, flux, wanted, Sampling())
    with pytest.raises(PidRuntimeError, match="the largest bucket of this bundle, but got 1024x64"):
        plan_size(manifest, flux, (1024, 640), Sampling())


def test_steps() -> None:
    flux, klein = find_backbone("flux"), find_backbone("flux2-klein-4b")

    def plan(*arguments: Any, backbone: Any = flux) -> tuple[Any, ...]:
        steps = plan_steps(backbone, *arguments)
        return steps.count, steps.at, steps.run

    assert plan(None, None, None) == (28, (28,), 28)
    assert plan(20, (12, "end", 12), None) == (20, (12, 20), 20)
    assert plan(20, (12, 14), None) == (20, (12, 14), 14)
    assert plan(None, ("early", "end"), None) == (28, (24, 28), 28)
    assert plan(None, None, "early") == (28, (24,), 24)
    assert plan(None, (10,), 12) == (28, (10,), 12)
    for arguments, message in (
        ((20, (21,), None), "expected --decode-at from 1 to 20, .* but got 21; name an earlier"),
        ((None, None, 29), "expected --stop-at from 1 to 28, .* but got 29"),
        ((None, (25,), 24), "--decode-at up to 24, where --stop-at .* but got 25; drop it"),
        ((None, ("end",), 24), r"but got 28 \(the end\); drop it"),
        ((20, None, "early"), "recommended for flux in 20 steps, but 24 is, of 28; name"),
    ):
        with pytest.raises(PipelineInputError, match=message):
            plan(*arguments)
    with pytest.raises(PipelineInputError, match="for flux2-klein-4b in 4 steps, but none is know"):
        plan(None, ("early",), None, backbone=klein)


def test_seeds_wrap_and_results_of_other_pictures_stay(tmp_path: Path) -> None:
    steps = plan_steps(find_backbone("flux"), None, None, None)
    jobs = plan_jobs(["a", "b"], 2**64 - 1, steps, tmp_path, "jpg", baseline=True)
    assert [job.seed for job in jobs] == [2**64 - 1, 0]
    assert jobs[1].pictures[0].files == [tmp_path / "0002.jpg", tmp_path / "0002-vae.jpg"]
    Results(tmp_path, jobs).add({"image": "0002.jpg", "old": True})
    Results(tmp_path, jobs[:1]).add({"image": "0001.jpg"})
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"image": "0002.jpg", "old": True},
        {"image": "0001.jpg"},
    ]


def test_bad_input(
    bundle: Path, zimage: Path, refusal: Refusal, edit_bundle: EditBundle, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "plain").mkdir()
    one = ("--prompt", "a boat")
    picture = ("-o", tmp_path / "boat.png")
    small = ("--size", "128x128")
    for arguments, message in (
        ((*picture,), "one of the arguments --prompt --prompt-file is required"),
        ((*one, "--prompt-file", "x", *picture), "argument --prompt-file: not allowed with argum"),
        (("--prompt-file", tmp_path / "empty.txt", *picture), "expected a prompt in each line, b"),
        (("--prompt-file", tmp_path / "no.txt", *picture), "No such file or directory; give one"),
        ((*one, *picture, *small, "--baseline"), "expected a folder for 2 pictures, but got "),
        ((*one, *picture, *small, "--decode-at", "1,end"), "expected a folder for 2 pictures, b"),
        ((*one, *picture, *small, "--format", "png"), "expected --format with a folder, but got "),
        ((*one, *picture, *small, "--decode-at", "29"), "--decode-at from 1 to 28, the generator'"),
        ((*one, *picture, "--decode-at", "soon"), "--decode-at: expected a number from 1 to 1000"),
        ((*one, *picture, "--size", "large"), "--size: expected a size such as 512x512, but got "),
        ((*one, *picture, "--size", "100x128"), "got 100x128; nearest are 64x128 or 128x128"),
        ((*one, *picture, "--backbone", "sdxl"), "expected a bundle of sdxl, whose latents sdxl "),
        ((*one, *picture, "--backbone", "flux9"), "expected a generator (flux, flux2, "),
        ((*one, *picture, *small, "--model", tmp_path / "plain"), "has no model_index.json that n"),
        (
            (*one, *picture, *small, "--model", zimage),
            "expected a FluxPipeline, which flux is, but",
        ),
        (
            (*one, *picture, *small, "--backbone", "zimage", "--model", zimage, "--offload"),
            "expected a GPU for --offload, but got cpu; drop it",
        ),
    ):
        assert message in refusal(main, bundle, *arguments)
    assert not (tmp_path / "boat.png").exists()
    bare = edit_bundle(lambda manifest: manifest.update(model={"name": "small"}))
    assert "expected a --backbone, since this bundle" in refusal(main, bare, *one, *picture)
    boogu = ("--backbone", "boogu-image", "--model", _as_boogu(zimage, tmp_path / "boogu"))
    line = refusal(main, bare, *one, *picture, *small, *boogu)
    assert "expected a diffusers with BooguImagePipeline, which boogu-image is, but got 0." in line


def _as_boogu(saved: Path, folder: Path) -> Path:
    folder.mkdir()
    index = json.loads((saved / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "BooguImagePipeline"})
    )
    return folder


def test_no_network_and_no_local_model(
    bundle: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    line = refusal(main, bundle, "--prompt", "a", "--size", "128x128", "-o", out)
    assert (
        "expected the generator black-forest-labs/FLUX.1-dev of flux, but it is not in th" in line
    )
    assert f"the cache is {tmp_path / 'hub'}, and --model FOLDER takes" in line
    assert not out.exists()


def test_a_generator_that_is_broken(
    small: tuple[object, ...], refusal: Refusal, zimage: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model_index.json").write_text((zimage / "model_index.json").read_text())
    options = (*small, "--model", folder, "--prompt", "a", "-o", tmp_path / "a.png")
    assert f"expected {folder} to be a pipeline that diffusers loads, but g" in refusal(
        main, *options
    )


def test_parts_are_offloaded_where_there_is_a_gpu(
    zimage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    pipe = small_pipeline("zimage")
    kind = type(pipe)
    monkeypatch.setattr(
        kind, "enable_model_cpu_offload", lambda _self, device: called.append(device)
    )
    spec = find_backbone("zimage")
    load_generator(spec, find_generator(spec, str(zimage)), device="cuda:0", offload=True)
    assert called == ["cuda:0"]


def test_missing_extras(
    small: tuple[object, ...], refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "diffusers" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    line = refusal(main, *small, "--prompt", "a", "-o", tmp_path / "a.png")
    assert "package 'diffusers', but it is not installed; pip install 'pid-trt[pipelines]'" in line


def resident() -> int:
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_one_model_is_in_memory_at_a_time(
    small: tuple[object, ...],
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each model here is larger by 300 MB, which is given back before the next one comes."""
    ballast, seen = 300 * 2**20, {}
    load, load_states = generators.load_generator, CaptionEncoder._load
    open_pid = Decoder.open

    def heavy() -> torch.Tensor:
        return torch.ones(ballast // 4)

    def generator(*args: Any, **options: Any) -> Any:
        seen["before"] = resident()
        pipe = load(*args, **options)
        pipe.transformer.register_buffer("ballast", heavy())
        seen["generator"] = resident()
        return pipe

    def captioner(encoder: CaptionEncoder) -> Any:
        seen["after the generator"] = resident()
        states: Any = load_states(encoder)
        states.ballast = heavy()
        seen["captioner"] = resident()
        return states

    def decoder(*args: Any, **options: Any) -> Any:
        seen["after the captioner"] = resident()
        return open_pid(*args, **options)

    monkeypatch.setattr(generators, "load_generator", generator)
    monkeypatch.setattr(CaptionEncoder, "_load", captioner)
    monkeypatch.setattr(Decoder, "open", decoder)
    options = (*small, "--prompt", "a boat", "--baseline", "-o", tmp_path / "out")
    assert run_command(main, *options)[0] == 0
    for name in ("generator", "captioner"):
        assert seen[name] < seen["before"] + 1.5 * ballast, seen  # it alone, not two
        assert seen[f"after the {name}"] < seen[name] - 0.9 * ballast, seen


@pytest.mark.slow
def test_no_prompt_is_lost_with_an_actor(
    small: tuple[object, ...],
    ray_python: Path,
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"boat {n}\n" for n in range(14)))
    given = (*small, "--prompt-file", tmp_path / "prompts.txt", "--decode-at", "end,3")
    given = (*given, "--baseline", "--seed", 7, "--json")
    alone, out = tmp_path / "alone", tmp_path / "out"
    code, text, err = run_command(main, *given, "-o", alone)
    assert code == 0, err
    wanted = json.loads(text)
    monkeypatch.setenv("PID_CAPTION_CACHE", str(tmp_path / "other"))
    code, text, err = run_on_cluster(
        ray_python, "pid_generate", *given, "-o", out, images=out, kill_after=9
    )
    assert (code, err) == (0, "")
    result = json.loads(text)
    assert result["failed"] == [] and len(result["images"]) == 28
    assert [each["seed"] for each in result["images"]] == [
        each["seed"] for each in wanted["images"]
    ]
    files = {path.name: path.read_bytes() for path in alone.iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
