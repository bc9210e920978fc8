"""`pid-upscale` with an autoencoder of diffusers; nano's codec: end_to_end/test_nano_space.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from fakes.autoencoders import small_model, small_spec
from pid_export.vae import export_vae
from pid_pipelines import upscale_cli, vae_model, vaes
from pid_pipelines.caption_cache import CaptionCache
from pid_pipelines.captions import CaptionEncoder
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.upscale_cli import main
from pid_pipelines.upscale_codecs import open_codec
from pid_pipelines.upscale_jobs import Frame, Naming, Photo, read_manifest_lines
from pid_pipelines.vae_model import load_vae
from pid_pipelines.vae_tiles import TiledVae
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.command import decode_cli
from pid_runtime.command.images import to_uint8
from pid_runtime.decoder import Decoder
from pid_runtime.latents import LATENT_DRAW, noisy
from pid_runtime.nano.photos import read_photo, resized
from pid_runtime.noise import standard_normal
from places import GOLDEN
from ray_nodes import run_on_cluster

ENCODER = GOLDEN / "captions" / "encoder"

RunCommand = Callable[..., tuple[int, str, str]]
Refusal = Callable[..., str]
EditBundle = Callable[..., Path]
Pixels = NDArray[np.uint8]


@pytest.fixture
def bundle(edit_bundle: EditBundle) -> Path:
    """The small network of golden file flux_2k, as one of space flux."""
    model = {"name": "small", "space": "flux", "captioned": True}
    return edit_bundle(lambda manifest: manifest.update(model=model))


@pytest.fixture(autouse=True)
def vae(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of a small autoencoder of flux, which is taken for the released one's size."""
    monkeypatch.setitem(vaes.VAES, "flux", small_spec("flux"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_model("flux").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def save(path: Path, height: int, width: int) -> Path:
    y, x = np.mgrid[:height, :width]
    planes = [40 + 200 * x // width, 30 + 180 * y // height, 120 + 60 * (x > y)]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(path)
    return path


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image)


def test_photos_prompts_and_noise_levels(
    bundle: Path, vae: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    photo, out = save(tmp_path / "boat.png", 27, 24), tmp_path / "out"
    options = ("--vae", vae, "--prompt", "a boat", "--encoder", ENCODER, "--sigma", "0,0.25")
    arguments = (bundle, photo, *options, "--baseline", "--seed", 7, "--steps", 2, "-o", out)
    code, text, _ = run_command(main, *arguments, "--threads", 1, "--json", "--quiet")
    result = json.loads(text)
    assert code == 0 and result["failed"] == [] and result["steps"] == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "boat-sheet.png",
        "boat-sigma0-vae.png",
        "boat-sigma0.25-vae.png",
        "boat-sigma0.25.png",
        "boat-sigma0.png",
    ]
    with CaptionEncoder(ENCODER, width=32) as encoder:
        caption = encoder.encode(["a boat"], 12)
    with load_vae("flux", vae) as loaded, Decoder.open(bundle, threads=1) as pid:
        image = np.pad(read_photo(photo), ((0, 0), (0, 5), (0, 0)), "edge")[None]
        latent = loaded.encode(image)
        noise = standard_normal(7, LATENT_DRAW, latent.size).reshape(latent.shape)
        for made, sigma in zip(result["images"], (0.0, 0.25), strict=True):
            given = np.float32(1 - sigma) * latent + np.float32(sigma) * noise
            wanted = pid.decode(given, caption, sigma=sigma, seed=7, steps=2, output="uint8")
            np.testing.assert_array_equal(pixels(Path(made["image"])), wanted[0, :108, :96])
            native = to_uint8(loaded.decode(given))[0, :27]
            np.testing.assert_array_equal(pixels(Path(made["vae"])), native)
            assert made["prompt"] == "a boat" and made["sigma"] == sigma
            assert (made["width"], made["height"]) == (96, 108)
    with Image.open(out / "boat-sigma0.25.png") as picture:
        record = json.loads(picture.info["pid-trt"])
    assert record["prompt"] == "a boat" and record["sigma"] == 0.25 and record["seed"] == 7
    sheet = pixels(out / "boat-sheet.png")
    assert sheet.shape[1] == 5 * 96 + 6 * 8 and sheet.shape[0] > 108


def test_an_autoencoder_in_tiles(
    bundle: Path, vae: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    photo, image = save(tmp_path / "boat.png", 64, 80), tmp_path / "larger.png"
    options = (bundle, photo, "--vae", vae, "--steps", 1, "--threads", 1, "-o", image)
    code, _, err = run_command(main, *options, "--vae-tile", "64x64")
    assert code == 0, err
    with load_vae("flux", vae) as loaded, Decoder.open(bundle, threads=1) as pid:
        latent = TiledVae(loaded, (64, 64)).encode(read_photo(photo)[None])
        assert np.abs(latent - loaded.encode(read_photo(photo)[None])).max() > 1e-3
        wanted = pid.decode(latent, steps=1, output="uint8")[0]
    np.testing.assert_array_equal(pixels(image), wanted)
    for given, message in (
        ("60x64", "expected --vae-tile auto, or width and height in multiples of 8 pixels from 64"),
        ("many", "expected auto or a size such as 2048x2048, but got 'many'"),
    ):
        code, _, err = run_command(main, *options, "--overwrite", "--vae-tile", given)
        assert code == 2 and message in err, err


def test_a_caption_file_and_torch(
    bundle: Path, vae: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    photo, image = save(tmp_path / "boat.png", 16, 16), tmp_path / "larger.png"
    caption = np.random.default_rng(0).standard_normal((12, 32), np.float32)
    save_file({"caption": caption}, tmp_path / "caption.safetensors")
    options = (bundle, photo, "--vae", vae, "--caption", tmp_path / "caption.safetensors")
    code, _, err = run_command(main, *options, "-o", image, "--threads", 1)
    assert (code, err) == (0, "")
    with load_vae("flux", vae) as loaded, Decoder.open(bundle, threads=1) as pid:
        latent = loaded.encode(read_photo(photo)[None])
        wanted = pid.decode(latent, caption[None], output="uint8")[0]
    np.testing.assert_array_equal(pixels(image), wanted)
    code, _, err = run_command(main, *options[:4], "-o", image, "--overwrite", "--threads", 1)
    assert code == 0 and "no caption was given" in err
    save_file({"caption": np.stack([caption] * 2)}, tmp_path / "two.safetensors")
    save_file({"caption": caption[:, :31]}, tmp_path / "narrow.safetensors")
    for name, message in (
        ("two", "expected one caption for all photos"),
        ("narrow", "expected captions of 32 channels, but "),
        ("missing", "missing.safetensors"),
    ):
        options = (*options[:4], "--caption", tmp_path / f"{name}.safetensors", "-o", image)
        code, _, err = run_command(main, *options, "--overwrite")
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_captioner_runs_where_the_decoder_does(
    bundle: Path,
    vae: Path,
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[str] = []

    def refuse(_encoder: object, *, device: str, **_: Any) -> Any:
        devices.append(device)
        raise PipelineInputError("enough")

    monkeypatch.setattr("pid_pipelines.captions.CaptionEncoder", refuse)
    captioner = tmp_path / "captioner"
    captioner.mkdir()
    (captioner / "captioner.json").touch()
    photo = save(tmp_path / "boat.png", 16, 16)
    options = (bundle, photo, "--vae", vae, "--prompt", "a", "--device", "CPUExecutionProvider")
    for encoder in (captioner, ENCODER):
        arguments = (*options, "--encoder", encoder, "-o", tmp_path / "larger.png")
        assert run_command(main, *arguments)[::2] == (2, "pid-upscale: enough\n")
    assert devices == ["CPUExecutionProvider", "cpu"]


def test_a_manifest_in_which_a_photo_cannot_be_read(
    bundle: Path, vae: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    save(folder / "a.png", 16, 16)
    save(folder / "b.png", 16, 24)
    whole = save(folder / "cut.jpg", 64, 64).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-100])
    (folder / "text.png").write_text("no picture")
    lines = [
        {"image": "a.png", "prompt": "one"},
        {"image": "cut.jpg"},
        {"image": "b.png"},
        {"image": "text.png"},
        {"image": "missing.png"},
    ]
    manifest = folder / "photos.jsonl"
    manifest.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    options = (bundle, "--manifest", manifest, "--vae", vae, "--encoder", ENCODER, "--steps", 1)
    code, text, err = run_command(main, *options, "-o", out, "--json", "--threads", 1)
    result = json.loads(text)
    assert code == 1 and sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert [Path(each["photo"]).name for each in result["failed"]] == [
        "text.png",
        "missing.png",
        "cut.jpg",
    ]
    assert err.count("error: ") == 3 and "cannot read" in result["failed"][2]["reason"]
    assert [each.get("prompt") for each in result["images"]] == ["one", None]
    # What is there already is not made again; what failed is tried again.
    before = (out / "a.png").stat().st_mtime_ns
    (out / "b.png").unlink()
    code, text, _ = run_command(
        main, *options, "-o", out, "--skip-existing", "--json", "--threads", 1
    )
    result = json.loads(text)
    assert code == 1 and result["skipped"] == 1 and len(result["images"]) == 1
    assert (out / "a.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a.png"}\n{"image"', "line 2 of {path} is no JSON"),
        ('["a.png"]', "line 1 of {path} is no JSON".replace("no JSON", '["a.png"]')),
        ('{"prompt": "a boat"}', 'line 1 of {path} is {{"prompt": "a boat"}}'),
        ('\n\n{"image": "a.png", "prompt": 3}', "line 3 of {path} has 3"),
        ("\n", "expected a photo in each line, but {path} has none"),
    ],
)
def test_manifests_that_are_none(
    content: str, message: str, bundle: Path, refusal: Refusal, tmp_path: Path
) -> None:
    path = tmp_path / "photos.jsonl"
    path.write_text(content)
    error = refusal(main, bundle, "--manifest", path, "-o", tmp_path / "out")
    assert message.format(path=path) in error
    path.unlink()
    assert "No such file" in refusal(main, bundle, "--manifest", path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_without_a_prompt_get_the_one_of_all(tmp_path: Path) -> None:
    path = tmp_path / "photos.jsonl"
    path.write_text('{"image": "a.png"}\n{"image": "/b.png", "prompt": ""}\n')
    assert read_manifest_lines(path, "all") == [
        Photo(tmp_path / "a.png", "all"),
        Photo(Path("/b.png"), ""),
    ]


def test_crop_takes_the_middle(
    bundle: Path, vae: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    photo, out = save(tmp_path / "boat.png", 27, 42), tmp_path / "larger.png"
    options = (bundle, photo, "--vae", vae, "--crop", "--steps", 1, "-o", out, "--threads", 1)
    assert run_command(main, *options)[0] == 0
    assert pixels(out).shape == (64, 128, 3)
    frame = Frame((27, 42), (16, 32), 8)
    np.testing.assert_array_equal(frame.kept(read_photo(photo)), read_photo(photo)[:, 5:21, 5:37])
    assert frame.latent == (2, 4) and Frame((27, 42), (27, 42), 16).latent == (2, 3)


def test_an_encoder_that_takes_squares_alone(
    bundle: Path, run_command: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dinov2's; here those of flux's, which takes any."""
    spec = vaes.VAES["flux"]
    monkeypatch.setitem(vaes.VAES, "flux", replace(spec, side=32))
    photo, out = save(tmp_path / "boat.png", 40, 60), tmp_path / "larger.png"
    options = ("--vae", tmp_path / "vae", "--steps", 1, "--threads", 1)
    code, _, err = run_command(main, bundle, photo, *options, "-o", out)
    assert code == 0 and "takes squares of 32 pixels: of every photo the middle is kept" in err
    with load_vae("flux", tmp_path / "vae") as loaded, Decoder.open(bundle, threads=1) as pid:
        square = resized(read_photo(photo)[:, :, 10:50], 32, 32)
        wanted = pid.decode(loaded.encode(square[None]), steps=1, output="uint8")[0]
    np.testing.assert_array_equal(pixels(out), wanted)
    assert wanted.shape == (128, 128, 3)
    code, _, err = run_command(main, bundle, photo, *options, "--vae-tile", "auto", "-o", "x.png")
    assert code == 2 and "its encoder takes squares of one size alone, but got one; drop it" in err
    monkeypatch.setitem(vaes.VAES, "flux", replace(spec, decodes=False))  # as siglip's
    code, _, err = run_command(main, bundle, photo, *options, "--baseline", "-o", tmp_path / "all")
    assert code == 2 and "expected no --baseline with a bundle of flux, since only the enc" in err
    assert not (tmp_path / "all").exists()


def test_huge_pictures_of_a_folder_are_tiffs(tmp_path: Path) -> None:
    def names(height: int, width: int, suffix: str | None = None) -> list[str]:
        naming = Naming(tmp_path, True, suffix, (0.0,), True)
        (picture,) = naming.pictures(Photo(tmp_path / "boat.jpg", None), height, width)
        return [file.name for file in picture.files]

    assert names(8192, 16_384) == ["boat.png", "boat-vae.png"]
    assert names(16_384, 16_384) == ["boat.tiff", "boat-vae.tiff"]
    assert names(16_384, 16_384, "png") == ["boat.png", "boat-vae.png"]


def test_nothing_is_held_while_the_next_part_runs(
    bundle: Path,
    vae: Path,
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def logged(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(upscale_cli, "open_codec", logged("vae", open_codec))
    monkeypatch.setattr(
        vae_model.LoadedVae, "close", logged("vae closed", vae_model.LoadedVae.close)
    )
    monkeypatch.setattr(CaptionEncoder, "encode", logged("captions", CaptionEncoder.encode))
    monkeypatch.setattr(CaptionEncoder, "close", logged("captions closed", CaptionEncoder.close))
    monkeypatch.setattr(upscale_cli, "open_decoder", logged("decoder", upscale_cli.open_decoder))
    photo = save(tmp_path / "boat.png", 16, 16)
    options = (bundle, photo, "--vae", vae, "--prompt", "a boat", "--encoder", ENCODER)
    assert run_command(main, *options, "-o", tmp_path / "larger.png", "--threads", 1)[0] == 0
    assert order == ["vae", "vae closed", "captions", "captions closed", "decoder"]
    cache = CaptionCache()
    assert str(cache.folder).startswith(str(tmp_path)) and any(cache.folder.rglob("*"))


def test_what_does_not_belong_together(
    bundle: Path, vae: Path, refusal: Refusal, tmp_path: Path
) -> None:
    photo, out = save(tmp_path / "boat.png", 16, 16), tmp_path / "out"
    other = tmp_path / "sdxl"
    small_model("sdxl").save_pretrained(other)
    large = save(tmp_path / "large.png", 304, 72)
    save(tmp_path / "more" / "boat.jpg", 16, 16)
    for arguments, message in (
        ((photo, "--vae", other), "of 16 channels, but that of"),
        ((photo, "--vae", tmp_path / "no.safetensors"), "is neither file nor folder"),
        ((photo, "--vae", vae, "--prompt", "x"), "the caption encoder Efficient-Large-Model"),
        ((photo, "--prompt", "x", "--caption", photo), "not allowed with"),
        ((photo, tmp_path / "more"), "expected every picture to have its own name"),
        ((large, "--vae", vae), "use --fit, which reduces this photo of 72x304"),
        ((tmp_path / "more", "--format", "gif"), "invalid choice: 'gif'"),
    ):
        assert message in refusal(main, bundle, *arguments, "-o", out)
        assert not out.exists()
    assert "another name than the photo's" in refusal(
        main, bundle, photo, "-o", photo, "--overwrite"
    )


def test_pid_decode_says_where_photos_went(bundle: Path, refusal: Refusal, tmp_path: Path) -> None:
    for name in ("--image", "--images"):
        error = refusal(decode_cli.main, bundle, name, "photo.jpg", "-o", "larger.png")
        assert f"pid-upscale {bundle} photo.jpg -o larger.png" in error


def test_noise_of_eulers_rule(bundle: Path) -> None:
    manifest = read_manifest(bundle, verify=False)
    latent = np.random.default_rng(0).standard_normal((2, 16, 3, 4), np.float32)
    noise = noisy(manifest, latent, 1.0, 5)
    manifest.model["partly_denoised"] = "euler"
    np.testing.assert_allclose(
        noisy(manifest, latent, 0.6, 5), 0.8 * latent + 0.6 * noise, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(noisy(manifest, latent, 0.0, 5), latent)
    np.testing.assert_array_equal(noise[1].ravel(), standard_normal(6, LATENT_DRAW, 16 * 12))


def test_nano_needs_no_torch(tmp_path: Path) -> None:
    """With a bundle there, as on a machine that only runs it."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'diffusers', 'transformers', 'onnx'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from pid_pipelines.upscale_cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    photo, out = save(tmp_path / "boat.png", 16, 16), tmp_path / "larger.png"
    bundle = tmp_path / "nano"
    from pid_export.cli import main as export

    assert export(["--space", "nano", "--buckets", "tiny=16", "--quiet", "-o", str(bundle)]) == 0
    arguments = [str(bundle), str(photo), "-o", str(out)]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert pixels(out).shape == (64, 64, 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_no_photo_is_lost_with_an_actor(
    bundle: Path,
    vae: Path,
    ray_python: Path,
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = tmp_path / "graphs"  # which need no sizes that only this process knows
    export_vae("flux", vae, graphs)
    photos = tmp_path / "photos"
    for index in range(12):
        save(photos / f"{index}.png", 16 + index, 24)
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:60])
    lines = [
        {"image": f"photos/{path.name}", "prompt": f"number {path.stem}"}
        for path in sorted(photos.iterdir())
    ]
    (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = (
        *(bundle, "--manifest", tmp_path / "photos.jsonl", "--sigma", "0,0.25", "--baseline"),
        *("--vae", graphs, "--encoder", ENCODER, "--threads", 1, "--steps", 2, "--json"),
    )
    alone, out = tmp_path / "alone", tmp_path / "out"
    code, text, err = run_command(main, *given, "-o", alone)
    assert code == 1, err
    wanted = json.loads(text)
    monkeypatch.setenv("PID_CAPTION_CACHE", str(tmp_path / "other"))
    code, text, err = run_on_cluster(
        ray_python, "pid_upscale", *given, "-o", out, images=out, kill_after=6
    )
    assert code == 1, err
    result = json.loads(text)
    assert [Path(each["photo"]).stem for each in result["failed"]] == ["broken"]
    assert [each["photo"] for each in result["images"]] == [
        each["photo"] for each in wanted["images"]
    ]
    assert len(result["images"]) == 24 and len(contents(out)) == 12 * 5
    assert contents(out) == contents(alone)
