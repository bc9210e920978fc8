"""Whose latents a pipeline makes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fakes.autoencoders import small_model
from fakes.generators import PARTS, small_pipeline
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generators import raw_rule, space_of
from pid_pipelines.vaes import VAES
from pid_ref.registry import SPACES, find_space


@pytest.mark.parametrize("backbone", PARTS)
def test_the_space_of_a_pipeline(backbone: str) -> None:
    pipe = small_pipeline(backbone)
    assert space_of(pipe) is find_space(backbone)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert space_of(pipe) is find_space(backbone)
    pipe.vae = None
    assert space_of(pipe) is find_space(backbone)


@pytest.mark.parametrize("space", VAES)
def test_the_space_of_a_class_that_nobody_knows(space: str) -> None:
    pipe = SimpleNamespace(vae=small_model(space))
    assert space_of(pipe) is SPACES[space]
    rule = raw_rule(pipe)
    assert (rule is None) == (space != "flux2")
    if rule is not None:
        raw = np.random.default_rng(0).standard_normal((1, 128, 2, 2)).astype(np.float32)
        want = (torch.from_numpy(raw) - pipe.vae.bn.running_mean[:, None, None]) / torch.sqrt(
            pipe.vae.bn.running_var[:, None, None] + pipe.vae.config.batch_norm_eps
        )
        np.testing.assert_allclose(rule.apply(raw), want, rtol=0, atol=1e-5)


def test_a_pipeline_of_no_space() -> None:
    other = small_model("sdxl")
    other.register_to_config(scaling_factor=0.18215)  # of Stable Diffusion 1.5
    with pytest.raises(PipelineInputError, match="but got SimpleNamespace with AutoencoderKL, wh"):
        space_of(SimpleNamespace(vae=other))
