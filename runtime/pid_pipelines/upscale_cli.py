"""The command `pid-upscale`: photos in, larger photos out."""

import argparse
import contextlib
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pid_pipelines.before_decoding import encode_captions, graph_device, torch_device
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.upscale_codecs import (
    check_baseline,
    check_tile,
    open_codec,
    pixels_per_latent,
    side_of,
)
from pid_pipelines.upscale_jobs import (
    Job,
    Naming,
    Photo,
    check_targets,
    find_photos,
    plan_job,
    read_manifest_lines,
    without_existing,
)
from pid_pipelines.vae_graphs import is_exported
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command import console
from pid_runtime.command.decode_options import (
    Making,
    add_backend_options,
    add_image_options,
    image_folder,
    number,
    open_decoder,
)
from pid_runtime.command.images import SUFFIXES, save_image, side_by_side, to_uint8
from pid_runtime.command.latent_files import open_caption_file
from pid_runtime.command.sampling_options import (
    Sampling,
    add_sampling_options,
    read_sampling,
    read_tile,
)
from pid_runtime.command.spread import Kept, Save, add_spread_options, check_spread, spread
from pid_runtime.errors import NotFiniteError, PidRuntimeError
from pid_runtime.latents import noisy
from pid_runtime.nano.photos import read_photo
from pid_runtime.tiles import pixels_per_latent_pixel

Floats = NDArray[np.float32]

_log = logging.getLogger("pid_pipelines")

