"""What `pid-doctor` finds out about a bundle: its files, its engines, and a decode by everything.

Every backend decodes the same latent of noise. Kernels differ between devices and precisions, so
images are never equal bit by bit and an ordinary hash of them would say nothing. What is known of a
decode is its `fingerprint` instead, which small differences change as little as they change the
image. Where none is known of a bundle's weights, backends are compared with each other.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.choice import choose_graphs
from pid_runtime.bundle.engines import (
    build_command,
    check_engine_set,
    obstacle,
    read_engine_sets,
)
from pid_runtime.bundle.flavors import flavor_for
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest
from pid_runtime.command.doctor_checks import Finding, first_line
from pid_runtime.decoder import Decoder
from pid_runtime.errors import PidRuntimeError
from pid_runtime.noise import standard_normal
from pid_runtime.request import check_request, largest_latent

Floats = NDArray[np.float32]

LATENT_SIDE = 4
"""Height and width of the latent: 64 tokens for most networks, which any machine has memory for."""

LATENT_SEED = 1
"""The decode's own noise is of seed 0."""

PROJECTIONS = 16

ALLOWED_RMS = {
    "fp32": 5e-3,
    "fp16": 0.02,
    "bf16": 0.1,
    "int8": 0.1,
    "int8-fp32": 0.05,
    "fp8": 0.1,
    "fp8-fp32": 0.05,
}
"""How far images may be apart, by the bundle's precision, as in `pid-bench` on CUDA.

In fp32 that is what libraries cost that use TF32.
"""

NANO = "5115febff2fdcd4a68d8fe9b63b25620901fa823c5c266e4406704e05cad5d64"
"""SHA-256 of the weights that ship."""

KNOWN_DECODES = {
    NANO: (
        *(-0.2388, 0.3295, 0.0169, 0.1968, -0.2141, 0.0786, -0.0218, 0.0502),
        *(-0.1274, 0.1181, 0.1309, -0.1669, 0.21, -0.0729, 0.0947, -0.2436),
    )
}
"""Fingerprints of what the reference in float32 makes of the latent, by weights."""


def fingerprint(image: Floats) -> NDArray[np.float64]:
    """An image's projections on `PROJECTIONS` images of noise, over the root of its size.

    image: float32 `[1, 3, H, W]`. The root mean square of the difference of two fingerprints is
    near to that of their images, within a half.
    """
    values = image.reshape(-1).astype(np.float64)
    noises = (standard_normal(0, draw, values.size) for draw in range(PROJECTIONS))
    return np.array([noise @ values for noise in noises]) / np.sqrt(values.size)


def sample_latent(manifest: Manifest) -> Floats:
    """The latent that is decoded: noise, float32 `[1, C, 4, 4]` or what a bucket holds."""
    rows, columns = largest_latent(manifest, LATENT_SIDE, LATENT_SIDE)
    shape = (1, manifest.network["latent_channels"], rows, columns)
    return standard_normal(LATENT_SEED, 0, math.prod(shape)).reshape(shape)


def files(bundle: Path) -> tuple[Manifest | None, Finding]:
    """The manifest, and whether every file of the bundle is what it says."""
    try:
        manifest = read_manifest(bundle)
    except PidRuntimeError as error:
        return None, Finding("bundle", "files", "wrong", str(error))
    size = sum(file.bytes for file in manifest.files.values())
    name = manifest.model.get("name", "unnamed")
    detail = f"{name}, {manifest.precision}, {size / 1e9:.2f} GB, all {len(manifest.files)} whole"
    return manifest, Finding("bundle", "files", "ok", detail, {"bytes": size})


def engines(
    bundle: Path, manifest: Manifest, versions: Mapping[str, str], target: str | None
) -> list[Finding]:
    """Whether engine sets are whole and run here.

    versions: of the TensorRT libraries that load, by flavour. target: the GPU's architecture.
    """
    try:
        sets = read_engine_sets(manifest)
    except PidRuntimeError as error:
        return [Finding("engines", "all", "wrong", str(error))]
    found: list[Finding] = []
    for name, each in sets.items():
        built = f"{each.flavor} {each.version} for {', '.join(each.targets)}"
        try:
            check_engine_set(bundle, manifest, name, each)
        except PidRuntimeError as error:
            found.append(Finding("engines", name, "wrong", str(error)))
            continue
        if target is None:
            found.append(Finding("engines", name, "missing", f"{built}; there is no such GPU here"))
        elif reason := obstacle(each, versions, target):
            flavor = flavor_for(target, versions, each.flavor)
            build = build_command(bundle, flavor.name, (target,))
            found.append(Finding("engines", name, "missing", f"{reason}; build them: {build}"))
        else:
            found.append(Finding("engines", name, "ok", f"{built}, runs here"))
    return found


def decodes(
    bundle: Path, manifest: Manifest, ways: Sequence[str], advance: Callable[[float], None]
) -> list[Finding]:
    """A small decode each way, compared with what is known or with the first that came off.

    ways: backends with their devices, "torch cuda". advance: called with 1 after each.
    """
    weights = manifest.model.get("weights", {}).get("sha256")
    known = np.array(KNOWN_DECODES[weights]) if weights in KNOWN_DECODES else None
    first: tuple[str, Floats] | None = None
    found: list[Finding] = []
    for way in ways:
        backend, _, device = way.partition(" ")
        try:
            choose_graphs(bundle, manifest, backend, device or None, verify=False)
        except PidRuntimeError as error:  # the backend is not for such a bundle
            found.append(Finding("decode", way, "missing", str(error)))
            continue
        begin = time.perf_counter()
        try:
            image = _decode(bundle, manifest, backend, device or None)
        except Exception as error:  # noqa: BLE001 - whatever a backend that does not work raises
            found.append(Finding("decode", way, "wrong", first_line(error)))
            continue
        finally:
            advance(1)
        seconds = time.perf_counter() - begin
        if known is not None:
            other, rms = "the known image", _rms(fingerprint(image), known)
        elif first is not None:
            other, rms = f"{first[0]}'s", _rms(image, first[1])
        else:
            other, rms = None, None
        first = first or (way, image)
        found.append(_compared(way, manifest.precision, image, seconds, other, rms))
    return found


def _decode(bundle: Path, manifest: Manifest, backend: str, device: str | None) -> Floats:
    request = check_request(manifest, sample_latent(manifest))
    with Decoder.open(bundle, backend, device, verify=False, manifest=manifest) as decoder:
        return decoder.run(request)


def _compared(
    way: str, precision: str, image: Floats, seconds: float, other: str | None, rms: float | None
) -> Finding:
    height, width = image.shape[2:]
    values: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "fingerprint": [round(float(each), 5) for each in fingerprint(image)],
        "compared_with": other,
        "rms": rms,
    }
    text = f"{width}x{height} in {seconds:.1f} s with loading"
    if other is None or rms is None:
        return Finding("decode", way, "ok", f"{text}, nothing to compare with", values)
    allowed = ALLOWED_RMS[precision]
    if rms <= allowed:
        return Finding("decode", way, "ok", f"{text}, {rms:.1e} from {other}", values)
    detail = f"{text}, expected at most {allowed} from {other}, but got {rms:.2g}"
    return Finding("decode", way, "wrong", detail, values)


def _rms(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
