"""What PiD cases decode with: bundles and engines, given or made for the run."""

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pid_bench.cases import BACKENDS, PID, Case, Network, tokens_of
from pid_bench.contenders import SEED, Materials
from pid_bench.counting import counted_row
from pid_bench.errors import BenchInputError
from pid_bench.report import Measured
from pid_bench.runner import Job
from pid_bench.selection import Selection, buckets_for
from pid_engines.build import build_engines
from pid_engines.flavors import find_flavor, parse_targets
from pid_engines.options import BuildOptions
from pid_export.bundle import ExportOptions, export_bundle
from pid_ref.checkpoint import read_checkpoint, state_shapes
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import FP8_PRECISIONS, Manifest

_log = logging.getLogger(__name__)


def check_bundle(cases: Sequence[Case], selection: Selection) -> None:
    """Raise `BenchInputError` or `PidRuntimeError` when a given bundle cannot serve the cases."""
    path, manifest = selection.bundle, selection.manifest
    for case in cases:
        if case.pipeline == PID and manifest is None and case.precision in FP8_PRECISIONS:
            raise BenchInputError(
                f"expected --bundle with --precision {case.precision}, whose scales are measured "
                "by pid-export, but got none; export one, and name it"
            )
        if case.pipeline != PID or manifest is None:
            continue
        backend = BACKENDS[case.backend]
        if backend.network == "program" and case.precision != manifest.precision:
            raise BenchInputError(
                f"expected --precision {manifest.precision}, which {path} is in, but got "
                f"{case.precision}; leave --bundle out, or export one in {case.precision}"
            )
        if backend.network != "program" and case.weights == "real" and selection.checkpoint is None:
            raise BenchInputError(
                f"expected --checkpoint PATH with the weights of {path}, which backend "
                f"{case.backend} needs; give it, or leave the backend out"
            )
        manifest.bucket_for(tokens_of(selection.network.config, case.size))
        if backend.flavor and not _engines_in(manifest, backend.flavor):
            raise BenchInputError(
                f"expected engines for backend {case.backend} in {path}, but it has none of "
                f"flavour {backend.flavor}; build them: pid-build {path} --flavor {backend.flavor}"
            )


def make_jobs(cases: Sequence[Case], selection: Selection, folder: Path) -> list[Job]:
    """Jobs with all they need; bundles and engines that are not there are made in `folder`.

    Raises the input errors of pid_export and pid_engines.
    """
    network, given = selection.network, selection.manifest
    export, build, seed = functools.cache(_export), functools.cache(_build), SEED
    if given is not None:
        seed = int(given.model.get("weights", {}).get("random_seed", SEED))
    materials = Materials(asdict(network.config), str(selection.checkpoint or ""), seed)
    jobs: list[Job] = []
    for case in cases:
        own, manifest, seconds = materials, None, None
        backend = BACKENDS[case.backend]
        if case.pipeline == PID and backend.network == "program":
            bundle, manifest = selection.bundle, given
            if bundle is None or manifest is None:
                sizes = tuple(
                    c.decoded_size
                    for c in cases
                    if (c.pipeline, c.precision) == (PID, case.precision)
                )
                bundle, manifest, seconds = export(
                    folder / case.precision, case.precision, network, selection.checkpoint, sizes
                )
            engines = _engines_in(manifest, backend.flavor)
            if backend.flavor and not engines:
                engines, manifest, seconds = build(bundle, backend.flavor)
            own = replace(materials, bundle=str(bundle), engines=engines)
        row = counted_row(case, network, manifest)
        jobs.append(Job(replace(row, measured=Measured(build_seconds=seconds)), own))
    return jobs


def _export(
    path: Path,
    precision: str,
    network: Network,
    checkpoint: Path | None,
    sizes: Sequence[tuple[int, int]],
) -> tuple[Path, Manifest, float]:
    """A new bundle in a precision for these sizes, and the seconds it took."""
    _log.info("Exporting a bundle in %s", precision)
    begin, config = time.monotonic(), network.config
    if checkpoint is None:
        source, weights = RandomWeights(state_shapes(config), SEED), {"random_seed": SEED}
    else:
        source, weights = read_checkpoint(checkpoint, config), {"file": checkpoint.name}
    options = ExportOptions(precision, buckets_for(config, sizes))
    manifest = export_bundle(path, config, source, options, weights=weights)
    return path, manifest, time.monotonic() - begin


def _build(bundle: Path, flavor_name: str) -> tuple[str, Manifest, float]:
    """A new engine set of a flavour for this GPU, and the seconds it took."""
    flavor, version = find_flavor(flavor_name)
    _log.info("Building engines with %s %s", flavor.title, version)
    begin = time.monotonic()
    options = BuildOptions(flavor, version, parse_targets("current", flavor))
    name = build_engines(bundle, options, lambda part: None).set_name
    return name, read_manifest(bundle, verify=False), time.monotonic() - begin


def _engines_in(manifest: Manifest, flavor: str) -> str:
    """Name of a bundle's engine set of a flavour; empty if it has none."""
    sets = read_engine_sets(manifest)
    return next((name for name, engines in sets.items() if engines.flavor == flavor), "")
