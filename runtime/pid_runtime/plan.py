"""What a decode would take, before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass

from pid_runtime.bundle.manifest import Bucket, Manifest
from pid_runtime.bundle.sizes import Sizes
from pid_runtime.denoise import image_bytes, state_bytes
from pid_runtime.interpreter import Program
from pid_runtime.request import Request
from pid_runtime.tiles import described, pixels_per_latent_pixel
from pid_runtime.work import refresh_flop, section_flop


@dataclass(frozen=True)
class Plan:
    """What a decode of a batch would take."""

    width: int
    """Of the image, in pixels."""
    height: int
    bucket: str
    """What the picture, or a tile, is decoded in."""
    steps: int
    tiles: int
    tile: tuple[int, int]
    """Width and height of a tile in pixels; the image's where there is one."""
    branches: int
    """2 with guidance."""
    calls: int
    """Of the network: steps, times tiles, times branches."""
    tflop: float
    """10^12 floating-point operations, 2 for every multiply-add."""
    device_bytes: int
    """Weights, arena and the state where it lies there; what graphs work in comes on top."""
    host_bytes: int
    """Image, and state, where the host has them; 0 where the device has all."""
    reason: str | None
    """Why there are tiles; None where there are none."""
    text: str
    """All of that for people."""


def plan_of(
    manifest: Manifest,
    request: Request,
    bucket_for: Callable[[int], Bucket] | None = None,
    state_on_device: bool = False,
) -> Plan:
    """The plan of a request. bucket_for: a backend's buckets; None for the bundle's own.

    state_on_device: where the state of decodes in tiles, or with guidance, is going to lie.
    """
    sizes = request.program_sizes
    name, bucket = manifest.bucket_for(sizes.value("L"))
    if bucket_for is not None:
        bucket = bucket_for(sizes.value("L"))
    tiling, side = request.tiling, pixels_per_latent_pixel(manifest)
    tiles = 1 if tiling is None else tiling.count
    branches = len(request.branches)
    flop = _flop(manifest, request, sizes)
    weights = sum(graph.weights_bytes for graph in manifest.graphs.values())
    device_bytes = weights + Program.arena_bytes(bucket, sizes)
    host_bytes = 0
    if not request.is_plain:
        host_bytes = image_bytes(request)
        if state_on_device:
            device_bytes += state_bytes(request)
        else:
            host_bytes += state_bytes(request)
    width, height = request.sizes.value("W"), request.sizes.value("H")
    pieces = "whole" if tiling is None else described(tiling, side)
    guided = " and 2 branches" if branches > 1 else ""
    guided += " at once" if request.branches_at_once else ""
    text = (
        f"{width}x{height}: bucket {name}, {pieces}; {request.schedule.steps} steps{guided}, "
        f"{request.calls} calls of the network, {flop / 1e12:.4g} TFLOP; device "
        f"{device_bytes / 1e9:.2f} GB and what graphs work in, host {host_bytes / 1e9:.2f} GB"
    )
    return Plan(
        width=width,
        height=height,
        bucket=name,
        steps=request.schedule.steps,
        tiles=tiles,
        tile=(sizes.value("W"), sizes.value("H")),
        branches=branches,
        calls=request.calls,
        tflop=flop / 1e12,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        reason=None if tiling is None else tiling.reason,
        text=text,
    )


def _flop(manifest: Manifest, request: Request, sizes: Sizes) -> int:
    """What the loops of `pid_runtime.denoise` run.

    sizes: of a tile. The timestep network is the same for a batch, and counted once.
    """
    schedule, runs = request.schedule, request.calls // len(request.groups[0])
    times = 0 if schedule.moments is None else len(schedule.rows)
    if request.is_plain:
        inputs = section_flop(manifest, "prologue", sizes)
    else:
        latents = 1 if request.tiling is None else schedule.steps * request.tiling.count
        captions = runs if len(request.groups) > 1 else 1
        inputs = latents * refresh_flop(manifest, "latent", sizes)
        inputs += captions * refresh_flop(manifest, "caption", sizes)
    of_image = inputs + runs * section_flop(manifest, "step", sizes)
    return sizes.value("B") * of_image + times * section_flop(manifest, "timestep", sizes)
