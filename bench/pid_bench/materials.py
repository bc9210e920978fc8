"""What PiD cases decode with: bundles and engines, given or made for the run."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pid_bench.cases import BACKENDS, PID, Case, Network, buckets_for, tokens_of
from pid_bench.contenders import SEED, Materials
from pid_bench.counting import counted_row
from pid_bench.errors import BenchInputError
from pid_bench.runner import Job
from pid_export.bundle import ExportOptions, config_of, export_bundle
from pid_ref.checkpoint import read_checkpoint, state_shapes
from pid_ref.weights import RandomWeights
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What the command line gives to decode with."""

    checkpoint: Path | None
    """Real weights; random ones when None."""
    bundle: Path | None
    """A bundle; one is exported when None."""


def network_of_bundle(path: Path) -> tuple[Network, Manifest]:
    """The network that a bundle was exported from. Raises `PidRuntimeError` for a broken bundle."""
    manifest = read_manifest(path, verify=False)
    config = config_of(manifest.network)
    real = "random_seed" not in manifest.model.get("weights", {})
    network = Network(
        space=str(manifest.model.get("space", "custom")),
        variant=str(manifest.model.get("variant", manifest.model.get("name", ""))),
        config=config,
        full_depth=config.patch_depth,
        weights="real" if real else "random",
    )
    return network, manifest


def check_bundle(path: Path, manifest: Manifest, cases: Sequence[Case], given: Given) -> None:
    """Raise `BenchInputError` or `PidRuntimeError` when a bundle cannot serve the cases."""
    for case in cases:
        if case.pipeline != PID:
            continue
        network = BACKENDS[case.backend].network
        if network == "program" and case.precision != manifest.precision:
            raise BenchInputError(
                f"expected --precision {manifest.precision}, which {path} is in, but got "
                f"{case.precision}; leave --bundle out, or export one in {case.precision}"
            )
        if network != "program" and case.weights == "real" and given.checkpoint is None:
            raise BenchInputError(
                f"expected --checkpoint PATH with the weights of {path}, which backend "
                f"{case.backend} needs; give it, or leave the backend out"
            )
        manifest.bucket_for(tokens_of(config_of(manifest.network), (case.width, case.height)))
        _engines_of(path, manifest, case)


def make_jobs(cases: Sequence[Case], network: Network, given: Given, folder: Path) -> list[Job]:
    """Jobs with all they need; bundles and engines that are not there are made in `folder`.

    Raises the input errors of pid_export and pid_engines.
    """
    bundles: dict[str, tuple[Path, float]] = {}
    engines: dict[tuple[str, str], tuple[str, float]] = {}
    jobs: list[Job] = []
    seed = _seed(given)
    for case in cases:
        backend, seconds = BACKENDS[case.backend], None
        materials = Materials(
            asdict(network.config),
            checkpoint=str(given.checkpoint or ""),
            seed=seed,
        )
        bundle = given.bundle
        if case.pipeline == PID and backend.network == "program":
            if bundle is None:
                if case.precision not in bundles:
                    bundles[case.precision] = _export(cases, case.precision, network, given, folder)
                bundle, seconds = bundles[case.precision]
            materials = replace(materials, bundle=str(bundle))
            if backend.flavor:
                name = _engines_of(bundle, read_manifest(bundle, verify=False), case, strict=False)
                key = case.precision, backend.flavor
                if not name:
                    if key not in engines:
                        engines[key] = _build(bundle, backend.flavor)
                    name, seconds = engines[key]
                materials = replace(materials, engines=name)
        jobs.append(Job(case, counted_row(case, network, bundle), materials, seconds))
    return jobs


def _seed(given: Given) -> int:
    """Of random weights: that of the bundle, if one is given."""
    if given.bundle is None:
        return SEED
    weights = read_manifest(given.bundle, verify=False).model.get("weights", {})
    return int(weights.get("random_seed", SEED))


def _export(
    cases: Sequence[Case], precision: str, network: Network, given: Given, folder: Path
) -> tuple[Path, float]:
    """A bundle of the network in a precision, and the seconds it took."""
    sizes = [(c.width, c.height) for c in cases if c.pipeline == PID and c.precision == precision]
    config, bundle = network.config, folder / precision
    _log.info("Exporting a bundle in %s", precision)
    begin = time.monotonic()
    if given.checkpoint is None:
        source, weights = RandomWeights(state_shapes(config), SEED), {"random_seed": SEED}
    else:
        source = read_checkpoint(given.checkpoint, config)
        weights = {"file": given.checkpoint.name}
    options = ExportOptions(precision, buckets_for(config, sizes))
    export_bundle(bundle, config, source, options, weights=weights)
    return bundle, time.monotonic() - begin


def _build(bundle: Path, flavor_name: str) -> tuple[str, float]:
    """Engines of a flavour for this GPU, and the seconds it took."""
    from pid_engines.build import BuildOptions, build_engines
    from pid_engines.flavors import find_flavor, parse_targets

    flavor, version = find_flavor(flavor_name)
    _log.info("Building engines with %s %s", flavor.title, version)
    begin = time.monotonic()
    build = build_engines(
        bundle, BuildOptions(flavor, version, parse_targets("current", flavor)), lambda part: None
    )
    return build.set_name, time.monotonic() - begin


def _engines_of(bundle: Path, manifest: Manifest, case: Case, *, strict: bool = True) -> str:
    """The engine set that a case runs; empty for other backends, or without `strict` for none."""
    flavor = BACKENDS[case.backend].flavor
    sets = read_engine_sets(manifest) if flavor else {}
    for name, engines in sets.items():
        if engines.flavor == flavor:
            return name
    if flavor and strict:
        raise BenchInputError(
            f"expected engines for backend {case.backend} in {bundle}, but it has none of flavour "
            f"{flavor}; build them: pid-build {bundle} --flavor {flavor}"
        )
    return ""
