"""What a case runs: a decode of one latent, made ready once and then timed as often as wanted.

All contenders of a network get the same latent, caption, weights and noise, so that their images
can be compared. The reference is handed its noise; a bundle's decode draws it, as it does for a
user, and that is part of its time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pid_bench.cascades import build_cascade
from pid_bench.cases import BACKENDS, PID, Backend, Case, tokens_of
from pid_bench.measure import WHOLE, Clock, EventClock, device_clock
from pid_bench.pid_stages import caption_tokens_of
from pid_ref.checkpoint import read_checkpoint, state_shapes
from pid_ref.config import PidConfig
from pid_ref.network import PidNet
from pid_ref.sampler import sample
from pid_ref.weights import RandomWeights
from pid_runtime.backends.choice import choose_graphs
from pid_runtime.backends.device import CudaDevice
from pid_runtime.backends.graphs import Call, Graphs, LoadedGraphs
from pid_runtime.backends.memory import Memory
from pid_runtime.backends.stages import DTYPES
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.folder import read_constants, read_manifest
from pid_runtime.bundle.manifest import PRECISIONS
from pid_runtime.decoder import Bundle
from pid_runtime.noise import image_noise

SEED = 0
"""Of inputs and noise, and of weights unless a bundle has others."""

RECOMPILES = 64
"""How often torch may compile one function anew: stages of one class differ in their options."""

SDPA_BACKENDS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "overrideable"}
"""torch's attentions, as it numbers them."""


@dataclass(frozen=True)
class Materials:
    """What a case needs besides its own description."""

    config: dict[str, Any]
    """Fields of `PidConfig`."""
    checkpoint: str = ""
    """Path of real weights; random ones when empty."""
    seed: int = SEED
    """Of random weights."""
    bundle: str = ""
    """Path of the bundle, for programs."""
    engines: str = ""
    """Name of the engine set in it, for TensorRT."""


@dataclass(frozen=True)
class Contender:
    """A decode, ready to run."""

    decode: Callable[[], Any]
    """Makes the image `[1, 3, H, W]`, float32, with spans for its stages."""
    clock: Clock
    attention: str
    """What computes attention."""
    close: Callable[[], None] = lambda: None


def make_contender(case: Case, materials: Materials) -> Contender:
    """Load weights and graphs. Raises what the libraries raise, and the packages' input errors."""
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    torch._dynamo.config.recompile_limit = RECOMPILES  # pyright: ignore[reportPrivateUsage]
    backend = BACKENDS[case.backend]
    if case.pipeline != PID:
        return _cascade(case, backend)
    if backend.network == "program":
        return _program(case, backend, materials)
    return _reference(case, backend, materials)


def _reference(case: Case, backend: Backend, materials: Materials) -> Contender:
    config = PidConfig(**materials.config)
    public = backend.network == "public"
    dtype = torch.float32 if public else _dtype(case.precision)
    source = _weights(config, materials)
    with torch.device("meta"):
        net = PidNet(config)
    state = {name: source[name].to(case.device, dtype) for name in net.state_dict()}
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False)
    latent, caption, sigma = inputs_of(case, config)
    noises = [
        torch.from_numpy(image_noise(SEED, draw, case.height, case.width, config.patch_size))[None]
        for draw in range(case.steps)
    ]
    first, *later = (noise.to(case.device) for noise in noises)
    clock = device_clock(case.device)
    _time(net, "step", backend, clock)
    autocast = torch.autocast(case.device, torch.bfloat16) if public else nullcontext()

    def decode() -> Tensor:
        with clock.span(WHOLE), torch.inference_mode(), autocast:
            image = sample(net, latent, caption, sigma, first, later, steps=case.steps)
            return image.clamp_(-1, 1)

    kind = torch.bfloat16 if public else dtype
    return Contender(decode, clock, _sdpa(case, config.num_heads, config.head_dim, kind))


