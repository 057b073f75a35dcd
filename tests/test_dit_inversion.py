"""Inversion on flow models: the path, the noise that a stock sampler begins at, and whose path it is."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import small_dits
import small_models
import torch
from host import Host

STEPS = 8


def _model(kind: str) -> Any:
    """A random network whose prediction is damped, since a random one is too steep to be followed."""
    model = small_models.KINDS[kind]()
    if kind in small_dits.FAMILIES:
        with torch.inference_mode():
            model.model.diffusion_model.final_layer.linear.weight.mul_(0.2)
    return model


def _decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of latents, the peak being their range."""
    error = (found - expected).double().square().mean()
    return float(10 * torch.log10((expected.max() - expected.min()).double() ** 2 / error))


def _sampled(host: Host, model: Any, sigmas: torch.Tensor, noise: Any, latent: Any) -> torch.Tensor:
    """The stock Euler sampler's latent with the source description alone."""
    (guider,) = host.execute("BasicGuider", model=model, conditioning=small_models.conditioning(1))
    (euler,) = host.execute("KSamplerSelect", sampler_name="euler")
    output, _ = host.execute(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=euler, sigmas=sigmas, latent_image=latent
    )
    return output["samples"]


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("family", list(small_dits.FAMILIES))
def test_round_trip(host: Host, family: str, denoise: float) -> None:
    """Protects: the path's clean end is the image, for each of a batch, and the stock sampler gives it back
    from the other end by more than 60 dB, from full noise and from less.
    """
    model, latent = _model(family), {"samples": small_models.latent(3, 2, model=small_models.KINDS[family]())}
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", round(STEPS / denoise))[-STEPS - 1 :]
    inversion, image, noise = host.execute(
        "DescEditInvert",
        model=model,
        latent=latent,
        source=small_models.conditioning(1),
        sigmas=sigmas,
        refine=3,
    )
    assert torch.equal(inversion.trajectory[-1], model.model.process_latent_in(latent["samples"]))
    found = _sampled(host, model, sigmas, noise, image)
    assert _decibels(found, latent["samples"]) > 60
    (none,) = host.execute("DisableNoise")
    assert _decibels(_sampled(host, model, sigmas, none, image), latent["samples"]) < 40


def test_the_same_graph_on_a_unet(host: Host) -> None:
    """Protects: on other models the same two outputs give the bits of the noisy latent with DisableNoise."""
    model, latent = _model("SD1.5"), {"samples": small_models.latent(3)}
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 8)[-5:]
    _, image, noise = host.execute(
        "DescEditInvert", model=model, latent=latent, source=small_models.conditioning(1), sigmas=sigmas
    )
    (none,) = host.execute("DisableNoise")
    assert not torch.equal(image["samples"], latent["samples"])
    found = _sampled(host, model, sigmas, noise, image)
    assert torch.equal(found, _sampled(host, model, sigmas, none, image))


def test_noise_of_another_latent(host: Host) -> None:
    """Protects: the noise serves any number of images if it is of one, and no other size."""
    model, latent = _model("Flux.1 dev"), {"samples": small_models.latent(3, model=_model("Flux.1 dev"))}
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 2)
    *_, noise = host.execute(
        "DescEditInvert", model=model, latent=latent, source=small_models.conditioning(1), sigmas=sigmas
    )
    assert noise.generate_noise({"samples": torch.zeros(3, 16, 16, 16)}).shape == (3, 16, 16, 16)
    with pytest.raises(ValueError, match=r"1 images of 16x16 .* but latent_image has 1 of 8x16"):
        noise.generate_noise({"samples": torch.zeros(1, 16, 16, 8)})


def test_virtual_path(host: Host) -> None:
    """Protects: on a flow model the straight path is (1 - sigma) x0 + sigma n, each image from its own x0 to
    one noise, and its end is where the stock sampler begins.
    """
    model = _model("Flux.1 dev")
    latent = {"samples": small_models.latent(3, 2, model=model)}
    sigmas = torch.tensor([0.9, 0.5, 0.0])
    inversion, _, noise = host.execute(
        "DescEditInvert",
        model=model,
        latent=latent,
        source=small_models.conditioning(1),
        sigmas=sigmas,
        mode="virtual",
        virtual_seed=4,
    )
    clean = model.model.process_latent_in(latent["samples"]).double()
    drawn = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    for index, sigma in enumerate(sigmas.tolist()):
        expected = (1 - sigma) * clean + sigma * drawn
        torch.testing.assert_close(inversion.trajectory[index].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise.samples.double(), drawn.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_whose_path_it_is(host: Host, family: str) -> None:
    """Protects: a path of a model with other weights is told apart, and the same weights loaded again are
    not.
    """
    identity = host.pack_module("patches.host.identity").ModelIdentity
    first, same, other = (identity.of(small_dits.small_dit(family, seed=seed)) for seed in (0, 0, 1))
    assert first.difference(same) is None
    assert first.difference(other) == "a checkpoint with other weights"
