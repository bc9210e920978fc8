"""`Decoder`: a bundle, opened, turning latents into images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pid_runtime.errors import PidRuntimeError
from pid_runtime.interpreter import Program
from pid_runtime.manifest import (
    Manifest,
    Noise,
    Sizes,
    read_constants,
    read_manifest,
    sizes_of_request,
)
from pid_runtime.session import Block, Session, as_array

Rule = Literal["sde", "ode"]
Progress = Callable[[int, int], None]

BACKENDS = ("onnxruntime", "torch")


class Decoder:
    """Decodes latents with one bundle on one backend.

    The arena is allocated for the first shape decoded and kept: a shape that fits decodes in the
    same memory, a larger one replaces it, and only a change of shape rebinds the program. A
    decoder serves one thread at a time; use one decoder per thread.
    """

    def __init__(
        self, manifest: Manifest, session: Session, constants: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Wrap an open session; most callers want `Decoder.open`."""
        self.manifest = manifest
        self._session = session
        self._constants = constants
        self._block: Block | None = None
        self._block_bytes = 0
        self._program: Program | None = None

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        backend: str = "onnxruntime",
        device: str | None = None,
        *,
        threads: int | None = None,
        verify: bool = True,
    ) -> "Decoder":
        """Open a bundle.

        backend: "onnxruntime" or "torch". device: for onnxruntime a provider, "cpu" (default),
        "cuda", "cuda:1" or a provider's full name; for torch a torch device. threads: CPU threads
        of ONNX Runtime, set by the first decoder of a process; all when None. verify: check the
        SHA-256 of every file, not only its size.
        Raises `PidRuntimeError` for a broken bundle or a backend that is not there.
        """
        path = Path(bundle)
        manifest = read_manifest(path, verify)
        if backend == "onnxruntime":
            from pid_runtime.backend_onnxruntime import OnnxRuntimeSession

            provider, _, ordinal = (device or "cpu").partition(":")
            if not (ordinal or "0").isdecimal():
                raise PidRuntimeError(f"expected a device such as cuda:0, but got {device!r}")
            session = OnnxRuntimeSession(path, manifest, provider, int(ordinal or 0), threads)
        elif backend == "torch":
            try:
                from pid_runtime.backend_torch import TorchSession
            except ImportError:
                raise PidRuntimeError(
                    "the torch backend needs PyTorch: pip install 'pid-trt[torch]'"
                ) from None
            session = TorchSession(path, manifest, device or "cpu")
        else:
            raise PidRuntimeError(
                f"expected a backend of {', '.join(BACKENDS)}, but got {backend!r}"
            )
        return cls(manifest, session, read_constants(path, manifest))

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs and the arena; the decoder cannot be used afterwards."""
        self._program = self._block = None
        self._session.close()

    def decode(
        self,
        latent: Any,
        caption: Any = None,
        *,
        sigma: float | Sequence[float] | NDArray[np.float32] = 0.0,
        seed: int | Sequence[int] = 0,
        noise: Any = None,
        step_noise: Sequence[Any] | None = None,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        rule: Rule = "sde",
        output: Literal["float32", "uint8"] = "float32",
        dlpack: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Decode latents to images.

        Arrays are numpy or anything with DLPack.

        latent: float `[B, C, h, w]`, normalised as `manifest.model["latent_convention"]` says.
        caption: float `[B, T, text_dim]`, T at most `text_max_length`; or `[1, T, text_dim]` for the
        whole batch; None for the empty embedding (see `empty_caption`), which costs quality.
        sigma: noise level of the latent in [0, 1], one or B of them; 0 is clean, trained to 0.8.
        seed: 64-bit; image b of a batch uses seed + b, or give B seeds. Every backend draws the
        same noise from it. noise: `[B, 3, H, W]` float32 standard normal, in place of the seed's
        first draw; step_noise: `steps - 1` of the same, in place of the later draws.
        steps: 1, 2 or 4; the bundle's default when None. times: the times to visit, descending
        from at most 1 to 0, only for bundles exported with --arbitrary-timesteps.
        rule: "sde" (distilled students) or "ode". progress: called with (steps done, steps).

        Returns float32 `[B, 3, H, W]` in [-1, 1], or uint8 `[B, H, W, 3]`; a new numpy array, or
        with `dlpack` an object with `__dlpack__` on the backend's device.
        Raises `PidRuntimeError` for an input that does not fit the bundle; nothing is run then.
        """
        if output not in ("float32", "uint8"):
            raise PidRuntimeError(f"expected output float32 or uint8, but got {output!r}")
        if rule not in ("sde", "ode"):
            raise PidRuntimeError(f"expected rule sde or ode, but got {rule!r}")
        network = self.manifest.network
        latent = self._check_array(latent, "latent", 4, 1, network["latent_channels"])
        batch = latent.shape[0]
        if caption is None:
            caption = self.empty_caption()
        caption = self._check_array(caption, "caption", 3, 2, network["text_dim"])
        if caption.shape[0] == 1:
            caption = np.broadcast_to(as_array(caption), (batch, *caption.shape[1:]))
        if caption.shape[0] != batch or not 1 <= caption.shape[1] <= network["text_max_length"]:
            raise PidRuntimeError(
                f"expected a caption of shape ({batch}, 1 to {network['text_max_length']}, "
                f"{network['text_dim']}), but got {tuple(caption.shape)}"
            )
        sigmas = self._check_sigma(sigma, batch)
        seeds = _check_seeds(seed, batch)
        rows, updates = self._schedule(steps, times, rule)
        sizes = sizes_of_request(
            network,
            self.manifest.tokens_per_latent,
            batch=batch,
            latent_height=latent.shape[2],
            latent_width=latent.shape[3],
            text_tokens=caption.shape[1],
            rows=self._table_rows(len(rows)),
        )
        image_shape = (batch, 3, sizes.value("H"), sizes.value("W"))
        given = _check_noise(noise, step_noise, image_shape, len(rows), rule)
        program = self._bind(sizes)

        def fill(session: Session, bound: Program, instruction: Noise, draw: int) -> None:
            if draw and updates[draw - 1, 2] == 0:  # not used, but must not hold a NaN
                session.fill_zero(bound.buffer(instruction.target))
            elif given[draw] is not None:
                bound.load_noise(instruction, given[draw])
            else:
                bound.fill_noise(instruction, seeds, draw)

        session = self._session
        session.write(program.buffer("latent"), latent)
        session.write(program.buffer("caption"), caption)
        session.write(program.buffer("sigma"), sigmas)
        session.write(program.buffer("update"), _padded(updates, sizes.value("N")))
        program.run("prologue", noise=lambda s, p, i, _: fill(s, p, i, 0))
        if not self.manifest.sampler.times:
            moments = np.asarray(times, np.float32)[:-1, None] * np.float32(1000)
            session.write(program.buffer("timestep"), _padded(moments, sizes.value("N")))
            for row in rows:
                program.run("timestep", row=row, step=row)
        for step, row in enumerate(rows):
            program.run("step", row, step, lambda s, p, i, k: fill(s, p, i, k + 1))
            if progress is not None:
                progress(step + 1, len(rows))
        program.run("image" if output == "float32" else "image_bytes")
        image = program.buffer("image" if output == "float32" else "image_bytes")
        return session.clone(image) if dlpack else session.read(image)

    def empty_caption(self) -> NDArray[np.float32]:
        """The caption embedding that stands for none: zeros `[1, text_max_length, text_dim]`."""
        network = self.manifest.network
        return np.zeros((1, network["text_max_length"], network["text_dim"]), np.float32)

    def state(self) -> NDArray[np.float32]:
        """The sampler's state after the last step run, `[B, L, P * P, 3]` float32 in token layout.

        Meant for tests and previews, from inside a progress callback.
        """
        if self._program is None:
            raise PidRuntimeError("expected a decode before its state is read")
        state = self._session.read(self._program.buffer("state"))
        return state.reshape(*state.shape[:2], -1, 3)

    def _bind(self, sizes: Sizes) -> Program:
        """The program at these sizes: the one of the last decode if they have not changed."""
        if self._program is not None and self._program.sizes == sizes:
            return self._program
        _, bucket = self.manifest.bucket_for(sizes.value("L"))
        needed = Program.arena_bytes(bucket, sizes)
        self._program = None
        if self._block is None or needed > self._block_bytes:
            self._block = None  # give the old arena back before asking for the new one
            try:
                self._block, self._block_bytes = self._session.allocate(needed), needed
            except (MemoryError, RuntimeError) as error:
                raise PidRuntimeError(
                    f"expected {needed / 1e9:.2f} GB of memory for the arena, but got {error}; "
                    "decode a smaller shape or batch"
                ) from None
        self._program = Program(
            self.manifest, self._session, bucket, sizes, self._block, self._constants
        )
        return self._program

    def _check_array(self, source: Any, name: str, rank: int, axis: int, size: int) -> Any:
        """An input as an array on the host, or as it is when it lives on a device."""
        if "bfloat16" in str(getattr(source, "dtype", "")) and hasattr(source, "float"):
            source = source.float()  # numpy has no bfloat16
        on_host = not hasattr(source, "__dlpack_device__") or source.__dlpack_device__()[0] == 1
        array = as_array(source) if on_host else source
        shape = tuple(array.shape)
        if len(shape) != rank or shape[axis] != size or 0 in shape:
            wanted = ["B", "C", "h", "w"] if rank == 4 else ["B", "T", "D"]
            wanted[axis] = str(size)
            raise PidRuntimeError(
                f"expected a {name} of shape [{', '.join(wanted)}], but got {list(shape)}"
            )
        if "float" not in str(array.dtype):
            raise PidRuntimeError(f"expected a {name} of floats, but got {array.dtype}")
        if on_host and not np.isfinite(array).all():
            raise PidRuntimeError(f"expected a finite {name}, but it holds NaN or infinity")
        return array

    def _check_sigma(self, sigma: Any, batch: int) -> NDArray[np.float32]:
        sigmas = np.asarray(sigma, np.float32)
        if sigmas.shape not in ((), (1,), (batch,)):
            raise PidRuntimeError(f"expected one sigma or {batch}, but got shape {sigmas.shape}")
        if not ((sigmas >= 0) & (sigmas <= 1)).all():
            raise PidRuntimeError(f"expected sigma in [0, 1], but got {sigma}")
        return np.ascontiguousarray(np.broadcast_to(sigmas, (batch,)))

    def _schedule(
        self, steps: int | None, times: Sequence[float] | None, rule: Rule
    ) -> tuple[tuple[int, ...], NDArray[np.float32]]:
        """The table rows a decode visits and, per step, the three factors of the update."""
        sampler = self.manifest.sampler
        if sampler.times:
            if times is not None:
                raise PidRuntimeError(
                    "this bundle knows only its own times; export with --arbitrary-timesteps"
                )
            rows = sampler.schedules.get(str(sampler.steps if steps is None else steps))
            if rows is None:
                raise PidRuntimeError(
                    f"expected {', '.join(sampler.schedules)} steps, but got {steps}"
                )
            visited = [*(sampler.times[row] for row in rows), 0.0]
        else:
            if times is None:
                raise PidRuntimeError("this bundle takes any times: give `times`, ending in 0")
            visited = [float(t) for t in times]
            rows = tuple(range(len(visited) - 1))
            descending = all(a > b for a, b in zip(visited[:-1], visited[1:], strict=True))
            if not rows or visited[-1] != 0 or visited[0] > 1 or not descending:
                raise PidRuntimeError(
                    f"expected times descending from at most 1 to 0, but got {times}"
                )
            if len(rows) > sampler.max_steps:
                raise PidRuntimeError(
                    f"expected at most {sampler.max_steps} steps, but got {len(rows)}"
                )
        updates = [
            update_factors(t, u, rule) for t, u in zip(visited[:-1], visited[1:], strict=True)
        ]
        return rows, np.array(updates, np.float32)

    def _table_rows(self, steps: int) -> int:
        """N: rows of the modulation table, known times or this decode's own."""
        return len(self.manifest.sampler.times) or steps


