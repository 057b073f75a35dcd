"""Cost of a bridge and dual guidance, on SD1.5's UNet with random weights, at full width and narrow.

Steps are single model predictions inside a real sampling, timed by the sampler function, so that a run's
preparation is excluded. For attention and memory see measuring.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG

from ...models.bridge import BridgeSettings, new_bridge
from ...patches.attention.networks import network_of
from ...patches.bridge.apply import apply_bridge
from ...patches.bridge.guidance import DualGuidance, DualGuider
from ...patches.bridge.run import BridgeSetup
from .measuring import alternating, choose_attention, dtype, median_ratio, now, one_thread, peak_memory, sides
from .operations import Operations, print_operations
from .random_sd15 import NARROW, NARROW_ROUNDS, NARROW_SIDE, random_sd15

STEPS = 20
AIMS = {
    "dual_step_ratio_32": 1.12,
    "dual_step_ratio_64": 1.20,
    "reference_pass_forwards": 1.15,
    "peak_memory_ratio_64": 1.25,
    "peak_memory_ratio_50_to_5_steps": 1.0,
    "strength0_ratio": 1.02,
    "overhead_dual_ratio": 1.08,
    "overhead_reference_pass_forwards": 1.10,
    "ops_dual_extra": 112,
}
CARD_AIMS = {"dual_step_ratio_64": 1.15, "dual_step_ratio_96": 1.12}
Conditioning = list[list[Any]]


class Clock:
    """Times of one kind of sampling: `before` the sampler function, and of each `step` in it, in seconds."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.step: list[float] = []
        self._begin = 0.0

    def started(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """SAMPLER_SAMPLE, outside all others: preparation begins."""
        self._begin = now()
        return executor(*args, **kwargs)

    def sampler(self, steps: int) -> Any:
        """A SAMPLER that takes `steps` predictions at the first noise level."""

        def run(
            model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **_: Any
        ) -> torch.Tensor:
            self.before.append(now() - self._begin)
            for _step in range(steps):
                begin = now()
                model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
                self.step.append(now() - begin)
            return x

        return comfy.samplers.KSAMPLER(run)


def conditioning(seed: int, width: int = 768) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, width, generator=generator), {}]]


def sample(guider: Any, side: int, sampler: Any, steps: int = STEPS) -> None:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


def bridged(model: Any, side: int, strength: float = 1.0) -> Any:
    """`model` with a bridge of rank 64 whose matrices are not zero."""
    widths = network_of(model.model.diffusion_model).widths
    bridge = new_bridge(BridgeSettings(type(model.model.model_config).__name__, widths))
    with torch.no_grad():
        for weight in bridge.model.parameters():
            weight.uniform_(-1, 1).mul_(0.1 * weight.shape[1] ** -0.5)
    reference = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(2))
    return apply_bridge(model, BridgeSetup(bridge, reference, conditioning(3), strength))


def dual(model: Any) -> DualGuider:
    guider = DualGuider(model, DualGuidance(1.5, 7.5))
    guider.set_conds(conditioning(4), conditioning(5))
    return guider


def stock_dual(model: Any) -> Guider_DualCFG:
    """The stock guider on the same three rows."""
    guider = Guider_DualCFG(model)
    guider.set_conds(conditioning(4), conditioning(5), conditioning(5))
    guider.set_cfg(7.5, 1.5)
    return guider


def plain_cfg(model: Any) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(4), conditioning(5))
    guider.set_cfg(7.5)
    return guider


def single(model: Any) -> Guider_Basic:
    guider = Guider_Basic(model)
    guider.set_conds(conditioning(4))
    return guider


def timed(guiders: dict[str, Any], side: int, rounds: int) -> dict[str, Clock]:
    """Every guider's clock after `rounds` samplings of one step each, in alternating order."""
    clocks = {name: Clock() for name in guiders}
    for name, counted in alternating(guiders, rounds):
        clock = clocks[name] if counted else Clock()
        guider = guiders[name]
        wrappers = guider.model_patcher.wrappers.setdefault(WrappersMP.SAMPLER_SAMPLE, {})
        others = {key: value for key, value in wrappers.items() if key != "bench"}
        wrappers.clear()
        # Outside the bridge's own wrapper, so that reading the reference is in `before`.
        wrappers.update({"bench": [clock.started], **others})
        sample(guider, side, clock.sampler(1))
    return clocks


