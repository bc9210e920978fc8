"""Which cases a run consists of: the command line's options, checked, and the plan they make."""

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnxruntime as ort
import torch

from pid_bench.cascades import CASCADES, OPT_IN, SCALE, UPSCALER_STEPS
from pid_bench.cases import BACKENDS, PID, Case, Network, tokens_of
from pid_bench.diffusers_modules import diffusers
from pid_bench.errors import BenchInputError
from pid_engines.flavors import BUILDERS, gpu_target, library_version
from pid_export.bundle import BUCKETS, config_of
from pid_pipelines.vaes import VAES
from pid_ref.config import PidConfig
from pid_ref.registry import find_checkpoint, find_space
from pid_ref.sampler import timesteps
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.flavors import FLAVORS
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import PRECISIONS, Manifest
from pid_runtime.command.console import read_size
from pid_runtime.noise import core_count
from pid_runtime.tiles import DEFAULT_OVERLAP

_log = logging.getLogger(__name__)

CASCADE_BACKENDS = ("eager", "compile")
"""What cascades, which have no bundle, run on."""

DEFAULT_BACKENDS = {
    "cpu": ("eager", "compile", "onnxruntime"),
    "cuda": ("eager", "compile", "public", "torch", "torch-compile"),
}
"""By device, when nothing is said; on CUDA what else is installed is added."""

QUICK_BACKENDS = {"cpu": ("eager", "onnxruntime"), "cuda": ("eager",)}

DRY_BACKENDS = ("eager", "torch")
"""The network as it stands, and our stages: what other backends do is the work of one of these."""

DEFAULT_SIZES = {"cpu": ((256, 256),), "cuda": ((2048, 2048), (4096, 4096))}
"""Width and height by device. A laptop is not made to work for hours unless it is told to."""

DRY_SIZES = ((2048, 2048), (4096, 4096))

QUICK_DEPTH = 1
"""Patch blocks of --quick on the CPU."""


@dataclass(frozen=True)
class Selection:
    """What the command line asks for, checked."""

    network: Network
    sizes: tuple[tuple[int, int], ...]
    """Widths and heights."""
    backends: tuple[str, ...]
    cascades: tuple[str, ...]
    precisions: tuple[str, ...]
    device: str
    threads: int
    steps: int
    """Of PiD."""
    cascade_depth: float
    """Share of the blocks of a cascade's network that is kept."""
    sdx4_steps: int
    checkpoint: Path | None
    """Real weights; random ones when None."""
    bundle: Path | None
    """A bundle; one is exported when None."""
    manifest: Manifest | None
    """Of the bundle."""
    tile: tuple[int, ...] = ()
    """Width and height of tiles to decode in as well; empty for none."""
    overlap: int = 0


def plan(selection: Selection) -> list[Case]:
    """All cases that there can be, those that are to be compared next to each other."""
    network = selection.network
    levels = [name for name in CASCADE_BACKENDS if name in selection.backends]
    cases: list[Case] = []
    for width, height in selection.sizes:
        for precision in selection.precisions:
            pid = Case(
                pipeline=PID,
                backend="",
                space=network.space,
                variant=network.variant,
                width=width,
                height=height,
                precision=precision,
                device=selection.device,
                threads=selection.threads if selection.device == "cpu" else 0,
                steps=selection.steps,
                depth=network.config.patch_depth,
                weights=network.weights,
            )
            cases += [replace(pid, backend=name) for name in selection.backends]
            if selection.tile and selection.tile != (width, height):
                tiled = replace(pid, tile=selection.tile, overlap=selection.overlap)
                cases += [replace(tiled, backend=name) for name in selection.backends]
            cascade = replace(pid, variant="", depth=selection.cascade_depth, weights="random")
            for name in selection.cascades:
                steps = selection.sdx4_steps if name == "vae+sdx4" else 0
                cases += [
                    replace(cascade, pipeline=name, backend=level, steps=steps)
                    for level in levels or CASCADE_BACKENDS[:1]
                ]
    return [case for case in cases if _exists(case)]


def _exists(case: Case) -> bool:
    """Whether a backend has such a decode at all.

    Bundles alone are decoded in tiles. What the public code does is bf16 autocast. ONNX Runtime
    has no bf16 on the CPU.
    """
    if case.tile and BACKENDS[case.backend].network != "program":
        return False
    if case.backend == "public":
        return case.precision == "bf16"
    no_bf16 = case.backend == "onnxruntime" and case.device == "cpu"
    return not (no_bf16 and PRECISIONS[case.precision] == "bfloat16")


