"""Every class of pipeline, small and random: run to the end, watched, and stopped early."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fakes.generators import PARTS, small_pipeline
from pid_pipelines.backbones import BACKBONES
from pid_pipelines.errors import PipelineInputError
from pid_pipelines.generator_latents import pid_latent
from pid_pipelines.generator_run import Catcher, run, to_numpy
from pid_ref.registry import SPACES, find_space
from pid_runtime.latents import batch_normalization

SIZE = {"height": 64, "width": 96}


def arguments(backbone: str, steps: int = 4) -> dict[str, Any]:
    """Of a call for two prompts, as the table says."""
    spec = BACKBONES[backbone]
    return {
        spec.prompt_argument: ["a boat", "a house"],
        spec.guidance_argument: spec.guidance,
        **spec.extra,
        **SIZE,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(3),
    }


def test_every_class_has_a_small_pipeline() -> None:
    classes = {each.pipeline for each in BACKBONES.values() if each.pipeline}
    assert {BACKBONES[name].pipeline for name in PARTS} == classes - {"BooguImagePipeline"}


@pytest.mark.parametrize("backbone", PARTS)
def test_the_end_the_way_and_an_early_stop(backbone: str) -> None:
    pipe, space = small_pipeline(backbone), find_space(backbone)
    output = pipe(**arguments(backbone), output_type="latent").images
    raw = None
    if space.name == "flux2":
        mean, variance = to_numpy(pipe.vae.bn.running_mean), to_numpy(pipe.vae.bn.running_var)
        raw = batch_normalization(mean, variance, pipe.vae.config.batch_norm_eps)
    wanted = pid_latent(space, to_numpy(output), (64, 96), raw)

    calls: list[int] = []
    way, end = run(pipe, space, arguments(backbone), at=[2], progress=calls.append)
    assert calls == [1] * 4 and (way.step, end.step, way.steps, end.steps) == (2, 4, 4, 4)
    np.testing.assert_allclose(end.latent, wanted, rtol=0, atol=1e-5)
    assert end.sigma == 0 and end.latent.shape == (2, space.channels, *wanted.shape[2:])

    computed: list[int] = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = network.register_forward_hook(lambda *_: computed.append(1))
    run(pipe, space, arguments(backbone))
    whole = len(computed)
    computed.clear()
    (stopped,) = run(pipe, space, arguments(backbone), stop_at=2)
    hook.remove()
    assert len(computed) * 2 == whole  # of four steps two were computed
    assert (stopped.step, stopped.steps, stopped.sigma) == (2, 4, way.sigma)
    np.testing.assert_array_equal(stopped.latent, way.latent)
    sigma = float(pipe.scheduler.sigmas[2])
    euler = space.partly_denoised == "euler"
    assert way.sigma == pytest.approx(sigma / (sigma**2 + 1) ** 0.5 if euler else sigma)
    assert 0 < way.sigma < 1

    # A pipeline that was stopped runs to the end again.
    np.testing.assert_array_equal(run(pipe, space, arguments(backbone))[0].latent, end.latent)


def test_sdxl_by_schedulers_of_other_frames() -> None:
    """Of one clean latent and one noise the schedulers' latents are the same to PiD."""
    pipe, space = small_pipeline("sdxl"), SPACES["sdxl"]
    generator = np.random.default_rng(0)
    clean, noise = generator.standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    found: list[Any] = []
    for kind in (
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        sigma = float(scheduler.sigmas[2])
        scale = 1 if kind.startswith("Euler") else (sigma**2 + 1) ** 0.5
        pipe.scheduler, pipe._num_timesteps = scheduler, 4
        scheduler._step_index = 2
        catcher = Catcher(space, [1])
        catcher(pipe, 0, None, {"latents": torch.from_numpy((clean + sigma * noise) / scale)})
        level = catcher.after(1).sigma
        trained = (1 - level**2) ** 0.5 * clean + level * noise
        np.testing.assert_allclose(catcher.after(1).latent, trained, rtol=0, atol=1e-5)
        found.append(level)
    assert all(0.1 < level < 1 for level in found)


def test_a_scheduler_that_does_not_say_how_much_noise_is_left() -> None:
    pipe, space = small_pipeline("sdxl"), SPACES["sdxl"]
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert run(pipe, space, arguments("sdxl"))[0].sigma == 0
    with pytest.raises(PipelineInputError, match="noise in sigmas, but got DDIMScheduler; take"):
        run(pipe, space, arguments("sdxl"), stop_at=2)


def test_steps_that_there_are_not() -> None:
    pipe, space = small_pipeline("zimage"), SPACES["flux"]
    for at, stop_at in (([5], None), ([], 5)):
        with pytest.raises(PipelineInputError, match=r"at most 4, the generator's .* got step 5"):
            run(pipe, space, arguments("zimage"), at=at, stop_at=stop_at)
    with pytest.raises(PipelineInputError, match="expected 3 steps, but the generator stopped af"):
        run(pipe, space, arguments("zimage"), at=[3], stop_at=2)
    with pytest.raises(PipelineInputError, match="at least one step, but it ran none"):
        Catcher(space).last()


def test_a_callback_of_the_users_comes_first_and_may_change_latents() -> None:
    pipe, space = small_pipeline("sd3"), SPACES["sd3"]
    seen: list[int] = []

    def change(_pipe: Any, index: int, _time: Any, tensors: Any) -> dict[str, Any]:
        seen.append(index)
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    catcher = Catcher(space, then=change)
    pipe(**arguments("sd3"), output_type="latent", callback_on_step_end=catcher)
    assert seen == [0, 1, 2, 3] and not catcher.last().latent.any()
