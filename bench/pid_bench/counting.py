"""Rows before anything runs: what is known of a case from its graphs and the record of a build."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pid_bench.cases import BACKENDS, PID, Case, Network, tokens_of
from pid_bench.contenders import pipeline_of
from pid_bench.pid_stages import CAPTION_TOKENS, KNOWN_TIMES, program_work_by_graph, reference_step
from pid_bench.report import Row, StageRow
from pid_bench.work import Work, count, total
from pid_export.program import build_program
from pid_ref.config import PidConfig
from pid_runtime.backends.stages import DTYPES
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import PRECISIONS, Run

SECTIONS = ("prologue", "step", "image")
"""Stages of a program."""


def counted_row(case: Case, network: Network, bundle: Path | None = None) -> Row:
    """A case's description and counts, without times.

    bundle: where the record of a build is looked up, for backends that run engines.
    Raises `BenchInputError` for a cascade that the case's space or size has not.
    """
    backend = BACKENDS[case.backend]
    row = Row(
        key=case.key,
        pipeline=case.pipeline,
        backend=case.backend,
        kind="counted",
        space=case.space,
        variant=case.variant,
        device=case.device,
        threads=case.threads or None,
        output_size=(case.width, case.height),
        precision=case.precision,
        dtype=_dtype_in_words(case),
        compile=backend.compile,
        weights=case.weights,
    )
    if case.pipeline != PID:
        return _cascade_row(row, case)
    config = network.config
    scale = config.scale
    row = replace(
        row,
        input_size=(case.width // scale, case.height // scale),
        reduced=network.reduced,
        steps=case.steps,
        cfg=1,
        tiles=1,
    )
    if backend.network == "program":
        works = _program_works(config, case.height, case.width, case.steps, case.precision)
    else:
        works = {
            "step": _reference_work(config, case.height, case.width, case.steps, case.precision)
        }
    if backend.network == "public":
        works = {n: replace(w, weight_bytes=4 * w.parameters) for n, w in works.items()}
    stages = tuple(
        StageRow(
            name=name,
            steps=case.steps if name == "step" else 1,
            cfg=1,
            tiles=1,
            parameters=works[name].parameters,
            tflop=works[name].flop / 1e12,
        )
        for name in SECTIONS
        if name in works
    )
    row = _with_work(replace(row, stages=stages), total(works.values()))
    if bundle is not None and backend.flavor:
        bucket, memory = engine_memory(bundle, backend.flavor, tokens_of(config, row_size(row)))
        row = replace(row, engine_memory=memory, bucket=bucket)
    return row


def row_size(row: Row) -> tuple[int, int]:
    """Width and height of the image that comes out."""
    width, height = row.output_size
    return width, height


def engine_memory(bundle: Path, flavor: str, tokens: int) -> tuple[str, dict[str, int]]:
    """Bucket and device memory in bytes of a decode of so many tokens, as the build recorded it.

    Both are empty when the bundle has no engines of that flavour for so many.
    """
    for engines in read_engine_sets(read_manifest(bundle, verify=False)).values():
        fitting = {n: b for n, b in engines.buckets.items() if b.max_tokens >= tokens}
        if engines.flavor == flavor and fitting:
            name = min(fitting, key=lambda each: fitting[each].max_tokens)
            bucket = asdict(fitting[name])
            parts = ("weights", "buffers", "scratch", "arena")
            memory = {f"{part}_bytes": bucket[f"{part}_bytes"] for part in parts}
            return name, {**memory, "peak_bytes": bucket["peak_device_bytes"]}
    return "", {}


def _cascade_row(row: Row, case: Case) -> Row:
    pipeline = pipeline_of(case)
    dtype = DTYPES[PRECISIONS[case.precision]]
    works = {stage.name: count(stage, dtype) for stage in pipeline.stages}
    stages = tuple(
        StageRow(
            name=stage.name,
            steps=stage.steps,
            cfg=stage.cfg,
            tiles=stage.tiles,
            parameters=works[stage.name].parameters,
            tflop=works[stage.name].flop / 1e12,
        )
        for stage in pipeline.stages
    )
    row = replace(
        row,
        input_size=pipeline.encoded,
        reduced=pipeline.reduced,
        steps=max(stage.steps for stage in stages),
        cfg=max(stage.cfg for stage in stages),
        tiles=max(stage.tiles for stage in stages),
        stages=stages,
    )
    return _with_work(row, total(works.values()))


def _with_work(row: Row, work: Work) -> Row:
    return replace(
        row,
        parameters=work.parameters,
        weight_bytes=work.weight_bytes,
        tflop=work.flop / 1e12,
        bytes_moved=work.bytes_moved,
    )


@functools.cache
def _reference_work(config: PidConfig, height: int, width: int, steps: int, precision: str) -> Work:
    tokens = min(CAPTION_TOKENS, config.text_max_length)
    stage = reference_step(config, height, width, tokens, steps)
    return count(stage, DTYPES[PRECISIONS[precision]])


@functools.cache
def _program_works(
    config: PidConfig, height: int, width: int, steps: int, precision: str
) -> Mapping[str, Work]:
    """Work by section of the program; the modulation table counts with the step."""
    tokens = min(CAPTION_TOKENS, config.text_max_length)
    works = program_work_by_graph(config, height, width, tokens, steps, precision)
    program = build_program(config, precision, KNOWN_TIMES)
    section_of = {
        run.graph: section
        for section in SECTIONS
        for run in program.sections[section]
        if isinstance(run, Run)
    }
    sections: dict[str, Work] = {}
    for graph, work in works.items():
        section = section_of.get(graph, "step")
        sections[section] = total([sections[section], work]) if section in sections else work
    return sections


def _dtype_in_words(case: Case) -> str:
    dtype = PRECISIONS[case.precision]
    if case.backend == "public":
        return f"float32 weights, {dtype} autocast"
    if BACKENDS[case.backend].network == "program" and dtype != "float32":
        return f"{dtype}, norms and tables float32"
    return dtype
