"""`Bundle`, opened, and `Decoder`s of it, which turn latents into images."""

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pid_runtime.advice import advice
from pid_runtime.backends.choice import choose_graphs, device_name
from pid_runtime.backends.graphs import LoadedGraphs
from pid_runtime.backends.memory import Block
from pid_runtime.bundle.folder import check_files, read_constants, read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.bundle.sizes import Sizes
from pid_runtime.denoise import Canvas, denoise_in_arena
from pid_runtime.errors import (
    NotFiniteError,
    OutOfMemoryError,
    PidRuntimeError,
    memory_shortage,
)
from pid_runtime.interpreter import Program, graph_calls
from pid_runtime.latents import spread_warning
from pid_runtime.nano import codec
from pid_runtime.nano.block_dct import LATENT_PIXEL
from pid_runtime.nano.photos import padded, read_photo
from pid_runtime.plan import Plan, plan_of
from pid_runtime.request import (
    Request,
    check_request,
    empty_caption,
    outline_request,
    smaller_tiles,
)
from pid_runtime.schedule import Rule
from pid_runtime.tiles import TileOption, described, pixels_per_latent_pixel

Progress = Callable[[int, int], None]

OUTPUTS = ("float32", "uint8", "pil")

_log = logging.getLogger(__name__)


class Bundle:
    """A bundle, opened on one backend: what its decoders share, weights above all.

    Serves any number of threads, each with a decoder of its own. It may be closed before they are:
    graphs and weights are released with the last of them.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        graphs: LoadedGraphs,
        constants: Mapping[str, NDArray[np.float32]],
        backend: str = "",
        device: str = "",
    ) -> None:
        """Wrap loaded graphs; most callers want `Bundle.open`."""
        self.path, self.manifest, self.graphs, self.constants = path, manifest, graphs, constants
        self.backend, self.device = backend, device
        self._lock = threading.Lock()
        self._is_open = True
        self._users = 1  # who opened it, and its decoders

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        backend: str = "onnxruntime",
        device: Any = None,
        *,
        threads: int | None = None,
        verify: bool = True,
        engines: str | None = None,
        cuda_graphs: bool = True,
        manifest: Manifest | None = None,
    ) -> "Bundle":
        """Open a bundle.

        backend: "onnxruntime", "torch", "tensorrt", or "tensorrt-rtx", which takes engines of
        TensorRT for RTX alone. device: for onnxruntime a provider, "cpu"
        (default), "cuda", "cuda:1" or a provider's full name; for torch a torch device, or its
        name; for tensorrt a GPU, "cuda:0" (default). threads: CPU threads, all when None; for
        torch of the whole process. verify: check the SHA-256 of every file, not only its size.
        engines: for tensorrt, the engine set to run; None for the first that this GPU and the
        libraries installed run, which the log names. cuda_graphs: for tensorrt, replay the steps
        as CUDA graphs from the second decode in a shape on. manifest: the bundle's, if it has been
        read already.
        Raises `PidRuntimeError` for a broken bundle or a backend that is not there, and
        `OutOfMemoryError`, one of these, for too little memory.
        """
        path = Path(bundle).expanduser()
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise PidRuntimeError(
                "expected a bundle's path in UTF-8, as the backends need it, but got "
                f"{str(path)!r}; rename the folder"
            ) from None
        device = device_name(backend, device)
        if manifest is None:
            manifest = read_manifest(path, verify)
        elif verify:
            check_files(path, manifest, verify)
        graphs = choose_graphs(
            path,
            manifest,
            backend,
            device,
            threads=threads,
            verify=verify,
            engines=engines,
            cuda_graphs=cuda_graphs,
        )
        try:
            graphs.load()
            constants = read_constants(path, graphs.manifest)
        except Exception as error:
            reason = memory_shortage(error)
            if reason is None:
                raise
            graphs.close()
            raise OutOfMemoryError(
                f"expected enough memory to open {path}, whose weights are "
                f"{_weight_bytes(manifest) / 1e9:.2f} GB, but got {reason}; end other programs, or "
                "take a machine with more"
            ) from None
        return cls(path, manifest, graphs, constants, backend, device)

    def decoder(self) -> "Decoder":
        """One more decoder, for one thread. Raises `PidRuntimeError` when the bundle is closed."""
        with self._lock:
            if not self._is_open:
                raise PidRuntimeError(f"expected {self.path} to be open, but it was closed")
            self._users += 1
        try:
            return Decoder(self)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Take one user away; graphs and weights go with the last. For `close` and decoders."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self.graphs.close()

    def __repr__(self) -> str:
        return f"<Bundle {_described(self)}>"

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make no more decoders, and release graphs and weights when none is left."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self.release()


class Decoder:
    """Decodes latents with one bundle on one backend.

    The arena is allocated for the first shape decoded and kept: a shape that fits decodes in the
    same memory, a larger one replaces it, and only a change of shape rebinds the program. A
    decoder serves one thread at a time; use one decoder of a `Bundle` per thread.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Most callers want `Decoder.open`, or `Bundle.decoder`."""
        self.manifest = bundle.manifest
        self._as_run = bundle.graphs.manifest
        self._bundle = bundle
        self.memory = bundle.graphs.memory()
        self.graphs = bundle.graphs.graphs(self.memory)
        self._block: Block | None = None
        self._block_bytes = 0
        self._program: Program | None = None
        self._canvas: Canvas | None = None  # of the decode that runs, if it is not plain
        self._state_in_arena = False
        self._is_open = True
        self._busy = threading.Lock()
        self._told: set[str] = set()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        backend: str = "onnxruntime",
        device: Any = None,
        *,
        threads: int | None = None,
        verify: bool = True,
        engines: str | None = None,
        cuda_graphs: bool = True,
        manifest: Manifest | None = None,
    ) -> "Decoder":
        """Open a bundle for one decoder alone; arguments and errors as of `Bundle.open`."""
        opened = Bundle.open(
            bundle,
            backend,
            device,
            threads=threads,
            verify=verify,
            engines=engines,
            cuda_graphs=cuda_graphs,
            manifest=manifest,
        )
        with opened:
            return opened.decoder()

    @property
    def device(self) -> str:
        """Where it decodes: "cpu", "cuda:0", or the name of an ONNX Runtime provider."""
        return self._bundle.device

    def __repr__(self) -> str:
        return f"<Decoder {_described(self._bundle)}{'' if self._is_open else ', closed'}>"

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the arena; the decoder cannot be used afterwards. Again does nothing.

        Raises `PidRuntimeError` while a decode runs, as from its progress callback.
        """
        if not self._is_open:
            return
        self._begin("close it when the decode has ended")
        try:
            self._is_open = False
            self._program = self._block = None
            self.graphs.close()
            self._bundle.release()
        finally:
            self._busy.release()

    def decode(
        self,
        latent: Any,
        caption: Any = None,
        *,
        sigma: Any = 0.0,
        seed: Any = 0,
        noise: Any = None,
        step_noise: Sequence[Any] | None = None,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        rule: Rule | None = None,
        negative: Any = None,
        guidance: float | None = None,
        tile: TileOption = None,
        overlap: int | None = None,
        output: Literal["float32", "uint8", "pil"] = "float32",
        dlpack: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Decode latents to images.

        Arrays are numpy or anything with DLPack, such as torch tensors on any device.

        latent: float `[B, C, h, w]`, normalised as `manifest.model["latent_convention"]` says.
        caption: float `[B, T, text_dim]`, T at most `text_max_length`; or `[1, T, text_dim]` for
        the whole batch; None for the empty embedding (see `empty_caption`), which costs quality.
        sigma: noise level of the latent in [0, 1], one or B of them; 0 is clean, trained to 0.8.
        seed: 64-bit; image b of a batch uses seed + b, or give B seeds. Every backend draws the
        same noise from it. A `torch.Generator`, or B of them, stands for the seed that it was
        given; None for a random one, which the log tells.
        noise: `[B, 3, H, W]` float32 standard normal, in place of the seed's first draw;
        step_noise: `steps - 1` of the same, in place of the later draws.
        steps: 1, 2 or 4, of undistilled bundles 1 to 100; the bundle's default when None. times:
        the times to visit, descending from at most 1 to 0, only for bundles exported with
        --arbitrary-timesteps.
        rule: "sde" (distilled students), "ode" or "dpm++2m" (undistilled networks); the bundle's
        default when None.
        guidance: of undistilled bundles, how much more of the caption than of `negative`, from 1
        (the caption alone, half the work) to 100; the bundle's default when None. negative: a
        caption embedding as `caption`, of as many tokens.
        tile: decode in tiles within each step, every one run as an image of its own: "auto" for
        pictures that no bucket holds, that are larger than the decoder was trained for or than
        memory allows, as the log then says; or width and height in pixels of the result, multiples
        of `side` = `tokens_per_latent * patch_size`. overlap: of neighbours, in the same pixels,
        the least; 8 `side` when None.
        progress: called with (calls of the network done, all calls): steps, times tiles, times 2
        with guidance. What it raises ends the decode.

        Returns float32 `[B, 3, H, W]` in [-1, 1], or uint8 `[B, H, W, 3]`; a new numpy array, or
        with `dlpack` an object with `__dlpack__` on the backend's device. With output "pil" it
        returns a list of B `PIL.Image.Image`.
        Warns in the log, once each, of what runs but not as well as it could: a size, noise level
        or spread of the latent that the decoder was not trained on, and no caption.
        Raises `PidRuntimeError` for an input that does not fit the bundle; nothing is run then.
        Raises `NotFiniteError`, one of these, for NaN or infinity in the image, naming the step,
        and `OutOfMemoryError`, another, when memory runs out; the decoder decodes what fits.
        """
        request = check_request(
            self.manifest,
            latent,
            caption,
            sigma=sigma,
            seed=seed,
            noise=noise,
            step_noise=step_noise,
            steps=steps,
            times=times,
            rule=rule,
            negative=negative,
            guidance=guidance,
            tile=tile,
            overlap=overlap,
        )
        self.warn(self._advice(request, has_caption=caption is not None))
        return self.run(request, output, dlpack=dlpack, progress=progress)

    def run(
        self,
        request: Request,
        output: Literal["float32", "uint8", "pil"] = "float32",
        *,
        dlpack: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Decode what `check_request` returned for this bundle; as `decode`, but without advice."""
        if output not in OUTPUTS:
            raise PidRuntimeError(f"expected output {' or '.join(OUTPUTS)}, but got {output!r}")
        if dlpack and output == "pil":
            raise PidRuntimeError("expected no dlpack for output pil, but got both; drop one")
        if not self._is_open:
            raise PidRuntimeError("expected an open decoder, but it was closed; open another")
        self._begin("use a decoder of the bundle for each thread")
        try:
            image = self._run_in_memory(request, output, dlpack, progress)
        finally:
            self._busy.release()
        return [Image.fromarray(each) for each in image] if output == "pil" else image

    def plan(
        self,
        height: int,
        width: int,
        *,
        batch: int = 1,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        rule: Rule | None = None,
        guidance: float | None = None,
        tile: TileOption = None,
        overlap: int | None = None,
    ) -> Plan:
        """What a decode to `height` x `width` pixels would take; nothing is run.

        The other arguments as of `decode`; guidance needs no negative here. Raises
        `PidRuntimeError` as `decode` does, and for sides that are no multiples of a latent pixel's.
        """
        request = outline_request(
            self.manifest,
            height,
            width,
            batch=batch,
            steps=steps,
            times=times,
            rule=rule,
            guidance=guidance,
            tile=tile,
            overlap=overlap,
        )
        on_device = self._blends and self.device != "cpu"
        return plan_of(self._as_run, self._together(request), self.graphs.bucket_for, on_device)

    def _run_in_memory(
        self, request: Request, output: str, dlpack: bool, progress: Progress | None
    ) -> Any:
        """Decode a request, in smaller tiles where it may choose and memory is short."""
        request = self._together(request)
        self._tell(request)
        state_on_host = not self._blends
        while True:
            try:
                return self._run(request, output, dlpack, progress, state_on_host)
            except Exception as error:
                reason = memory_shortage(error)
                if reason is None or isinstance(error, PidRuntimeError):
                    raise
                self._program = self._block = None
                if request.branches_at_once:
                    request = replace(request, branches_at_once=False)
                    continue
                if not request.is_plain and not state_on_host and self.device != "cpu":
                    _log.info("Keeping the state on the host: the device has %s", reason)
                    state_on_host = True
                    continue
                smaller = smaller_tiles(self.manifest, request)
                if smaller is None or not request.is_automatic:
                    message = self._too_large(request, smaller, reason)
                    raise OutOfMemoryError(message) from None
            finally:
                self._canvas = None
            request = smaller
            self._tell(request)

    @property
    def _blends(self) -> bool:
        """Whether the state of a decode that is not plain can lie in the decoder's memory."""
        return self.memory.blending is not None

    def _together(self, request: Request) -> Request:
        """The same decode with its branches as one batch, where that may gain.

        Not in tiles: each is work enough, and every step would look at its latent twice.
        """
        if not self.graphs.batches_gain or request.tiling or len(request.branches) == 1:
            return request
        return replace(request, branches_at_once=True)

    def _tell(self, request: Request) -> None:
        """Log what was chosen, and why."""
        if request.is_automatic and request.tiling is not None:
            text = described(request.tiling, pixels_per_latent_pixel(self.manifest))
            _log.info("Decoding in %s: %s", text, request.tiling.reason)

    def _begin(self, fix: str) -> None:
        """Keep other calls out. Raises `PidRuntimeError` if one is in."""
        if not self._busy.acquire(blocking=False):
            raise PidRuntimeError(
                f"expected one call at a time, but a decode runs in this decoder; {fix}"
            )

    def encode(self, image: Any, *, sigma: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
        """Latents of images, for a bundle with a codec: float32 `[B, C, H / 8, W / 8]`.

        image: float `[B, 3, H, W]` in [-1, 1] or uint8 `[B, H, W, 3]`, as `decode` gives them; H
        and W are multiples of 8. Or a photo, as the path of a file or a `PIL.Image.Image`: its last
        row and column are repeated up to such multiples.
        sigma: in [0, 1], noise to add as in a partly denoised latent, (1 - sigma) latent + sigma
        noise, to be given to `decode` too. seed: of that noise, seed + b for image b; `decode` may
        have the same, it draws other numbers.
        Raises `PidRuntimeError` for another image, or a bundle without a codec.
        """
        if isinstance(image, str | os.PathLike | Image.Image):
            image = padded(read_photo(image), LATENT_PIXEL)[None]
        return codec.encode(self.manifest, image, sigma, seed)

    def native_decode(self, latent: Any) -> NDArray[np.float32]:
        """What the codec alone makes of latents `[B, C, h, w]`: float32 `[B, 3, 8 h, 8 w]`.

        This is what a VAE's decoder is elsewhere: the encoded image with less detail, about in
        [-1, 1] (not clamped). Raises `PidRuntimeError` as `encode` does.
        """
        return codec.native_decode(self.manifest, latent)

    def empty_caption(self) -> NDArray[np.float32]:
        """The caption embedding that stands for none: zeros `[1, text_max_length, text_dim]`."""
        return empty_caption(self.manifest)

    def state(self) -> NDArray[np.float32]:
        """The sampler's state after the last step run, `[B, L, P * P, 3]` float32 in token layout.

        Meant for tests and previews, from inside a progress callback; of a decode in tiles or with
        guidance, or by dpm++2m, it is kept no longer than that. Raises `PidRuntimeError` where
        there is none.
        """
        if self._canvas is not None:
            return self._canvas.state()
        if self._program is None or not self._state_in_arena:
            ended = (
                ", but the last one was in tiles or with guidance and has ended; read it in a "
                "progress callback"
            )
            raise PidRuntimeError(
                f"expected a decode before its state is read{ended if self._program else ''}"
            )
        state = self.memory.read(self._program.buffer("state"))
        return state.reshape(*state.shape[:2], -1, 3)

    def warn(self, lines: Iterable[str]) -> None:
        """Warn in the log of what this decoder has not warned of before."""
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                _log.warning("%s", line)

    def _advice(self, request: Request, *, has_caption: bool) -> list[str]:
        """What to say about a decode that will run, but not as well as it could."""
        size = (request.sizes.value("W"), request.sizes.value("H"))
        largest_sigma = float(request.sigmas.max())
        lines = advice(self.manifest.model, size, largest_sigma, has_caption=has_caption)
        spread = spread_warning(self.manifest, request.latent)
        return lines if spread is None else [*lines, spread]

    def _run(
        self,
        request: Request,
        output: str,
        dlpack: bool,
        progress: Progress | None,
        state_on_host: bool,
    ) -> Any:
        """Decode a request. state_on_host: where that is of a decode that is not plain."""
        self._state_in_arena = False
        memory, program = self.memory, self._bind(request.program_sizes)
        if not request.is_plain:
            self._canvas = Canvas(program, request, on_host=state_on_host)
        self._state_in_arena = self._canvas is None
        self._denoise(program, request, progress)
        if not self._is_finite(program):
            raise NotFiniteError(self._first_not_finite(program, request))
        name = "image" if output == "float32" else "image_bytes"
        if self._canvas is None:
            program.run(name)
            image = program.buffer(name)
            return memory.clone(image) if dlpack else memory.read(image)
        pixels = self._canvas.image() if output == "float32" else self._canvas.image_bytes()
        self._canvas = None  # before more is allocated
        if not dlpack:
            return pixels
        block = memory.allocate(pixels.nbytes)
        target = memory.tensor(block, 0, str(pixels.dtype), pixels.shape)
        memory.write(target, pixels)
        return target

    def _denoise(self, program: Program, request: Request, progress: Progress | None) -> None:
        """From a request's inputs to the state after its last step."""
        done = itertools.count(1)

        def report() -> None:
            if progress is not None:
                self.memory.synchronize()
                progress(next(done), request.calls)

        if self._canvas is None:
            denoise_in_arena(program, request, report)
        else:
            self._canvas.denoise(report)

    def _is_finite(self, program: Program) -> bool:
        """Whether the state has neither NaN nor infinity."""
        if self._canvas is None:
            return self.memory.is_finite(program.buffer("state"))
        return self._canvas.is_finite

    def _first_not_finite(self, program: Program, request: Request) -> str:
        """What to say of NaN or infinity: the decode runs again, and every step is looked at."""
        steps = request.schedule.steps
        bad: list[int] = []

        def look(call: int, calls: int) -> None:
            if not bad and call % (calls // steps) == 0 and not self._is_finite(program):
                bad.append(call * steps // calls)

        self._denoise(program, request, look)
        fix = "check the bundle with pid-verify"
        if self.manifest.precision == "fp16":
            fix = "float16 may have overflowed: export with --precision bf16, or " + fix
        return (
            f"expected a finite image, but step {bad[0] if bad else steps} of {steps} gave NaN or "
            f"infinity; {fix}"
        )

    def _too_large(self, request: Request, smaller: Request | None, reason: str) -> str:
        """What to say of a shape that memory does not suffice for."""
        sizes = request.program_sizes
        tokens, batch = sizes.value("L"), sizes.value("B")
        bucket = self.graphs.bucket_for(tokens)
        fitting = [
            (each.max_tokens, name)
            for name, each in self.manifest.buckets.items()
            if each.max_tokens < bucket.max_tokens
        ]
        cures = ["a smaller batch"] if batch > 1 else []
        if fitting:
            most, name = max(fitting)
            cures.append(f"at most {self.manifest.megapixels(most)}: bucket {name}")
        if smaller is not None:
            height, width = smaller.program_sizes.shape(("H", "W"))
            cures.append(f"in tiles, of {width}x{height} for example")
        return (
            f"expected enough memory for {batch} x {self.manifest.megapixels(tokens)} "
            f"({Program.arena_bytes(bucket, sizes) / 1e9:.2f} GB for the arena, and what the "
            f"graphs work in), but got {reason}; decode {' or '.join(cures or ['a smaller shape'])}"
        )

    def _bind(self, sizes: Sizes) -> Program:
        """The program at these sizes: the one of the last decode if they have not changed."""
        if self._program is not None and self._program.sizes == sizes:
            return self._program
        bucket = self.graphs.bucket_for(sizes.value("L"))
        needed = Program.arena_bytes(bucket, sizes)
        self._program = None
        fits = self._block is not None and needed <= self._block_bytes
        if not fits:
            self._block = None  # give the old arena back before asking for the new one
        calls = graph_calls(self._as_run, bucket, sizes)
        self.graphs.prepare(calls, 0 if fits else needed, sizes.value("B"))
        if not fits:
            self._block, self._block_bytes = self.memory.allocate(needed), needed
        self._program = Program(
            self._as_run,
            self.graphs,
            self.memory,
            bucket,
            sizes,
            self._block,
            self._bundle.constants,
        )
        return self._program


def _described(bundle: Bundle) -> str:
    name = bundle.manifest.model.get("name", "unnamed")
    where = f" on {bundle.backend} {bundle.device}" if bundle.backend else ""
    return f"{str(bundle.path)!r}: {name}, {bundle.manifest.precision}{where}"


def _weight_bytes(manifest: Manifest) -> int:
    return sum(record.bytes for record in manifest.files.values())