def _program(case: Case, backend: Backend, materials: Materials) -> Contender:
    bundle = Path(materials.bundle)
    manifest = read_manifest(bundle, verify=False)
    device = backend.provider or case.device
    graphs = choose_graphs(
        bundle,
        manifest,
        backend.runtime,
        device,
        threads=case.threads or None,
        verify=False,
        engines=materials.engines or None,
    )
    graphs.load()
    config = PidConfig(**materials.config)
    attention = "ONNX Runtime"
    on_device = case.device == "cuda"
    clock = Clock(torch.cuda.synchronize) if on_device else Clock()
    if backend.runtime == "torch":
        from pid_runtime.backends.torch import LoadedStages

        if backend.compile == "inductor":
            cast(LoadedStages, graphs).compile()
        clock = device_clock(case.device)
        attention = _sdpa(case, config.num_heads, config.head_dim, _dtype(case.precision))
    elif backend.runtime == "tensorrt":
        clock = EventClock()
        bucket = read_engine_sets(manifest)[materials.engines].buckets[
            manifest.bucket_for(tokens_of(config, case.decoded_size))[0]
        ]
        attention = f"TensorRT, {bucket.attentions_fused} of {bucket.attentions} fused"
    elif backend.provider:
        attention = "ONNX Runtime with TensorRT for RTX"
    _time_sequences(graphs, clock)
    with Bundle(bundle, manifest, graphs, read_constants(bundle, manifest)) as opened:
        decoder = opened.decoder()
    if isinstance(clock, EventClock) and backend.runtime == "tensorrt":
        clock.stream = torch.cuda.ExternalStream(cast(CudaDevice, decoder.memory).stream_handle)
    latent, caption, _ = inputs_of(case, config)
    given = (latent, caption) if on_device else (latent.numpy(), caption.numpy())

    tile, overlap = (case.tile, case.overlap) if case.tile else (None, None)

    def decode() -> Any:
        with clock.span(WHOLE):
            return decoder.decode(
                *given, seed=SEED, steps=case.steps, tile=tile, overlap=overlap, dlpack=on_device
            )

    return Contender(decode, clock, attention, decoder.close)


def _cascade(case: Case, backend: Backend) -> Contender:
    pipeline = build_cascade(case)
    clock, dtype = device_clock(case.device), _dtype(case.precision)
    modules = pipeline.build(case.device, dtype)
    for name, module in modules.items():
        _time(module, name, backend, clock)
    generator = torch.Generator().manual_seed(SEED)
    latent = torch.randn(pipeline.latent_shape, generator=generator).to(case.device)

    def decode() -> Tensor:
        with clock.span(WHOLE), torch.inference_mode():
            return pipeline.run(modules, latent)

    return Contender(decode, clock, _sdpa(case, 24, 64, dtype))


def inputs_of(case: Case, config: PidConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The latent `[1, C, h, w]`, caption `[1, T, text_dim]` and sigma `[1]` of PiD cases."""
    numbers = np.random.default_rng(SEED)
    multiple = config.size_multiple
    shape = (1, config.latent_channels, case.height // multiple, case.width // multiple)
    latent = numbers.standard_normal(shape, np.float32)
    shape = (1, caption_tokens_of(config), config.text_dim)
    caption = numbers.standard_normal(shape, np.float32)
    device = torch.device(case.device)
    return (
        torch.from_numpy(latent).to(device),
        torch.from_numpy(caption).to(device),
        torch.zeros(1, device=device),
    )


def _time(module: nn.Module, stage: str, backend: Backend, clock: Clock) -> None:
    """Time the calls of a module, which is compiled where the backend says so."""
    forward: Callable[..., Any] = module.forward
    if backend.compile == "inductor":
        forward = torch.compile(forward, dynamic=False)
    module.forward = clock.timed(stage, forward)


def _time_sequences(loaded: LoadedGraphs, clock: Clock) -> None:
    """Time the sequences of graphs: prologue, step, image."""
    make_graphs = loaded.graphs

    def graphs(memory: Memory) -> Graphs:
        made: Any = make_graphs(memory)
        sequence = made.sequence

        def timed(name: str, calls: Sequence[Call]) -> Call:
            return clock.timed(name, sequence(name, calls))

        made.sequence = timed
        return made

    cast(Any, loaded).graphs = graphs


def _weights(config: PidConfig, materials: Materials) -> Mapping[str, Tensor]:
    if materials.checkpoint:
        return read_checkpoint(materials.checkpoint, config)
    return RandomWeights(state_shapes(config), materials.seed)


def _dtype(precision: str) -> torch.dtype:
    return DTYPES[PRECISIONS[precision]]


def _sdpa(case: Case, heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """Which of its attentions torch chooses for such heads."""
    q = torch.empty(1, heads, 256, head_dim, device=case.device, dtype=dtype)
    try:
        chosen = int(cast(Any, torch)._fused_sdp_choice(q, q, q))
    except (AttributeError, RuntimeError):  # it is not part of what torch promises
        return "torch"
    return f"torch {SDPA_BACKENDS.get(chosen, str(chosen))}"
