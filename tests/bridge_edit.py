"""Bridges with random weights, samplings with them, and what a UNet saw, for the bridge's tests."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import small_models
import torch
from host import Host, device

STEPS = 3
LAYERS = 10
LAYOUTS = (
    "plain",
    "three images",
    "two positives",
    "an area",
    "a mask",
    "a range",
    "longer text",
    "odd text",
)


def random_bridge(host: Host, model: Any, rank: int = 4, gain: float = 0.3, **inputs: Any) -> Any:
    """ATTENTION_BRIDGE for `model` whose every weight is random, so that nothing of it is neutral."""
    inputs.setdefault("direction", "edit_queries")
    (bridge,) = host.execute("DescEditNewBridge", model=model, rank=rank, alpha=2.0 * rank, **inputs)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in bridge.model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(gain * noise / weight.shape[1] ** 0.5)
    return bridge


def apply_bridge(host: Host, model: Any, bridge: Any, reference: torch.Tensor, **inputs: Any) -> Any:
    """MODEL with a bridge, from its node; a source description is wired unless `source` is None."""
    inputs.setdefault("source", small_models.conditioning(1))
    if inputs["source"] is None:
        del inputs["source"]
    (patched,) = host.execute(
        "DescEditApplyBridge", model=model, bridge=bridge, reference={"samples": reference}, **inputs
    )
    return patched


def sample(
    host: Host,
    model: Any,
    positive: Any = None,
    negative: Any = None,
    *,
    latent: torch.Tensor | None = None,
    cfg: float = 3.0,
    steps: int = STEPS,
    seed: int = 5,
    **inputs: Any,
) -> torch.Tensor:
    """The stock KSampler's latent, [images, 4, height, width]."""
    _settle(model)
    (output,) = host.execute(
        "KSampler",
        model=model,
        positive=positive or small_models.conditioning(2),
        negative=negative or small_models.conditioning(4),
        latent_image={"samples": small_models.latent(3) * 0 if latent is None else latent},
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        **inputs,
    )
    return output["samples"]


def guided(
    host: Host, guider: Any, *, latent: torch.Tensor | None = None, steps: int = STEPS, seed: int = 5
) -> torch.Tensor:
    """SamplerCustomAdvanced's latent for a GUIDER, with the noise, steps and sampler that `sample` uses."""
    model = guider.model_patcher
    _settle(model)
    (noise,) = host.execute("RandomNoise", noise_seed=seed)
    (sampler,) = host.execute("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.execute("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    output, _ = host.execute(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image={"samples": small_models.latent(3) * 0 if latent is None else latent},
    )
    return output["samples"]


def _settle(model: Any) -> None:
    """Load a MODEL on a card before its sigmas are made: the host makes them where the model's tables lie,
    and until the first load that is the CPU, whose last bit differs.
    """
    if device().type != "cpu":
        small_models.loaded(model)


@dataclass
class Calls:
    """The UNet's calls in a run: for each, its rows, and its timestep."""

    rows: list[int] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    controlled: list[bool] = field(default_factory=list)


@contextmanager
def counted(model: Any) -> Generator[Calls]:
    """Counts the calls of a MODEL's UNet, also of one that ends early."""
    calls = Calls()

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.rows.append(len(args[0]))
        calls.timesteps.append(float(args[1].max()))
        calls.controlled.append(kwargs.get("control") is not None)

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def layouts(host: Host) -> dict[str, tuple[Any, Any, int]]:
    """Positive, negative and images of the layouts that graphs make."""
    one, two, other = (small_models.conditioning(seed) for seed in (2, 6, 4))
    (area,) = host.execute(
        "ConditioningSetArea", conditioning=two, width=64, height=96, x=32, y=16, strength=0.8
    )
    (masked,) = host.execute(
        "ConditioningSetMask",
        conditioning=two,
        mask=half_mask(),
        strength=1.0,
        set_cond_area="mask bounds",
    )
    (late,) = host.execute("ConditioningSetTimestepRange", conditioning=two, start=0.4, end=1.0)
    return {
        "plain": (one, other, 1),
        "three images": (one, other, 3),
        "two positives": ([*one, *two], other, 1),
        "an area": ([*one, *area], other, 1),
        "a mask": ([*one, *masked], other, 2),
        "a range": ([*one, *late], other, 1),
        "longer text": (small_models.conditioning(2, tokens=154), other, 1),
        "odd text": (small_models.conditioning(2, tokens=50), other, 1),
    }


def half_mask() -> torch.Tensor:
    """A MASK of the image's size with its left part to act in."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :56] = 1
    return mask