def count_rows(model: Any, guider: Any, side: int) -> int:
    """The UNet's rows in a run of STEPS steps, the reference pass among them."""
    rows = 0

    def note(unet: UNetModel, args: tuple) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = model.model.diffusion_model.register_forward_pre_hook(note)
    try:
        sample(guider, side, comfy.samplers.sampler_object("euler"))
    finally:
        handle.remove()
    return rows


def operations(guider: Any, side: int) -> Operations:
    """Those of one step, the run's second."""
    found = Operations()

    def run(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        for context in (nullcontext(), found):
            with context:
                model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
        return x

    sample(guider, side, comfy.samplers.KSAMPLER(run))
    return found


def narrow(rounds: int) -> dict[str, float]:
    """The overhead: SD1.5's whole depth with hardly any arithmetic."""
    with torch.inference_mode(), one_thread():
        model = random_sd15(dtype=dtype(), width=NARROW)
        choose_attention(model)
        side = NARROW_SIDE
        guiders = {"stock": stock_dual(model), "dual": dual(bridged(model, side)), "row": single(model)}
        clocks = timed(guiders, side, NARROW_ROUNDS * rounds)
        counts = {name: operations(guiders[name], side) for name in ("stock", "dual")}
    for name, clock in clocks.items():
        print(f"narrow, {name}: {statistics.median(clock.step) * 1e3:.1f} ms a step", flush=True)
    print_operations(counts)
    return {
        "overhead_dual_ratio": median_ratio(clocks["dual"].step, clocks["stock"].step),
        "overhead_reference_pass_forwards": median_ratio(clocks["dual"].before, clocks["row"].step),
        "ops_dual_extra": counts["dual"].computed - counts["stock"].computed,
    }


def wide(rounds: int) -> dict[str, float]:
    """The arithmetic: the full width."""
    found: dict[str, float] = {}
    euler = comfy.samplers.sampler_object("euler")
    heads = ("stock step", "dual step", "one row", "reading", "read each step")
    print(f"{'latent':<8}" + "".join(f"{head:>16}" for head in heads))
    with torch.inference_mode():
        model = random_sd15(dtype=dtype())
        choose_attention(model)
        passes = []
        for side in sides():
            guiders = {"stock": stock_dual(model), "dual": dual(bridged(model, side)), "row": single(model)}
            clocks = timed(guiders, side, rounds)
            stock, step, row = (statistics.median(clocks[name].step) for name in ("stock", "dual", "row"))
            reading = statistics.median(clocks["dual"].before)
            passes.append(reading / row)
            found[f"dual_step_ratio_{side}"] = step / stock
            seconds = "".join(f"{value:>15.2f}s" for value in (stock, step, row, reading))
            print(f"{side}x{side:<5}{seconds}{(step + reading) / stock:>15.2f}x", flush=True)
        found["reference_pass_forwards"] = max(passes)
        peaks = [
            peak_memory(partial(sample, guider, 64, Clock().sampler(1)))
            for guider in (stock_dual(model), dual(bridged(model, 64)))
        ]
        found["peak_memory_ratio_64"] = peaks[1] / peaks[0]
        small = dual(bridged(model, 8))
        few, many = (peak_memory(partial(sample, small, 8, euler, steps)) for steps in (5, 50))
        found["peak_memory_ratio_50_to_5_steps"] = many / few
        found["unet_rows_per_run"] = count_rows(model, small, 8)
        pair = {"stock": plain_cfg(model), "off": plain_cfg(bridged(model, 32, strength=0.0))}
        clocks = timed(pair, 32, 2 * rounds + 1)
        stock, off = (statistics.median(clocks[name].step) for name in pair)
        found["strength0_ratio"] = off / stock
    return found