def select(args: Namespace) -> Selection:
    """The options, checked. Raises the input errors of all packages."""
    timesteps(args.steps)  # raises for a number of steps that does not exist
    if args.bundle is not None and (args.config is not None or args.depth is not None):
        raise BenchInputError(
            "expected --bundle alone, which says what the network is, but got --config or "
            "--depth too; leave one out"
        )
    manifest = None if args.bundle is None else read_manifest(args.bundle, verify=False)
    network = _network(args) if manifest is None else network_in(manifest)
    device = _device(args)
    sizes = DRY_SIZES if args.dry_run else DEFAULT_SIZES[device]
    if args.size is not None:
        sizes = parse_sizes(args.size, network.config)
    tile, overlap = _tile(args, network.config, sizes)
    return Selection(
        network=network,
        backends=_backends(args, device, manifest),
        sizes=sizes,
        cascades=_cascades(args, network),
        precisions=_precisions(args, device, manifest),
        device=device,
        threads=args.threads or core_count(),
        steps=args.steps,
        cascade_depth=args.cascade_depth,
        sdx4_steps=args.sdx4_steps or UPSCALER_STEPS,
        checkpoint=args.checkpoint,
        bundle=args.bundle,
        manifest=manifest,
        tile=tile,
        overlap=overlap,
    )


def _tile(
    args: Namespace, config: PidConfig, sizes: Iterable[tuple[int, int]]
) -> tuple[tuple[int, ...], int]:
    """--tile and --overlap. Raises `BenchInputError` for tiles that no size can be cut into."""
    side = config.size_multiple
    if args.tile is None:
        if args.overlap is not None:
            raise BenchInputError("expected --tile with --overlap, but got none; add --tile WxH")
        return (), 0
    tile = read_size(args.tile)
    overlap = DEFAULT_OVERLAP * side if args.overlap is None else args.overlap
    if 0 in tile or any(length % side for length in (*tile, overlap)) or overlap < 0:
        raise BenchInputError(
            f"expected --tile and --overlap in multiples of {side} pixels, but got {args.tile} and "
            f"{overlap}"
        )
    for width, height in sizes:
        if tile[0] > width or tile[1] > height:
            raise BenchInputError(
                f"expected a --tile no larger than the size, {width}x{height}, but got {args.tile}"
            )
        if any(2 * overlap >= t < side_ for t, side_ in zip(tile, (width, height), strict=True)):
            raise BenchInputError(
                f"expected an --overlap below half of the tile, {args.tile}, but got {overlap}"
            )
    return tile, overlap


def network_in(manifest: Manifest) -> Network:
    """The network that a bundle was exported from."""
    config = config_of(manifest.network)
    real = "random_seed" not in manifest.model.get("weights", {})
    return Network(
        space=str(manifest.model.get("space", "custom")),
        variant=str(manifest.model.get("variant", manifest.model.get("name", ""))),
        config=config,
        full_depth=config.patch_depth,
        weights="real" if real else "random",
        kept=tuple(manifest.model.get("rounding", {}).get("kept", ())),
    )


