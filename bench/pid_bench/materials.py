"""What PiD cases decode with: bundles and engines, given or made for the run."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pid_bench.cases import BACKENDS, PID, Case, tokens_of
from pid_bench.contenders import SEED, Materials
from pid_bench.counting import counted_row
from pid_bench.errors import BenchInputError
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
from pid_runtime.bundle.manifest import Manifest

_log = logging.getLogger(__name__)


def check_bundle(cases: Sequence[Case], selection: Selection) -> None:
    """Raise `BenchInputError` or `PidRuntimeError` when a given bundle cannot serve the cases."""
    path, manifest = selection.bundle, selection.manifest
    for case in cases:
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
    made = _Made(cases, selection, folder)
    jobs: list[Job] = []
    for case in cases:
        materials = Materials(
            asdict(selection.network.config),
            checkpoint=str(selection.checkpoint or ""),
            seed=made.seed,
        )
        manifest, seconds = None, None
        backend = BACKENDS[case.backend]
        if case.pipeline == PID and backend.network == "program":
            bundle, manifest, seconds = made.bundle(case.precision)
            materials = replace(materials, bundle=str(bundle))
            if backend.flavor:
                engines = _engines_in(manifest, backend.flavor)
                if not engines:
                    engines, manifest, seconds = made.engines(case.precision, backend.flavor)
                materials = replace(materials, engines=engines)
        jobs.append(Job(case, counted_row(case, selection.network, manifest), materials, seconds))
    return jobs


class _Made:
    """Bundles and engines of a run, each made when it is first needed."""

    def __init__(self, cases: Sequence[Case], selection: Selection, folder: Path) -> None:
        self._cases, self._selection, self._folder = cases, selection, folder
        self._bundles: dict[str, tuple[Path, Manifest, float]] = {}
        self._engines: dict[tuple[str, str], tuple[str, Manifest, float]] = {}
        self.seed = SEED
        """Of random weights: that of the bundle, if one is given."""
        if selection.manifest is not None:
            self.seed = int(selection.manifest.model.get("weights", {}).get("random_seed", SEED))

    def bundle(self, precision: str) -> tuple[Path, Manifest, float | None]:
        """The bundle in a precision, and the seconds it took to make; None for a given one."""
        selection = self._selection
        if selection.bundle is not None and selection.manifest is not None:
            return selection.bundle, selection.manifest, None
        if precision not in self._bundles:
            _log.info("Exporting a bundle in %s", precision)
            begin, path, config = (
                time.monotonic(),
                self._folder / precision,
                selection.network.config,
            )
            if selection.checkpoint is None:
                source, weights = RandomWeights(state_shapes(config), SEED), {"random_seed": SEED}
            else:
                source = read_checkpoint(selection.checkpoint, config)
                weights = {"file": selection.checkpoint.name}
            sizes = [c.size for c in self._cases if (c.pipeline, c.precision) == (PID, precision)]
            options = ExportOptions(precision, buckets_for(config, sizes))
            manifest = export_bundle(path, config, source, options, weights=weights)
            self._bundles[precision] = path, manifest, time.monotonic() - begin
        return self._bundles[precision]

    def engines(self, precision: str, flavor_name: str) -> tuple[str, Manifest, float]:
        """A new engine set of a flavour for this GPU, and the seconds it took."""
        key = precision, flavor_name
        if key not in self._engines:
            bundle = self.bundle(precision)[0]
            flavor, version = find_flavor(flavor_name)
            _log.info("Building engines with %s %s", flavor.title, version)
            begin = time.monotonic()
            options = BuildOptions(flavor, version, parse_targets("current", flavor))
            name = build_engines(bundle, options, lambda part: None).set_name
            seconds = time.monotonic() - begin
            self._engines[key] = name, read_manifest(bundle, verify=False), seconds
        return self._engines[key]


def _engines_in(manifest: Manifest, flavor: str) -> str:
    """Name of a bundle's engine set of a flavour; empty if it has none."""
    sets = read_engine_sets(manifest)
    return next((name for name, engines in sets.items() if engines.flavor == flavor), "")
