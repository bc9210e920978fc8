"""Rows before anything runs: what is known of a case from its graphs and the record of a build."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace

from pid_bench.cascades import build_cascade
from pid_bench.cases import BACKENDS, PID, Case, Network, tiles_of, tokens_of
from pid_bench.pid_stages import caption_tokens_of, program_works, reference_step
from pid_bench.report import Counted, Row, StageRow
from pid_bench.work import Work, count, total
from pid_ref.config import PidConfig
from pid_runtime.backends.stages import DTYPES
from pid_runtime.bundle.engines import read_engine_sets
from pid_runtime.bundle.manifest import PRECISIONS, Manifest


def counted_row(case: Case, network: Network, manifest: Manifest | None = None) -> Row:
    """A case's description and counts, without times.

    manifest: of the bundle whose record of a build counts, for backends that run engines.
    Raises `BenchInputError` for a cascade that the case's space or size has not.
    """
    if case.pipeline != PID:
        pipeline = build_cascade(case)
        works = [count(stage, DTYPES[PRECISIONS[case.precision]]) for stage in pipeline.stages]
        stages = [
            _stage(stage.name, work, stage.steps, stage.cfg, stage.tiles)
            for stage, work in zip(pipeline.stages, works, strict=True)
        ]
        return _row(case, pipeline.encoded, pipeline.reduced, works, stages)
    config, flavor = network.config, BACKENDS[case.backend].flavor
    by_section = _pid_works(case, network)
    tiles = tiles_of(case, config)
    row = _row(
        case,
        (case.width // config.scale, case.height // config.scale),
        network.reduced,
        list(by_section.values()),
        [
            _stage(name, work, case.steps if name == "step" or case.tile else 1, tiles=tiles)
            for name, work in by_section.items()
        ],
    )
    if manifest is not None and flavor:
        bucket, memory = engine_memory(manifest, flavor, tokens_of(config, case.decoded_size))
        row = replace(row, counted=replace(row.counted, engine_memory=memory, bucket=bucket))
    return row


def engine_memory(manifest: Manifest, flavor: str, tokens: int) -> tuple[str, dict[str, int]]:
    """Bucket and device memory in bytes of a decode of so many tokens, as the build recorded it.

    Both are empty when the bundle has no engines of that flavour for so many.
    """
    for engines in read_engine_sets(manifest).values():
        fitting = {n: b for n, b in engines.buckets.items() if b.max_tokens >= tokens}
        if engines.flavor == flavor and fitting:
            name = min(fitting, key=lambda each: fitting[each].max_tokens)
            bucket = asdict(fitting[name])
            parts = ("weights", "buffers", "scratch", "arena")
            memory = {f"{part}_bytes": bucket[f"{part}_bytes"] for part in parts}
            return name, {**memory, "peak_bytes": bucket["peak_device_bytes"]}
    return "", {}


def _row(
    case: Case,
    input_size: tuple[int, int],
    reduced: str,
    works: list[Work],
    stages: list[StageRow],
) -> Row:
    work = total(works)
    counted = Counted(work.parameters, work.weight_bytes, work.flop / 1e12, work.bytes_moved)
    return Row("counted", case, input_size, reduced, counted=counted, stages=tuple(stages))


def _stage(name: str, work: Work, steps: int, cfg: int = 1, tiles: int = 1) -> StageRow:
    return StageRow(name, steps, cfg, tiles, work.parameters, work.flop / 1e12)


def _pid_works(case: Case, network: Network) -> Mapping[str, Work]:
    """Work of a decode by what is timed of it."""
    given = network.config, case.height, case.width, case.steps, case.precision
    if case.tile:
        return _tiled_works(case, network)
    if BACKENDS[case.backend].network == "program":
        return _section_works(*given, network.kept)
    work = _reference_work(*given)
    if case.backend == "public":
        work = work._replace(weight_bytes=4 * work.parameters)
    return {"step": work}


def _tiled_works(case: Case, network: Network) -> Mapping[str, Work]:
    """Of a decode in tiles: in every step every tile takes its latent in, and runs."""
    width, height = case.decoded_size
    config = network.config
    tiles = tiles_of(case, config)
    works = dict(_section_works(config, height, width, case.steps, case.precision, network.kept))
    del works["image"]  # the host makes it
    times = {"prologue": tiles * case.steps, "step": tiles}
    return {
        name: work._replace(
            flop=times[name] * work.flop, bytes_moved=times[name] * work.bytes_moved
        )
        for name, work in works.items()
    }


@functools.cache
def _reference_work(config: PidConfig, height: int, width: int, steps: int, precision: str) -> Work:
    stage = reference_step(config, height, width, caption_tokens_of(config), steps)
    return count(stage, DTYPES[PRECISIONS[precision]])


@functools.cache
def _section_works(
    config: PidConfig, height: int, width: int, steps: int, precision: str, kept: tuple[str, ...]
) -> Mapping[str, Work]:
    tokens = caption_tokens_of(config)
    sections = program_works(config, height, width, tokens, steps, precision, kept)
    return {section: total(works.values()) for section, works in sections.items()}
