"""The command `pid-generate`: prompts in, pictures out."""

import argparse
import contextlib
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_pipelines.backbones import BACKBONES, Backbone, check_space, find_backbone
from pid_pipelines.before_decoding import encode_captions, torch_device
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generate_jobs import (
    EARLY,
    END,
    Job,
    Results,
    Size,
    Steps,
    check_targets,
    plan_jobs,
    plan_size,
    plan_steps,
    without_existing,
)
from pid_pipelines.prompts import read_prompts
from pid_ref.registry import SPACES
from pid_runtime import __version__
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
from pid_runtime.command.images import SUFFIXES, save_image, to_uint8, usual_format
from pid_runtime.command.sampling_options import Sampling, add_sampling_options, read_sampling
from pid_runtime.command.spread import Kept, Save, add_spread_options, check_spread, spread
from pid_runtime.errors import InputError, PidRuntimeError

Floats = NDArray[np.float32]

_log = logging.getLogger("pid_pipelines")

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")

_EXAMPLES = """examples:
  pid-generate flux-2k --prompt "a boat on a lake" -o boat.png
  pid-generate flux-2k --prompt-file prompts.txt --size 2048x2048 --seed 7 -o out/
  pid-generate flux-2k --prompt "a boat" --stop-at early -o boat.png
  pid-generate sdxl-4k --prompt "a boat" --decode-at 22,26,end --baseline --device cuda -o out/

steps:
  --decode-at names the generator's steps, counted from 1, whose latents are decoded: numbers,
  "end", and "early", the step that is recommended for this generator. The generator runs once, and
  stops after the last of them, or after --stop-at.

files:
  One prompt, decoded once without --baseline, makes the picture OUT if that is a picture's name;
  otherwise OUT is a folder of 0001.png, 0001-step22.png, .., with --baseline also 0001-vae.png,
  what the generator's own decoder makes of the same latent, and of results.jsonl, a line for each
  picture with all that made it. Prompt i has the seed --seed + i, from 0. A prompt that fails is
  reported, and the others are made (exit code 1).

Generators come from their authors, by the Hugging Face hub, and have licences of their own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _generate, argv, also=(OSError,), extra="pipelines")


def _parser() -> console.ArgumentParser:
    runnable = [each.name for each in BACKBONES.values() if each.pipeline]
    parser = console.ArgumentParser(
        "pid-generate",
        "Make pictures of prompts: run a generator of diffusers, and decode its latents with a "
        "bundle.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="what is to be seen")
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one in each line")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="a picture, or a folder")
    add(
        "--backbone",
        metavar="NAME",
        help=f"the generator: {', '.join(runnable)} (default: the one that the bundle's latent "
        "space is named after)",
    )
    add(
        "--model",
        metavar="ID_OR_DIR",
        help="its weights, a repository or a folder of diffusers (default: its authors')",
    )
    add("--size", type=_size, metavar="WxH", help="of the pictures (default: a trained square)")
    add("--generator-steps", type=_count, metavar="N", help="(default: the generator's own)")
    add("--guidance", type=number, metavar="G", help="of the generator (default: its own)")
    add(
        "--generator-dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="what the generator computes in",
    )
    add(
        "--decode-at",
        type=_steps,
        metavar="K,K,..",
        help="after which steps: numbers, early, end (default: end)",
    )
    add("--stop-at", type=_step, metavar="K", help="compute no step after this one")
    add("--baseline", action="store_true", help="also write what the generator's decoder makes")
    add(
        "--offload",
        action="store_true",
        help="keep on the GPU only the part of the generator that computes",
    )
    add("--encoder", metavar="ID_OR_DIR", help="of captions, as pid-caption takes it")
    add_sampling_options(parser, "decoder-")
    add_image_options(parser)
    add_backend_options(parser)
    add_spread_options(parser)
    return parser


def _generate(arguments: Namespace) -> int:
    check_spread(arguments)
    manifest = read_manifest(arguments.bundle, verify=False)
    sampling = read_sampling(arguments, manifest)
    backbone = _backbone(arguments, manifest)
    prompts = (
        [arguments.prompt] if arguments.prompt_file is None else read_prompts(arguments.prompt_file)
    )
    size = plan_size(manifest, backbone, arguments.size, sampling)
    steps = plan_steps(backbone, arguments.generator_steps, arguments.decode_at, arguments.stop_at)
    suffix = _suffix(arguments, len(prompts) * len(steps.at), usual_format(*size.decoded))
    jobs = plan_jobs(
        prompts, arguments.seed, steps, arguments.output, suffix, baseline=arguments.baseline
    )
    skipped = sum(len(job.pictures) for job in jobs)
    jobs = without_existing(jobs) if arguments.skip_existing else jobs
    skipped -= sum(len(job.pictures) for job in jobs)
    run = _Run(arguments, manifest, sampling, backbone, size, steps, jobs, skipped)
    with image_folder(arguments.output) if suffix else contextlib.nullcontext():
        check_targets(jobs, size, overwrite=arguments.overwrite or arguments.skip_existing)
        if jobs:
            results = Results(arguments.output, jobs) if suffix else None
            if arguments.ray is None:
                console.need_packages(_PACKAGES, "pipelines")
                run.make(results.add if results else None)
            else:
                run.make_on_ray(results)
    return run.report()


def _backbone(arguments: Namespace, manifest: Manifest) -> Backbone:
    """The generator. Raises `PipelineInputError` for one whose latents the bundle does not take."""
    name = arguments.backbone or manifest.model.get("space")
    if name is None:
        raise PipelineInputError(
            "expected a --backbone, since this bundle does not name its latent space, but got "
            "none; name the generator"
        )
    backbone = find_backbone(str(name))
    check_space(manifest, SPACES[backbone.space], backbone.name)
    return backbone


def _suffix(arguments: Namespace, pictures: int, usual: str) -> str | None:
    """Of pictures in a folder; None for one picture. Raises `PipelineInputError` for a mixture.

    usual: where the arguments say none.
    """
    output: Path = arguments.output
    is_picture = output.suffix.lower() in SUFFIXES
    if not is_picture or output.is_dir():
        return arguments.format or usual
    if pictures > 1 or arguments.baseline or arguments.prompt_file is not None:
        count = pictures * (2 if arguments.baseline else 1)
        raise PipelineInputError(
            f"expected a folder for {count} {'pictures' if count > 1 else 'picture of a file'}, "
            f"but got {output}; name a folder"
        )
    if arguments.format is not None:
        raise PipelineInputError(
            f"expected --format with a folder, but got the picture {output}; drop it"
        )
    return None


class _Run:
    """What is done, one part after another: the generator, its own decoder, captions, PiD.

    What a part needs is gone before the next begins, unless `kept` keeps it.
    """

    def __init__(
        self,
        arguments: Namespace,
        manifest: Manifest,
        sampling: Sampling,
        backbone: Backbone,
        size: Size,
        steps: Steps,
        jobs: Sequence[Job],
        skipped: int,
        kept: Kept | None = None,
        save: Save = save_image,
    ) -> None:
        self.done: list[dict[str, Any]] = []
        self._kept, self._save = kept or Kept(), save
        self._arguments, self._manifest, self._sampling = arguments, manifest, sampling
        self._backbone, self._size, self._steps = backbone, size, steps
        self._jobs, self._skipped = jobs, skipped
        self._making = Making(arguments, manifest, sampling.schedule(manifest))
        self._caught: dict[tuple[int, int], Any] = {}  # by seed and step
        self._about: dict[str, Any] = {}
        self._guidance = backbone.guidance if arguments.guidance is None else arguments.guidance
        self._failed: list[dict[str, str]] = []

    def make(self, add: Callable[[Mapping[str, Any]], object] | None) -> None:
        """Make the pictures of all jobs; add: is given a line of results for each."""
        self._generate()
        self._decode(self._captions(), add)

    def make_on_ray(self, results: Results | None) -> None:
        """The same on a cluster, where any prompt that fails is reported and the rest is made."""
        found: dict[int, list[dict[str, Any]]] = {}
        plan = (self._sampling, self._backbone, self._size, self._steps)
        for outcome in spread(self._arguments, "Generating", partial(_Work, plan=plan), self._jobs):
            if outcome.reason is not None:
                self._fail(self._jobs[outcome.index], outcome.reason)
                continue
            found[outcome.index], lines = outcome.made
            if results is not None:
                for line in lines:
                    results.add(line)
            outcome.write()
        self.done += [each for _, made in sorted(found.items()) for each in made]
        if results is not None:
            results.put_in_order()

    def _generate(self) -> None:
        """Keep latents of all prompts; writes the baselines too."""
        from pid_pipelines.generators import (
            OpenGenerator,
            find_generator,
            load_generator,
            quiet_libraries,
            space_of,
        )

        arguments, backbone = self._arguments, self._backbone
        device = torch_device(arguments.backend, arguments.device)
        quiet_libraries()
        source = find_generator(backbone, arguments.model)
        self._about = {
            "backbone": backbone.name,
            "model": source.model,
            "revision": source.revision,
            "dtype": arguments.generator_dtype,
            "steps": self._steps.count,
            "guidance": self._guidance,
            "width": self._size.generated[1],
            "height": self._size.generated[0],
        }

        def open_generator() -> OpenGenerator:
            with self._progress("Loading the generator", None):
                pipe = load_generator(
                    backbone,
                    source,
                    dtype=arguments.generator_dtype,
                    device=device,
                    offload=arguments.offload,
                )
            check_space(self._manifest, space_of(pipe), source.model)
            return OpenGenerator(pipe, device)

        with self._kept.part("generator", open_generator) as generator:
            self._run_generator(generator.pipe)
            if arguments.baseline:
                open_vae = generator.copy_vae if self._kept.keeps else generator.become_vae
                with self._kept.part("vae", open_vae) as vae:
                    self._draw_baselines(vae)

    def _run_generator(self, pipe: Any) -> None:
        import torch

        from pid_pipelines.generator_run import run

        backbone, steps = self._backbone, self._steps
        total = steps.run * len(self._jobs)
        with self._progress("Generating", total) as advance:
            for job in self._jobs:
                call: dict[str, Any] = {
                    backbone.prompt_argument: job.prompt,
                    backbone.guidance_argument: self._guidance,
                    **backbone.extra,
                    "num_inference_steps": steps.count,
                    "height": self._size.generated[0],
                    "width": self._size.generated[1],
                    "generator": torch.Generator("cpu").manual_seed(job.seed),
                }
                with self._reporting(job):
                    for caught in run(
                        pipe,
                        SPACES[backbone.space],
                        call,
                        at=[picture.step for picture in job.pictures],
                        stop_at=steps.run if steps.run < steps.count else None,
                        progress=advance,
                    ):
                        self._caught[job.seed, caught.step] = caught

    def _draw_baselines(self, vae: Any) -> None:
        total = sum(len(job.pictures) for job in self._jobs)
        with self._progress("Decoding as the generator does", total) as advance:
            for job in self._jobs:
                for picture in job.pictures:
                    caught = self._caught.get((job.seed, picture.step))
                    if caught is not None and picture.baseline is not None:
                        image = np.clip(vae.decode(caught.latent), -1, 1)
                        self._save(picture.baseline, to_uint8(image)[0], None)
                    advance(1)

    def _captions(self) -> dict[str, Floats]:
        """The caption embeddings of all prompts, `[1, T, D]`; none where none are wanted."""
        if self._manifest.model.get("captioned") is False:
            return {}
        made = [job for job in self._jobs if self._is_generated(job)]
        texts = list(dict.fromkeys(job.prompt for job in made))
        return encode_captions(self._arguments, self._manifest, texts, self._kept) if texts else {}

    def _decode(
        self, captions: dict[str, Floats], add: Callable[[Mapping[str, Any]], object] | None
    ) -> None:
        """Make the pictures."""
        arguments = self._arguments
        jobs = [job for job in self._jobs if self._is_generated(job)]
        if not jobs:
            return
        total = sum(len(job.pictures) for job in jobs)
        with (
            self._kept.part("decoder", lambda: open_decoder(arguments, self._manifest)) as decoder,
            self._progress("Decoding", total) as advance,
        ):
            for job in jobs:
                with self._reporting(job):
                    for picture in job.pictures:
                        caught = self._caught[job.seed, picture.step]
                        begin = time.perf_counter()
                        pixels = decoder.decode(
                            caught.latent,
                            captions.get(job.prompt),
                            sigma=caught.sigma,
                            seed=job.seed,
                            **self._sampling.options,
                            output="uint8",
                            progress=lambda _done, calls: advance(1 / calls),
                        )
                        seconds = time.perf_counter() - begin
                        height, width = self._size.decoded
                        about: dict[str, Any] = {
                            "seed": job.seed,
                            "sigma": caught.sigma,
                            "width": width,
                            "height": height,
                            "prompt": job.prompt,
                            "generator": {**self._about, "decoded_step": caught.step},
                        }
                        files = {"image": picture.image.name}
                        if picture.baseline is not None:
                            files["vae"] = picture.baseline.name
                        if add is not None:
                            add({**files, **about, **self._making.common, **self._with()})
                        self._save(picture.image, pixels[0], self._making.record(**about))
                        self.done.append(
                            {
                                **about,
                                "image": str(picture.image),
                                "vae": picture.baseline and str(picture.baseline),
                                "seconds": round(seconds, 4),
                            }
                        )

    def report(self) -> int:
        """Print what was made, and what was not; 1 if a prompt failed."""
        arguments, steps = self._arguments, self._steps
        saved = steps.count - steps.run
        result = {
            "bundle": str(arguments.bundle),
            **self._making.common,
            "generator_steps": steps.count,
            "generator_steps_run": steps.run,
            "generator_steps_saved": saved,
            "images": self.done,
            "skipped": self._skipped,
            "failed": self._failed,
        }
        lines = [
            f"{each['image']}: {each['width']}x{each['height']}, sigma {each['sigma']:.3g}, seed "
            f"{each['seed']}, {each['seconds']:.2f} s"
            for each in self.done
        ]
        if saved and self.done:
            lines.append(
                f"the generator stopped after {steps.run} of {steps.count} steps: {saved} saved "
                "for each prompt"
            )
        if self._skipped:
            lines.append(f"{self._skipped} pictures were there already")
        if self._failed:
            lines.append(f"{len(self._failed)} of {len(self._jobs)} prompts failed")
        console.emit(result, "\n".join(lines), as_json=arguments.json)
        return 1 if self._failed else 0

    def _is_generated(self, job: Job) -> bool:
        return all((job.seed, picture.step) in self._caught for picture in job.pictures)

    def _with(self) -> dict[str, Any]:
        """With what a picture was made, for the file of results."""
        versions = {"pid-trt": __version__, **{name: version(name) for name in _PACKAGES}}
        return {
            "bundle": str(self._arguments.bundle),
            "encoder": self._arguments.encoder,
            "versions": versions,
        }

    @contextlib.contextmanager
    def _reporting(self, job: Job) -> Generator[None, None, None]:
        """Report a prompt that fails and go on, if it is one of several."""
        try:
            yield
        except InputError as error:
            if len(self._jobs) == 1:
                raise
            self._fail(job, str(error))

    def _fail(self, job: Job, reason: str) -> None:
        _log.error("%r: %s", job.prompt, reason)
        self._failed.append({"prompt": job.prompt, "reason": reason})

    def _progress(self, label: str, total: float | None) -> Any:
        return console.progress(label, total, quiet=self._arguments.quiet)


class _Work:
    """What an actor holds: generator, its decoder, captioner and PiD, from its first item on."""

    def __init__(self, arguments: Namespace, plan: tuple[Sampling, Backbone, Size, Steps]) -> None:
        console.need_packages(_PACKAGES, "pipelines")
        self._arguments, self._plan = arguments, plan
        self._manifest = read_manifest(arguments.bundle, verify=False)
        self._kept = Kept(keeps=True)

    def make(self, item: Job, save: Save) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
        """What is told of the pictures, and their lines of results."""
        lines: list[Mapping[str, Any]] = []
        run = _Run(self._arguments, self._manifest, *self._plan, [item], 0, self._kept, save)
        run.make(lines.append)
        return run.done, lines

    def close(self) -> None:
        self._kept.close()


def _size(text: str) -> tuple[int, int]:
    try:
        return console.read_size(text)
    except PidRuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1000, but got {text!r}")
    return int(text)


def _step(text: str) -> int | str:
    return EARLY if text == EARLY else _count(text)


def _steps(text: str) -> tuple[int | str, ...]:
    return tuple(END if part == END else _step(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
