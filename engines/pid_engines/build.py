"""Builds the engines of a bundle and writes down what was built in its manifest."""

import contextlib
import logging
import resource
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from pid_engines.child import PartDone
from pid_engines.engine_set import describe, make_set
from pid_engines.errors import BuildInputError
from pid_engines.options import BuildOptions, with_plan
from pid_engines.processes import LOG_FOLDER, build_all
from pid_engines.profiles import EnginePlan
from pid_engines.tasks import Task, current_engines, plan_tasks
from pid_runtime.bundle.engines import (
    ENGINE_FOLDER,
    Engine,
    EngineSet,
    engine_folder,
    read_engine_sets,
    with_engine_sets,
)
from pid_runtime.bundle.files import check_space, write_whole
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from pid_runtime.errors import PidRuntimeError

_log = logging.getLogger(__name__)

ENGINE_OVERHEAD_BYTES = 2_000_000
"""An engine's size beside its weights, per profile; at full size 0.7 to 1.4 MB were measured."""


@dataclass(frozen=True)
class Build:
    """What `build_engines` did."""

    set_name: str
    engines: EngineSet
    plans: dict[str, EnginePlan]
    """By the name of the engine's file."""
    reused: frozenset[str]
    """Files of engines that were there already."""
    peak_rss_bytes: int
    """Most host memory: of this process, and of as many builds as ran at the same time."""


def build_engines(
    bundle: Path, options: BuildOptions, progress: PartDone = lambda fraction: None
) -> Build:
    """Build the engines of a bundle that it does not have yet, and record them in its manifest.

    Files and manifest change only when all engines are built; a second builder waits. progress:
    called, from any thread, with the part done since the last call, of 1.
    Raises `BuildInputError`, `PidRuntimeError` for a broken bundle, and `BuildError` for an engine
    that cannot be built or is not what it must be.
    """
    # What makes no sense is refused before a lock is left behind.
    plan_tasks(bundle, read_manifest(bundle, verify=False), options)
    with _locked(bundle):
        manifest = _without_unreadable_sets(read_manifest(bundle), force=options.force)
        planned = with_plan(manifest, options.plan)
        tasks = plan_tasks(bundle, planned, options)
        old = read_engine_sets(manifest).get(options.set_name)
        folder = engine_folder(bundle, options.set_name)
        if old is not None:
            _tell_of_dropped(old, options.buckets or tuple(manifest.buckets))
        built: dict[str, Engine] = {}
        if old is not None and not options.force:
            built = current_engines(
                manifest, folder, old, tasks, allow_unfused=options.allow_unfused
            )
        missing = [task for task in tasks if task.file not in built]
        reused = frozenset(built)
        _check_space(bundle, manifest, missing)
        with _staging(folder) as staging:
            results = build_all(bundle, manifest, options, missing, staging, progress)
            peaks = sorted((result.peak_rss_bytes for _, result in results.values()), reverse=True)
            for task in missing:
                built[task.file] = describe(manifest, task, *results[task.file])
            engines = make_set(planned, options, tasks, built)
            changed = with_engine_sets(manifest, {options.set_name: engines})
            for task in missing:
                (staging / task.file).replace(folder / task.file)
            write_whole(bundle / MANIFEST_FILE, changed.to_json() + "\n")
        _remove_others(folder, {task.plan.name for task in tasks})
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plans = {task.file: task.plan for task in tasks}
    return Build(options.set_name, engines, plans, reused, own + sum(peaks[: options.jobs]))


def _tell_of_dropped(old: EngineSet, buckets: Sequence[str]) -> None:
    """Say which buckets will have no engines any more."""
    dropped = [name for name in old.buckets if name not in buckets]
    if dropped:
        both = ",".join([*dropped, *buckets])
        _log.warning(
            "the engines of bucket %s are replaced by those of %s, since an engine with weights "
            "serves all buckets of a build; to have them all, build --buckets %s",
            ", ".join(dropped),
            ", ".join(buckets),
            both,
        )


def _without_unreadable_sets(manifest: Manifest, *, force: bool) -> Manifest:
    """The manifest; with `force` without engines if they make no sense."""
    try:
        read_engine_sets(manifest)
    except PidRuntimeError:
        if not force:
            raise
        return replace(manifest, engines={})
    return manifest


@contextlib.contextmanager
def _locked(bundle: Path) -> Generator[None, None, None]:
    """Keep other builders from this bundle; wait for one that is there already."""
    folder = bundle / ENGINE_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("another pid-build works on %s: waiting for it to end", bundle)
            lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _staging(folder: Path) -> Generator[Path, None, None]:
    """A folder for engines that are not complete yet, in that of their set.

    What a builder that was killed left there is removed: nobody else builds while this one does.
    """
    try:
        (folder / LOG_FOLDER).mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(".partial", ".", folder))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> BuildInputError:
    return BuildInputError(
        f"expected to write {folder}, but got: {error.strerror}; "
        "copy the bundle to where you may write"
    )


def _check_space(bundle: Path, manifest: Manifest, tasks: Sequence[Task]) -> None:
    needed = sum(
        manifest.graphs[task.plan.graph].weights_bytes
        + ENGINE_OVERHEAD_BYTES * len(task.plan.profiles)
        for task in tasks
    )
    check_space(bundle, needed, "the engines", "copy the bundle to another disk")


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove engines and logs of a set that nothing refers to any more."""
    for path in (*folder.glob("*.engine"), *(folder / LOG_FOLDER).glob("*.log")):
        if path.stem not in names:
            path.unlink()