def _network(args: Namespace) -> Network:
    """The network that --space, --variant, --config and --depth say."""
    if args.config is not None:
        try:
            config = PidConfig.from_json(args.config.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BenchInputError(
                f"expected a file of network dimensions, but got {error}; check --config"
            ) from None
        space, variant = find_space(args.space).name, _variant_of(config)
    else:
        checkpoint = find_checkpoint(args.space, args.variant)
        config, space, variant = checkpoint.config, checkpoint.space.name, checkpoint.variant
    depth, full = args.depth, config.patch_depth
    if depth is None:
        small = args.quick and args.config is None and not args.dry_run and _device(args) == "cpu"
        depth = QUICK_DEPTH if small else full
    if depth > full:
        raise BenchInputError(f"expected --depth of at most {full} patch blocks, but got {depth}")
    if args.checkpoint is not None and depth < full:
        raise BenchInputError("expected --checkpoint or --depth, but got both; leave one out")
    weights = "random" if args.checkpoint is None else "real"
    return Network(space, variant, replace(config, patch_depth=depth), full, weights)


def _variant_of(config: PidConfig) -> str:
    """A short name for dimensions from a file: the same for the same dimensions."""
    text = json.dumps(asdict(config), sort_keys=True)
    return "config-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def _device(args: Namespace) -> str:
    if args.device not in (None, "cpu", "cuda"):
        raise BenchInputError(f"expected --device cpu or cuda, but got {args.device!r}")
    if args.dry_run:
        return args.device or "cuda"
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        raise BenchInputError(
            f"expected a GPU for --device cuda, but torch {torch.__version__} finds none; "
            "use --device cpu, or --dry-run"
        )
    return args.device or ("cuda" if found else "cpu")


def _backends(args: Namespace, device: str, manifest: Manifest | None) -> tuple[str, ...]:
    fitting = tuple(name for name, each in BACKENDS.items() if device in each.devices)
    if args.backends == "all":
        return fitting
    if args.backends is not None:
        names = parse_list(args.backends, BACKENDS, "--backends")
        wrong = [name for name in names if name not in fitting]
        if wrong and not args.dry_run:
            raise BenchInputError(
                f"expected backends that run on {device} ({', '.join(fitting)}), but got {wrong[0]}"
            )
        return names
    if args.dry_run:
        return DRY_BACKENDS if manifest is None else (*DRY_BACKENDS, *_built(manifest))
    if args.quick:
        return QUICK_BACKENDS[device]
    return DEFAULT_BACKENDS[device] + (_installed() if device == "cuda" else ())


def _built(manifest: Manifest) -> tuple[str, ...]:
    """Backends that a bundle has engines for."""
    flavors = {each.flavor for each in read_engine_sets(manifest).values()}
    return tuple(name for name, each in BACKENDS.items() if each.flavor in flavors)


def _installed() -> tuple[str, ...]:
    """Backends beside torch's that this machine with a GPU has the libraries for."""
    names = ("onnxruntime",) if "CUDAExecutionProvider" in ort.get_available_providers() else ()
    for name, backend in BACKENDS.items():
        flavor = FLAVORS.get(backend.flavor)
        if flavor is None or library_version(flavor) is None:
            continue
        targets = BUILDERS[flavor.name].targets
        if not targets or gpu_target() in targets:
            names += (name,)
    return names


def _precisions(args: Namespace, device: str, manifest: Manifest | None) -> tuple[str, ...]:
    if args.precision is not None:
        return parse_list(args.precision, PRECISIONS, "--precision", words=())
    if manifest is not None:
        return (manifest.precision,)
    return ("fp32",) if device == "cpu" else ("bf16",)


def _cascades(args: Namespace, network: Network) -> tuple[str, ...]:
    """Those asked for; by default the quick ones, or none, with a note, where there cannot be."""
    if args.cascades is not None:
        names = parse_list(args.cascades, CASCADES, "--cascades")
        if names:
            _check_cascades(network)
        return names
    if args.quick:
        return ()
    try:
        _check_cascades(network)
    except BenchInputError as error:
        _log.info("no cascades: %s", error)
        return ()
    return tuple(name for name in CASCADES if name not in OPT_IN)


def _check_cascades(network: Network) -> None:
    """Raise `BenchInputError` unless cascades start from this network's latent."""
    if network.space not in VAES:
        raise BenchInputError(
            "expected a network of a latent space whose autoencoder diffusers has, which cascades "
            f"begin with ({', '.join(VAES)}), but got a {network.space} network; "
            "use --cascades none"
        )
    vae, config = VAES[network.space], network.config
    own = config.latent_channels, config.latent_down, config.scale
    if own != (vae.channels, vae.down, SCALE):
        raise BenchInputError(
            f"expected a network for latents of {network.space} to compare cascades with, but got "
            "other dimensions; use --cascades none"
        )
    diffusers()


def parse_list(
    text: str, known: Iterable[str], option: str, words: tuple[str, ...] = ("all", "none")
) -> tuple[str, ...]:
    """Read "a,b", each one known, or one of the words. Raises `BenchInputError` otherwise."""
    known = tuple(known)
    if text in words:
        return known if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            hint = f" (or {', '.join(words)})" if words else ""
            raise BenchInputError(
                f"expected {option} of {', '.join(known)}{hint}, but got {name[:60]!r}; "
                "choose from these"
            )
    return names


def parse_sizes(text: str, config: PidConfig) -> tuple[tuple[int, int], ...]:
    """Read "2048x2048,2688x1536" as widths and heights.

    Raises `PidRuntimeError` for other text, `BenchInputError` for a size the network has not, or
    that no bucket holds.
    """
    multiple, sizes = config.size_multiple, list[tuple[int, int]]()
    for part in map(str.strip, text.split(",")):
        width, height = read_size(part)
        if config.latent_size(height, width) is None:
            near = (max(1, round(side / multiple)) * multiple for side in (width, height))
            raise BenchInputError(
                f"expected width and height in multiples of {multiple}, but got {part}; "
                f"{'x'.join(map(str, near))} is near"
            )
        tokens, most = tokens_of(config, (width, height)), max(BUCKETS.values())
        if tokens > most:
            raise BenchInputError(
                f"expected a size of at most {most} tokens (bucket 4k: 4096x4096, or as many "
                f"pixels in another shape), but got {part} of {tokens}"
            )
        sizes.append((width, height))
    return tuple(dict.fromkeys(sizes))


def buckets_for(config: PidConfig, sizes: Sequence[tuple[int, int]]) -> tuple[tuple[str, int], ...]:
    """Buckets of a bundle for these sizes: the usual ones, and one for what is much smaller."""
    needed = [tokens_of(config, size) for size in sizes]
    small = [tokens for tokens in needed if 2 * tokens <= min(BUCKETS.values())]
    found = {"small": max(small)} if small else {}
    for tokens in needed:
        if tokens not in small:
            name = min(
                (n for n, most in BUCKETS.items() if most >= tokens), key=BUCKETS.__getitem__
            )
            found[name] = BUCKETS[name]
    return tuple(found.items())
