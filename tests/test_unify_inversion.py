"""DDIM inversion: DescEditInvert."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.samplers
import numpy as np
import pytest
import small_models
import torch
from host import Host
from unify_edit import denoise

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def sigmas_of(model: Any, steps: int = STEPS, scheduler: str = "normal") -> torch.Tensor:
    """SIGMAS of an edit at half denoise: a random UNet is too steep at full noise."""
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, 2 * steps)[-steps - 1 :]


def invert(host: Host, model: Any, samples: torch.Tensor, sigmas: torch.Tensor, **inputs: Any) -> Any:
    """Run the node."""
    source = inputs.pop("source", small_models.conditioning(1))
    return host.execute(
        "DescEditInvert", model=model, latent={"samples": samples}, source=source, sigmas=sigmas, **inputs
    )[:2]


def reconstruct(host: Host, model: Any, noise: dict[str, Any], sigmas: torch.Tensor) -> torch.Tensor:
    """The host's own Euler sampler from the inverted noise, at guidance 1 with the source description."""
    (no_noise,) = host.execute("DisableNoise")
    (euler,) = host.execute("KSamplerSelect", sampler_name="euler")
    source = small_models.conditioning(1)
    (guider,) = host.execute("CFGGuider", model=model, positive=source, negative=source, cfg=1.0)
    output, _ = host.execute(
        "SamplerCustomAdvanced",
        noise=no_noise,
        guider=guider,
        sampler=euler,
        sigmas=sigmas,
        latent_image=noise,
    )
    return output["samples"]


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_reconstruction(host: Host, model: Any, scheduler: str) -> None:
    """Protects: the stock Euler sampler walks back down the stored path to the image, ever closer with
    `refine`.
    """
    samples = small_models.latent(3, batch=2)
    sigmas = sigmas_of(model, scheduler=scheduler)
    errors = []
    for refine in (0, 2, 6):
        inversion, noise = invert(host, model, samples, sigmas, refine=refine)
        assert inversion.trajectory.shape == (STEPS + 1, 2, 4, 16, 16)
        back = reconstruct(host, model, noise, sigmas)
        errors.append(float((back - samples).square().mean().sqrt() / samples.square().mean().sqrt()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 0.002


def test_path(host: Host, model: Any) -> None:
    """Protects: the path ends at the clean latent, in the model's space and in host RAM, and each step
    solves Euler's equation.
    """
    samples = small_models.latent(3)
    sigmas = sigmas_of(model)
    inversion, noise = invert(host, model, samples, sigmas, refine=12)
    path = inversion.trajectory
    assert path.device.type == "cpu"
    torch.testing.assert_close(path[-1], samples * 0.18215)
    torch.testing.assert_close(noise["samples"] * 0.18215, path[0])
    assert set(noise) == {"samples"}
    slopes = (path[:-1] - path[1:]) / (inversion.sigmas[:-1] - inversion.sigmas[1:])[
        :, None, None, None, None
    ]
    for x, slope, sigma in zip(path[:-1], slopes, inversion.sigmas[:-1], strict=True):
        denoised = denoise(model, x, sigma, small_models.conditioning(1))
        torch.testing.assert_close((x - denoised) / sigma, slope, rtol=0.01, atol=2e-4)


def test_half_the_calls(host: Host) -> None:
    """Protects: on the Tiny Studio 2 calls a step give the image back more exactly than 4 calls do when each
    step starts from the last slope and repeats the prediction.
    """
    model, clip, vae, _ = host.execute("DescEditTinyStudio")
    scene = host.pack_module("models.tiny_studio.scenes").sample_scene(np.random.default_rng(1), held=True)
    with torch.inference_mode():
        samples = vae.encode(torch.from_numpy(scene.draw())[None])
        text = [[clip.encode_from_tokens(clip.tokenize("a red circle")), {}]]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 15)[-9:]
    clean = model.model.process_latent_in(samples)
    x, slope = clean, torch.zeros_like(clean)
    for below, sigma in itertools.pairwise(sigmas.flip(0)):
        for _ in range(4):
            at = x + slope * (sigma - below)
            slope = (at - denoise(model, at, sigma, text)) / sigma
        x = x + slope * (sigma - below)
    found, _ = invert(host, model, samples, sigmas, refine=1, source=text)
    errors = []
    for down in (found.trajectory[0], x):
        for above, sigma in itertools.pairwise(sigmas):
            down = down + (down - denoise(model, down, above, text)) / above * (sigma - above)
        errors.append(float((down - clean).norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("refine", [0, 1, 5])
def test_calls(host: Host, model: Any, refine: int) -> None:
    """Protects: an inversion costs 1 + refine calls a step on average, at least one in each, from the image
    to the noise.
    """
    calls: list[float] = []
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(float(args[1][0])))
    try:
        invert(host, model, small_models.latent(3), sigmas_of(model), refine=refine)
    finally:
        handle.remove()
    assert len(calls) == (1 + refine) * STEPS
    assert calls == sorted(calls)
    assert len(set(calls)) == STEPS


def test_mixing_is_exact_where_it_can_be(host: Host) -> None:
    """Protects: where a call multiplies each image's error by a number of its own, two calls find its
    solution, and a call that changes nothing leaves it.
    """
    mixed = host.pack_module("patches.inversion").mixed_slope
    generator = torch.Generator().manual_seed(0)
    solution, slope = torch.randn(2, 3, 1, 4, 5, generator=generator)
    factor = torch.tensor([-1.7, 0.4, 0.9]).view(3, 1, 1, 1)
    first = solution + factor * (slope - solution)
    assert mixed(slope, first, None) is first
    second = solution + factor * (first - solution)
    found = mixed(first, second, (slope, first))
    torch.testing.assert_close(found, solution, rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed(solution, solution, (solution, solution)), solution)


def test_same_bits_twice(host: Host, model: Any) -> None:
    """Protects: inversion is deterministic and leaves the model as it was."""
    before = small_models.fingerprint(model)
    runs = [invert(host, model, small_models.latent(3), sigmas_of(model, 3), refine=1) for _ in range(2)]
    assert torch.equal(runs[0][0].trajectory, runs[1][0].trajectory)
    assert small_models.fingerprint(model) == before


def test_batch_is_two_singles(host: Host, model: Any) -> None:
    """Protects: images inverted together come out as inverted alone."""
    both = torch.cat([small_models.latent(3), small_models.latent(4)])
    sigmas = sigmas_of(model, 3)
    together = invert(host, model, both, sigmas, refine=1)[0].trajectory
    for row in range(2):
        alone = invert(host, model, both[row : row + 1], sigmas, refine=1)[0].trajectory
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "sigmas", "message"),
    [
        (torch.zeros(1, 4, 16, 16), [2.0, 1.0, 0.0], "latent is empty"),
        (torch.ones(1, 16, 16, 16), [2.0, 1.0, 0.0], "latent has shape .* needs .images, 4"),
        (torch.ones(1, 4, 16, 16), [2.0, 1.0, 0.5], "sigmas must fall step by step to 0 but are"),
        (torch.ones(1, 4, 16, 16), [1.0, 2.0, 0.0], "sigmas must fall step by step to 0 but are"),
        (torch.ones(1, 4, 16, 16), [], "sigmas are none: the scheduler's denoise is 0"),
    ],
)
def test_bad_input(host: Host, model: Any, samples: torch.Tensor, sigmas: list[float], message: str) -> None:
    """Protects: each bad input is refused before the model runs, with the node's name and what to do."""
    with pytest.raises(Exception, match=f"Invert Image .DDIM.: {message}"):
        invert(host, model, samples, torch.tensor(sigmas))