_EXAMPLES = """examples:
  pid-upscale nano photo.jpg -o larger.png
  pid-upscale flux-2k photo.jpg --vae ae.safetensors --prompt "a boat on a lake" -o larger.png
  pid-upscale flux-2k photos/ --caption caption.safetensors --sigma 0,0.2,0.4 --baseline -o out/
  pid-upscale flux-2k --manifest photos.jsonl --vae FLUX.1-dev/ --device cuda -o out/

photos:
  Any that Pillow reads: turned as EXIF data says, converted to sRGB, and put on white where they
  are transparent. What the encoder needs of whole blocks is padded and cut off again, or cut from
  the edges first with --crop. --fit reduces photos that are too large for the bundle.

noise:
  --sigma adds noise to the latent, the same for every level, which PiD takes away again: 0 is the
  photo as it is, 0.2 to 0.4 lets PiD invent more. A picture is made for each level.

files:
  One photo at one level without --baseline makes the picture OUT; otherwise OUT is a folder of
  NAME.png, or NAME-sigma0.2.png, .., with --baseline also NAME-vae.png, what the encoder's own
  decoder makes of the same latent, and NAME-sheet.png, all of them side by side. A photo that
  cannot be read is reported, and the others are made (exit code 1).

The released autoencoders lie beside NVIDIA's weights (nvidia/PiD), and have licences of their own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _upscale, argv, also=(OSError,), extra="pipelines")


def _parser() -> console.ArgumentParser:
    parser = console.ArgumentParser(
        "pid-upscale",
        "Enlarge photos: encode them, add noise if asked, and decode them with a bundle.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's folder")
    add("photos", type=Path, nargs="*", metavar="PHOTO", help="photos, or folders of photos")
    add("--manifest", type=Path, metavar="FILE", help='JSON lines {"image": PATH, "prompt": TEXT}')
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="a picture, or a folder")
    add(
        "--vae",
        metavar="ID_OR_DIR_OR_FILE",
        help="the space's autoencoder: a repository, a folder of diffusers or pid-export --vae, "
        "or a file (default: NVIDIA's)",
    )
    add(
        "--vae-tile",
        type=read_tile,
        metavar="WxH",
        help="run it on tiles of so many pixels of the photo, or auto: of 1024x1024 where it is "
        "larger (default: auto)",
    )
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--prompt", metavar="TEXT", help="what is to be seen, encoded here")
    captions.add_argument("--caption", type=Path, metavar="FILE", help="the same, by pid-caption")
    add("--encoder", metavar="ID_OR_DIR", help="of --prompt, as pid-caption takes it")
    add(
        "--sigma",
        type=_sigmas,
        default=(0.0,),
        metavar="S,S,..",
        help="noise levels, 0 to 1 (default: 0)",
    )
    add("--baseline", action="store_true", help="also write the autoencoder's own, and a sheet")
    edges = parser.add_mutually_exclusive_group()
    edges.add_argument("--pad", action="store_true", help="keep all of a photo (the default)")
    edges.add_argument("--crop", action="store_true", help="cut sides to multiples of 16 pixels")
    add("--fit", action="store_true", help="reduce photos that are too large for the bundle")
    add_sampling_options(parser)
    add_image_options(parser)
    add_backend_options(parser)
    add_spread_options(parser)
    return parser


def _upscale(arguments: Namespace) -> int:
    check_spread(arguments)
    manifest = read_manifest(arguments.bundle, verify=False)
    sampling = read_sampling(arguments, manifest)
    multiple = pixels_per_latent(manifest)
    check_tile(manifest, arguments.vae_tile)
    if arguments.baseline:
        check_baseline(manifest)
    photos, notes = _photos(arguments)
    _check_captions(arguments, manifest, photos)
    naming = _naming(arguments, len(photos))
    run = _Run(arguments, manifest, sampling, naming.is_folder and len(photos) > 1)
    run.plan(photos, multiple, naming)
    for note in notes:
        _log.warning(note)
    with image_folder(arguments.output) if naming.is_folder else contextlib.nullcontext():
        check_targets(
            run.jobs,
            run.scale,
            overwrite=arguments.overwrite,
            keep_existing=arguments.skip_existing,
        )
        if arguments.ray is None:
            run.make()
        else:
            run.make_on_ray()
        run.draw_sheets()
    return run.report()


def _photos(arguments: Namespace) -> tuple[list[Photo], list[str]]:
    if bool(arguments.photos) == (arguments.manifest is not None):
        got = "both" if arguments.photos else "neither"
        raise PipelineInputError(
            f"expected photos or a --manifest, but got {got}; give one, as in pid-upscale nano "
            "photo.jpg -o larger.png"
        )
    if arguments.manifest is not None:
        return read_manifest_lines(arguments.manifest, arguments.prompt), []
    return find_photos(arguments.photos, arguments.prompt)


def _check_captions(arguments: Namespace, manifest: Manifest, photos: Sequence[Photo]) -> None:
    """Raise `PipelineInputError` for captions that do not fit, or that nobody needs."""
    named = [name for name in ("prompt", "caption") if getattr(arguments, name) is not None]
    if named and manifest.model.get("captioned") is False:
        raise PipelineInputError(
            f"expected no --{named[0]}, since {manifest.model.get('name')} was trained without "
            "captions, but got one; drop it"
        )
    if arguments.caption is not None:
        count, _, width = open_caption_file(arguments.caption).outline().shape
        if count != 1:
            raise PipelineInputError(
                f"expected one caption for all photos, but {arguments.caption} has {count}; give "
                "one, or prompts by --manifest"
            )
        if width != (wanted := manifest.network["text_dim"]):
            raise PipelineInputError(
                f"expected captions of {wanted} channels, but {arguments.caption} has {width}; "
                "make it with pid-caption --bundle"
            )
    if arguments.encoder is not None and all(photo.prompt is None for photo in photos):
        raise PipelineInputError(
            "expected a prompt for --encoder to encode, but got none; give --prompt, or drop it"
        )


def _naming(arguments: Namespace, photos: int) -> Naming:
    """Where pictures go. Raises `PipelineInputError` for a file where a folder is needed."""
    output: Path = arguments.output
    is_one = photos == 1 and len(arguments.sigma) == 1 and not arguments.baseline
    looks_like_file = output.suffix.lower() in SUFFIXES
    if looks_like_file and not output.is_dir():
        if not is_one or any(path.is_dir() for path in arguments.photos):
            count = photos * len(arguments.sigma) * (2 if arguments.baseline else 1)
            raise PipelineInputError(
                f"expected a folder for {count} pictures, but got {output}; name a folder"
            )
        if arguments.format is not None:
            raise PipelineInputError(
                f"expected --format with a folder, but got the picture {output}; drop it"
            )
    is_folder = not looks_like_file or output.is_dir()
    return Naming(output, is_folder, arguments.format, arguments.sigma, arguments.baseline)


class _Run:
    """What is done, one part after another: encode all, then captions, then decode all.

    What a part needs, the autoencoder or the language model, is gone before the next begins, unless
    `kept` keeps it.
    """

    def __init__(
        self,
        arguments: Namespace,
        manifest: Manifest,
        sampling: Sampling,
        goes_on: bool,
        kept: Kept | None = None,
        save: Save = save_image,
    ) -> None:
        self.jobs: list[Job] = []
        self.done: list[dict[str, Any]] = []
        self._kept, self._save = kept or Kept(), save
        self._arguments, self._manifest, self._sampling = arguments, manifest, sampling
        self._goes_on = goes_on
        self._making = Making(arguments, manifest, sampling.schedule(manifest))
        self.scale = pixels_per_latent_pixel(manifest) // pixels_per_latent(manifest)
        self._failed: list[dict[str, str]] = []
        self._skipped = 0

    def plan(self, photos: Sequence[Photo], multiple: int, naming: Naming) -> None:
        """Fill `jobs`."""
        side = side_of(self._manifest)
        if side is not None:
            _log.warning(
                "the encoder takes squares of %d pixels: of every photo the middle is kept", side
            )
        for photo in photos:
            with self._reporting(photo):
                job = plan_job(
                    self._manifest,
                    photo,
                    multiple,
                    naming,
                    self._sampling,
                    crop=self._arguments.crop,
                    fit=self._arguments.fit,
                    side=side,
                )
                rest = without_existing(job) if self._arguments.skip_existing else job
                self._skipped += len(job.pictures) - (len(rest.pictures) if rest else 0)
                self.jobs += [] if rest is None else [rest]

    def make(self) -> None:
        """Make the pictures of all jobs."""
        latents = self._encode()
        captions = self._captions()
        self._decode(latents, captions)

    def make_on_ray(self) -> None:
        """The same on a cluster, where a photo that fails is reported and the rest is made."""
        items = [job for job in self.jobs if job.pictures]
        found: dict[int, list[dict[str, Any]]] = {}
        work = partial(_Work, sampling=self._sampling)
        for outcome in spread(self._arguments, "Enlarging", work, items):
            job = items[outcome.index]
            if outcome.reason is not None:
                self._fail(job.photo, outcome.reason)
                self.jobs.remove(job)
                continue
            outcome.write()
            found[outcome.index] = outcome.made
        self.done += [each for _, made in sorted(found.items()) for each in made]

    def _encode(self) -> dict[Path, Floats]:
        """Clean latents `[1, C, h, w]` by photo; writes the baselines too."""
        latents: dict[Path, Floats] = {}
        if not any(job.pictures for job in self.jobs):
            return latents
        vae, tile = self._arguments.vae, self._arguments.vae_tile
        needs_torch = self._manifest.codec is None and not is_exported(vae)
        find = torch_device if needs_torch else graph_device
        device = find(self._arguments.backend, self._arguments.device)
        with (
            self._kept.part(
                "codec", lambda: contextlib.closing(open_codec(self._manifest, vae, device, tile))
            ) as codec,
            self._progress("Encoding", len(self.jobs)) as advance,
        ):
            for job in self.jobs:
                with self._reporting(job.photo):
                    part = job.frame.kept(read_photo(job.photo.path))
                    latent = codec.encode(job.frame.padded(part))
                    latents[job.photo.path] = latent
                    for picture in job.pictures:
                        if picture.baseline is not None:
                            given = noisy(
                                self._manifest, latent, picture.sigma, self._arguments.seed
                            )
                            image = np.clip(codec.decode(given), -1, 1)
                            height, width = job.frame.size
                            self._save(picture.baseline, to_uint8(image)[0, :height, :width], None)
                advance(1)
        self.jobs = [job for job in self.jobs if job.photo.path in latents or not job.pictures]
        return latents

    def _captions(self) -> Callable[[Photo], Floats | None]:
        """The caption embedding of every photo, `[1, T, D]`; None where there is none."""
        if self._arguments.caption is not None:
            caption = open_caption_file(self._arguments.caption).read()
            return lambda photo: caption
        texts = [job.photo.prompt for job in self.jobs if job.pictures]
        wanted = list(dict.fromkeys(text for text in texts if text is not None))
        if not wanted or self._manifest.model.get("captioned") is False:
            return lambda photo: None
        found = encode_captions(self._arguments, self._manifest, wanted, self._kept)
        return lambda photo: None if photo.prompt is None else found[photo.prompt]

    def _decode(
        self, latents: dict[Path, Floats], captions: Callable[[Photo], Floats | None]
    ) -> None:
        """Make the pictures."""
        pictures = sum(len(job.pictures) for job in self.jobs)
        if not pictures:
            return
        arguments = self._arguments
        with (
            self._kept.part("decoder", lambda: open_decoder(arguments, self._manifest)) as decoder,
            self._progress("Decoding", pictures) as advance,
        ):
            for job in self.jobs:
                height, width = job.size(self.scale)
                caption = captions(job.photo)
                for picture in job.pictures:
                    latent = noisy(
                        self._manifest, latents[job.photo.path], picture.sigma, arguments.seed
                    )
                    begin = time.perf_counter()
                    try:
                        pixels = decoder.decode(
                            latent,
                            caption,
                            sigma=picture.sigma,
                            seed=arguments.seed,
                            **self._sampling.options,
                            output="uint8",
                            progress=lambda _done, calls: advance(1 / calls),
                        )
                    except NotFiniteError as error:
                        raise PidRuntimeError(f"{job.photo.path}: {error}") from None
                    seconds = time.perf_counter() - begin
                    about: dict[str, Any] = {
                        "seed": arguments.seed,
                        "sigma": picture.sigma,
                        "width": width,
                        "height": height,
                    }
                    if job.photo.prompt is not None:
                        about["prompt"] = job.photo.prompt
                    record = self._making.record(**about)
                    self._save(picture.image, pixels[0, :height, :width], record)
                    baseline = {} if picture.baseline is None else {"vae": str(picture.baseline)}
                    self.done.append(
                        {
                            "photo": str(job.photo.path),
                            "image": str(picture.image),
                            **baseline,
                            **about,
                            "seconds": round(seconds, 4),
                        }
                    )

    def draw_sheets(self) -> None:
        """Photo, autoencoder and PiD side by side, of every photo, if there is a baseline."""
        for job in self.jobs:
            if job.sheet is None:
                continue
            height, width = job.size(self.scale)
            photo = Image.fromarray(to_uint8(job.frame.kept(read_photo(job.photo.path))))
            larger = photo.resize((width, height), Image.Resampling.LANCZOS)
            tiles = [("photo, enlarged (Lanczos)", np.asarray(larger))]
            for picture in job.all_pictures:
                at = f", sigma {picture.sigma:g}" if picture.sigma else ""
                if picture.baseline is not None:
                    tiles.append((f"autoencoder{at}", _pixels(picture.baseline)))
                tiles.append((f"PiD{at}", _pixels(picture.image)))
            save_image(job.sheet, side_by_side(tiles))

    def report(self) -> int:
        """Print what was made, and what was not; 1 if a photo failed."""
        arguments = self._arguments
        sheets = [str(job.sheet) for job in self.jobs if job.sheet is not None]
        result = {
            "bundle": str(arguments.bundle),
            **self._making.common,
            "images": self.done,
            "sheets": sheets,
            "skipped": self._skipped,
            "failed": self._failed,
        }
        lines = [
            f"{each['image']}: {each['width']}x{each['height']}, sigma {each['sigma']:g}, "
            f"seed {each['seed']}, {each['seconds']:.2f} s"
            for each in self.done
        ]
        lines += [f"{sheet}: side by side" for sheet in sheets]
        if self._skipped:
            lines.append(f"{self._skipped} pictures were there already")
        if self._failed:
            lines.append(f"{len(self._failed)} photos failed")
        console.emit(result, "\n".join(lines), as_json=arguments.json)
        return 1 if self._failed else 0

    @contextlib.contextmanager
    def _reporting(self, photo: Photo) -> Generator[None, None, None]:
        """Report a photo that cannot be read and go on, if it is one of several."""
        try:
            yield
        except PidRuntimeError as error:
            if not self._goes_on:
                raise
            self._fail(photo, str(error))

    def _fail(self, photo: Photo, reason: str) -> None:
        _log.error("%s", reason)
        self._failed.append({"photo": str(photo.path), "reason": reason})

    def _progress(self, label: str, total: float) -> Any:
        return console.progress(label, total, quiet=self._arguments.quiet)


class _Work:
    """What an actor holds: codec, language model and decoder, each from its first use on."""

    def __init__(self, arguments: Namespace, sampling: Sampling) -> None:
        self._arguments, self._sampling = arguments, sampling
        self._manifest = read_manifest(arguments.bundle, verify=False)
        self._kept = Kept(keeps=True)

    def make(self, item: Job, save: Save) -> list[dict[str, Any]]:
        run = _Run(
            self._arguments, self._manifest, self._sampling, False, kept=self._kept, save=save
        )
        run.jobs = [item]
        run.make()
        return run.done

    def close(self) -> None:
        self._kept.close()


def _pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _sigmas(text: str) -> tuple[float, ...]:
    """Noise levels, each once."""
    sigmas = tuple(dict.fromkeys(number(part) for part in text.split(",")))
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, but got {text!r}")
    return sigmas


if __name__ == "__main__":
    raise SystemExit(main())
