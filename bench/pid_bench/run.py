"""A run: what the report does not have yet is measured, and written down case by case."""

import logging
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pid_bench import hardware, runner
from pid_bench.cases import PID, Case
from pid_bench.counting import counted_row
from pid_bench.errors import BenchInputError
from pid_bench.images import check_images
from pid_bench.materials import check_bundle, make_jobs
from pid_bench.measure import QUICK_REPEATS, REPEATS
from pid_bench.render import PAGE_FILE, write_all
from pid_bench.report import REPORT_FILE, Environment, Report, Row, read_report
from pid_bench.reported import reported_rows
from pid_bench.screen import Screen
from pid_bench.selection import Selection, plan, select
from pid_bench.summary import summary
from pid_bench.tables import counted_table, decodes_table, to_text
from pid_engines.child import ChildError
from pid_runtime.command import console

_log = logging.getLogger(__name__)

SAMPLES_FOLDER = "images"
"""In a report's folder: some pixels of every PiD image, which later runs compare theirs with."""

COST_SIZES = ((1024, 1024), (2048, 2048), (3072, 3072), (4096, 4096))
"""Sizes every report counts the work of, whatever was measured."""

_WORK = ".work-"
"""How the folder of bundles made for a run begins."""


def bench(args: Namespace) -> int:
    """Do what `pid-bench` was asked; its exit code: 1 when images differ or cases failed."""
    selection = select(args)
    cases = plan(selection)
    for name in sorted(set(selection.backends) - {case.backend for case in cases}):
        _log.info(
            "backend %s does not exist in %s: left out", name, ", ".join(selection.precisions)
        )
    if not cases:
        raise BenchInputError(
            "expected something to run, but no backend exists in this precision; choose others"
        )
    check_bundle(cases, selection)
    return _count(args, cases, selection) if args.dry_run else _measure(args, cases, selection)


def _count(args: Namespace, cases: Sequence[Case], selection: Selection) -> int:
    """Print, and write where it was asked, what is known without running anything."""
    rows: list[Row] = []
    with console.progress("Counting", len(cases), quiet=args.quiet) as advance:
        for case in cases:
            rows.append(counted_row(case, selection.network, selection.manifest))
            advance(1)
    result: dict[str, Any] = {"rows": [Report().shown(row) for row in rows]}
    text = to_text(counted_table(rows))
    if args.output is not None:
        with _locked(args.output):
            report = _report_in(args.output)
            for row in rows:
                report = report.with_row(row)
            write_all(args.output, report)
        result, text = {"report": str(args.output), **result}, _with_page(text, args.output)
    console.emit(result, text, as_json=args.json)
    return 0


def _measure(args: Namespace, cases: Sequence[Case], selection: Selection) -> int:
    """Run what the report does not have yet, and print it."""
    folder: Path = args.output
    samples = folder / SAMPLES_FOLDER
    environment = hardware.environment(selection.device, selection.threads)

    def own(report: Report) -> list[Row]:
        return [row for row in report.measured() if row.case in cases]

    with _locked(folder), Screen(args.quiet) as screen:
        report, name = _report_in(folder).with_environment(environment)
        for row in reported_rows():
            report = report.with_row(row)
        todo = [case for case in cases if not _is_done(report.find(case, environment.hardware))]
        if len(todo) < len(cases):
            known = len(cases) - len(todo)
            _log.info("%d of %d cases are in the report already", known, len(cases))
        screen.total = len(todo)
        write_all(folder, report)

        def finished(row: Row) -> None:
            nonlocal report
            report = check_images(report.with_row(row), samples)
            write_all(folder, report)
            screen.show(decodes_table(report, own(report)), row)

        if todo:
            report = _with_counts(report, todo, selection)
            report = _with_ceilings(report, environment, selection, screen.status)
            for left in folder.glob(f"{_WORK}*"):  # of a run that was killed: nobody else runs
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
                repeats = (QUICK_REPEATS if args.quick else REPEATS)[selection.device]
                screen.status("preparing bundles")
                jobs = make_jobs(todo, selection, Path(work))
                runner.run_jobs(
                    jobs, args.repeats or repeats, name, samples, finished, screen.status
                )
            report = _with_ceilings(report, environment, selection, screen.status)
        write_all(folder, report)
    rows = own(report)
    said = summary(replace(report, rows=tuple(rows)))
    text = "\n".join([to_text(decodes_table(report, rows)), *said])
    result = {"report": str(folder), "rows": [report.shown(row) for row in rows], "summary": said}
    console.emit(result, _with_page(text, folder), as_json=args.json)
    return 1 if any(row.status == "error" or row.agrees is False for row in rows) else 0


def _report_in(folder: Path) -> Report:
    """The report that a folder has, or an empty one."""
    return read_report(folder) if (folder / REPORT_FILE).exists() else Report()


def _with_page(text: str, folder: Path) -> str:
    """A result, and where to read more."""
    return f"{text}\n{folder / PAGE_FILE}"


@contextmanager
def _locked(folder: Path) -> Generator[None, None, None]:
    """Keep other runs from a report's folder, which is made if need be."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BenchInputError(
            f"expected {folder} to be free, but another pid-bench writes there; wait, or use "
            "another folder"
        ) from None
    except OSError as error:
        raise BenchInputError(
            f"expected to write {folder}, but got: {error.strerror}; choose another place with -o"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_done(row: Row | None) -> bool:
    """Whether a case need not run again: it did, or memory was found not to suffice."""
    return row is not None and row.status in ("ok", "oom")


def _with_counts(report: Report, cases: Sequence[Case], selection: Selection) -> Report:
    """The report with the work of the whole networks at the usual sizes, for its charts."""
    network = selection.network
    whole = replace(network, config=replace(network.config, patch_depth=network.full_depth))
    for case in {(c.pipeline, c.backend): c for c in cases}.values():
        depth = network.full_depth if case.pipeline == PID else 1.0
        for width, height in COST_SIZES:
            if network.config.latent_size(height, width) is not None:
                full = replace(case, width=width, height=height, depth=depth)
                report = report.with_row(counted_row(full, whole))
    return report


def _with_ceilings(
    report: Report, environment: Environment, selection: Selection, status: Callable[[str], None]
) -> Report:
    """The report with what the device reaches at best, as far as it was not faster before."""
    for precision in selection.precisions:
        status(f"measuring the device's ceilings in {precision}")
        try:
            found = runner.measure_ceilings(precision, selection.device, selection.threads)
        except ChildError as error:
            _log.warning("cannot measure ceilings in %s: %s", precision, error)
            continue
        reached = replace(
            environment,
            matmul_tflop_per_s={precision: found["matmul_tflop_per_s"]},
            copy_gb_per_s=found["copy_gb_per_s"],
        )
        report, _ = report.with_environment(reached)
    return report
