"""Builds engines, each in a process of its own, several at a time; `pid_engines.worker` is it."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from pid_engines.builder_log import BuilderReport, read_report
from pid_engines.child import ChildError, Children, PartDone
from pid_engines.errors import BuildError
from pid_engines.flavors import BUILDERS
from pid_engines.options import BuildOptions
from pid_engines.tasks import Task
from pid_engines.worker import BuildRequest, BuildResult
from pid_runtime.bundle.engines import engine_folder
from pid_runtime.bundle.json_reader import read_member
from pid_runtime.bundle.manifest import Manifest

LOG_FOLDER = "logs"
"""Folder of a set, with what parser and builder said: one file per engine."""

TIMING_CACHE_FILE = "timing.cache"


def build_all(
    bundle: Path,
    manifest: Manifest,
    options: BuildOptions,
    tasks: Sequence[Task],
    staging: Path,
    progress: PartDone,
) -> dict[str, tuple[BuilderReport, BuildResult]]:
    """Build engines into `staging`; reports of the builder and results by the engine's file."""
    logs = engine_folder(bundle, options.set_name) / LOG_FOLDER
    children = Children()

    def build(task: Task) -> tuple[BuilderReport, BuildResult]:
        request = request_of(bundle, manifest, options, task, staging)
        log = logs / f"{task.plan.name}.log"
        share = 1 / len(tasks)
        result = _build_one(
            children, request, task.plan.name, log, lambda part: progress(part * share)
        )
        return _checked_report(task, log, options), result

    results: dict[str, tuple[BuilderReport, BuildResult]] = {}
    with ThreadPoolExecutor(
        1 if BUILDERS[options.flavor.name].timing_cache else options.jobs
    ) as pool:
        futures = {pool.submit(build, task): task.file for task in tasks}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            children.kill()
            raise
    return results


def request_of(
    bundle: Path, manifest: Manifest, options: BuildOptions, task: Task, staging: Path
) -> BuildRequest:
    """What a worker is to do for a task; the file it is to build from is written if need be."""
    graph = manifest.graphs[task.plan.graph]
    source = bundle / graph.file
    if task.content is not None:
        source = staging / f"{task.plan.name}.onnx"
        source.write_bytes(task.content)
    cache = engine_folder(bundle, options.set_name) / TIMING_CACHE_FILE
    return BuildRequest(
        flavor=options.flavor.name,
        targets=options.targets,
        flags=options.flags,
        onnx=str(source),
        graph=graph,
        profiles=task.plan.profiles,
        engine=str(staging / task.file),
        timing_cache=str(cache) if BUILDERS[options.flavor.name].timing_cache else "",
    )


def _checked_report(task: Task, log: Path, options: BuildOptions) -> BuilderReport:
    """What the builder said about an engine. Raises `BuildError` if it is not what it must be."""
    report = read_report(
        log.read_text("utf-8", "replace"),
        task.attentions,
        task.rounded_products,
        len(task.plan.profiles),
    )
    if isinstance(report, str):
        raise BuildError(f"engine {task.plan.name}: {report}; see {log}")
    count = len(task.attentions)
    if report.attentions_fused < count and not options.allow_unfused:
        raise BuildError(
            f"expected the builder to fuse every attention of engine {task.plan.name}, but it "
            f"fused {report.attentions_fused} of {count}; see {log}, or take it as it is with "
            "--allow-unfused"
        )
    if report.products_not_fp8 and not options.allow_unfused:
        raise BuildError(
            f"expected the builder to multiply 8-bit numbers in all {len(task.rounded_products)} "
            f"rounded products of engine {task.plan.name}, but it did not in "
            f"{', '.join(report.products_not_fp8)}; see {log}, or take it as it is with "
            "--allow-unfused"
        )
    return report


def _build_one(
    children: Children, request: BuildRequest, name: str, log: Path, progress: PartDone
) -> BuildResult:
    """Build an engine in a process of its own. Raises `BuildError` when that fails."""
    done = 0.0

    def advance(part: float) -> None:
        nonlocal done
        if part > done:
            progress(part - done)
            done = part

    try:
        with children.start([sys.executable, "-m", "pid_engines.worker"], log=log) as child:
            result = read_member(BuildResult, child.ask(asdict(request), advance), "result")
            child.end()
    except ChildError as error:
        reason = str(error)
        if "errno" in error.said:
            raise OSError(error.said["errno"], reason, error.said["file"]) from None
        if error.killed:
            reason = (
                "it was killed, as happens when the machine has too little memory (try --jobs 1)"
            )
        elif not error.said:
            reason = f"the builder {error}"
        raise BuildError(f"cannot build engine {name}: {reason}; see {log}") from None
    advance(1.0)
    return result