def update_factors(t: float, t_next: float, rule: Rule) -> tuple[float, float, float]:
    """Factors of state, velocity and noise in the sampler's update from t to t_next.

    sde: x0 = x - t v, then (1 - t_next) x0 + t_next noise. ode: x + (t_next - t) v.
    """
    if rule == "ode":
        return 1.0, t_next - t, 0.0
    return 1.0 - t_next, -(1.0 - t_next) * t, t_next


def _padded(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """The same with zero rows below, as many as the buffer has."""
    full = np.zeros((rows, *values.shape[1:]), np.float32)
    full[: len(values)] = values
    return full


def _check_seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, Sequence) else [(seed + b) % 2**64 for b in range(batch)]
    if len(seeds) != batch or not all(0 <= s < 2**64 for s in seeds):
        raise PidRuntimeError(f"expected one seed or {batch} in [0, 2^64), but got {seed}")
    return seeds


def _check_noise(
    noise: Any, step_noise: Sequence[Any] | None, shape: tuple[int, ...], steps: int, rule: Rule
) -> list[Any]:
    """The noise image of every draw, None where the seed makes it."""
    later: list[Any] = [None] * (steps - 1) if step_noise is None else list(step_noise)
    if step_noise is not None and len(later) != steps - 1 and rule == "sde":
        raise PidRuntimeError(f"expected {steps - 1} step noises, but got {len(later)}")
    given = [noise, *later, None][: steps + 1]
    for image in given:
        if image is not None and tuple(image.shape) != shape:
            raise PidRuntimeError(f"expected noise of shape {shape}, but got {tuple(image.shape)}")
    return given
