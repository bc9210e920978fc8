"""Which sizes engines are built for: every call of every decode must find its engine."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pid_engines.errors import BuildInputError
from pid_engines.profiles import (
    BAND_SLACK,
    LARGEST_ASPECT,
    ONE_HEAD_TOKENS,
    EnginePlan,
    bands,
    plan_engines,
    shape_ranges,
)
from pid_runtime.bundle.folder import read_manifest
from pid_runtime.bundle.manifest import Manifest, runs_of
from pid_runtime.bundle.sizes import sizes_of_request
from pid_runtime.interpreter import Program

Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 16, 64, 100, 256, 1000])
def test_bands_hold_every_size(budget: int) -> None:
    found = bands(budget)
    for h in range(1, budget + 1):
        for w in range(1, budget // h + 1):
            if max(h, w) <= LARGEST_ASPECT * min(h, w):
                assert any(h <= b[0][2] and w <= b[1][2] for b in found), (h, w)


@given(st.integers(1, 1 << 18))
def test_bands_stay_near_the_budget(budget: int) -> None:
    found = bands(budget)
    assert len(found) <= 12
    for h, w in found:
        assert h[0] == w[0] == 1 and h[0] <= h[1] <= h[2] and w[0] <= w[1] <= w[2]
        assert h[1] * w[1] <= budget
        assert h[2] * w[2] <= max(BAND_SLACK * budget, budget + max(h[2], w[2]))


def test_bands_at_full_size() -> None:
    """4096 x 4096 from latents of 8 pixels, each decoded to four times its width."""
    found = bands(16_384)
    assert len(found) == 11
    assert max(h[2] * w[2] for h, w in found) <= 1.2 * 16_384
    assert found[0][1][2] == found[-1][0][2] == 363


@pytest.fixture(scope="module")
def manifest(golden_bundle: Path) -> Manifest:
    return read_manifest(golden_bundle)


def by_graph(plans: list[EnginePlan]) -> dict[str, list[EnginePlan]]:
    found: dict[str, list[EnginePlan]] = {}
    for plan in plans:
        found.setdefault(plan.graph, []).append(plan)
    return found


def test_engines_of_a_bundle(manifest: Manifest) -> None:
    text = manifest.network["text_max_length"]
    plans = by_graph(plan_engines(manifest, ["small", "tiny"]))
    assert set(plans) == set(manifest.graphs)
    for graph, engines in plans.items():
        assert len(engines) == 1 or manifest.graphs[graph].weights_bytes == 0
    (image,) = plans["image.1"]
    assert (image.name, image.profiles) == ("image.1", ({"L": (1, 64, 64)}, {"L": (1, 1024, 1024)}))
    assert image.buckets == ({"tiny"}, {"small"})
    (caption,) = plans["caption"]
    assert caption.profiles == ({"T": (1, text, text)},) and caption.buckets == ({"tiny", "small"},)
    tiny, small = plans["attention"]
    assert (tiny.name, small.name) == ("attention.tiny", "attention.small")
    keys = (1, 64 + text, 64 + text)
    assert tiny.profiles == ({"Q": keys, "S": keys},)
    (latent,) = plans["latent"]
    assert len(latent.profiles) == len(bands(16)) + len(bands(256))
    for profiles in (image.profiles, latent.profiles):
        volumes = [shape_ranges(tuple(each), each)[2] for each in profiles]
        assert volumes == sorted(volumes, key=lambda sizes: sizes[0] * sizes[-1])


def test_chunks_bound_per_token_graphs_only(chunked_bundle: Path) -> None:
    plans = by_graph(plan_engines(read_manifest(chunked_bundle), ["tiny", "small"]))
    assert plans["image.0"][0].profiles == ({"L": (1, 5, 5)},)
    assert plans["image.0"][0].buckets == ({"tiny", "small"},)
    assert plans["pixel_attention"][1].profiles[0]["S"] == (1, 1024, 1024)


def test_attention_of_one_head_has_a_range_that_is_fused(manifest: Manifest) -> None:
    graph = manifest.graphs["attention"]
    one = replace(graph, options={**graph.options, "heads": 1})
    alone = replace(manifest, graphs={**manifest.graphs, "attention": one})
    plans = by_graph(plan_engines(alone, ["small", "tiny"]))
    (shared,) = plans["attention"]
    assert shared.buckets == ({"tiny", "small"},)
    least = (1, ONE_HEAD_TOKENS, ONE_HEAD_TOKENS)
    assert shared.profiles == ({"Q": least, "S": least},)
    assert len(plans["pixel_attention"]) == 2


def test_a_graph_without_symbols_has_one_empty_profile(free_bundle: Path) -> None:
    plans = by_graph(plan_engines(read_manifest(free_bundle), ["tiny", "small"]))
    (timestep,) = plans["timestep"]
    assert timestep.profiles == ({},) and timestep.buckets == ({"tiny", "small"},)


def test_a_graph_that_never_runs(manifest: Manifest) -> None:
    broken = replace(manifest, program={**manifest.program, "image": ()})
    with pytest.raises(BuildInputError, match="the program to run graph 'unpatchify'"):
        plan_engines(broken, ["tiny"])


class CallRecorder:
    """Graphs and memory that only write down which graphs are called at which shapes."""

    whole_batches = True
    batches_gain = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, Shapes]] = []

    def tensor(self, block: Any, offset: int, dtype: str, shape: tuple[int, ...]) -> Any:
        return shape

    def bind(self, graph: str, tensors: Mapping[str, Any], scratch: Any) -> Callable[[], None]:
        self.calls.append((graph, dict(tensors)))
        return lambda: None


def calls(manifest: Manifest, h: int, w: int, text: int) -> list[tuple[str, Shapes]]:
    """Every call of a decode of one image of this size."""
    per_latent = manifest.tokens_per_latent
    _, bucket = manifest.bucket_for(h * w * per_latent**2)
    sizes = sizes_of_request(
        manifest.network,
        per_latent,
        batch=1,
        latent_height=h,
        latent_width=w,
        text_tokens=text,
        rows=manifest.sampler.max_steps,
    )
    # With nothing but temporary buffers, a program has nothing to fill.
    buffers = {
        name: replace(each, kind="temporary", source=None)
        for name, each in manifest.buffers.items()
    }
    recorder: Any = CallRecorder()
    program = Program(
        replace(manifest, buffers=buffers), recorder, recorder, bucket, sizes, None, {}
    )
    for each in manifest.instructions():
        for run in runs_of(each):
            list(program.bind_run(run, sizes))
    return recorder.calls


@settings(deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("name", ["golden_bundle", "chunked_bundle"])
def test_every_call_finds_an_engine(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    manifest = read_manifest(request.getfixturevalue(name), verify=False)
    h = data.draw(st.integers(1, 42))  # no longer side has both the tokens and the aspect
    w = data.draw(st.integers(-(-h // LARGEST_ASPECT), min(256 // h, LARGEST_ASPECT * h)))
    text = data.draw(st.integers(1, manifest.network["text_max_length"]))
    plans = by_graph(plan_engines(manifest, ["tiny", "small"]))
    made = calls(manifest, h, w, text)
    assert {graph for graph, _ in made} == set(manifest.graphs)
    for graph, shapes in made:
        inputs = manifest.graphs[graph].inputs
        assert any(
            all(
                low <= size <= high
                for port in inputs
                for low, size, high in zip(
                    shape_ranges(inputs[port].shape, profile)[0],
                    shapes[port],
                    shape_ranges(inputs[port].shape, profile)[2],
                    strict=True,
                )
            )
            for plan in plans[graph]
            for profile in plan.profiles
        ), (graph, shapes)


def test_profiles_are_json(manifest: Manifest) -> None:
    for plan in plan_engines(manifest, ["tiny"]):
        assert json.loads(json.dumps(plan.profiles)) == [
            {name: list(sizes) for name, sizes in profile.items()} for profile in plan.profiles
        ]
