"""Cost of a step that UnifyEdit optimises, on SD1.5's UNet with random weights, at full width and narrow.

A step is everything between two previews of a real sampling. For UnifyEdit these are the source branch, one
gradient step on both losses at the layers up to 16x16, and the guided prediction; for the stock run only that
prediction. For attention and memory see measuring.py. Memory is measured first, smallest first, because a
process does not return all memory it once took. SDXL's memory at 1024x1024 is the estimate that is requested
from the host.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ...patches.attention.layers import structure_layers, word_layers
from ...patches.attention.networks import unet_of
from ...patches.attention.recorder import AttentionRecorder, LossGradient, loss_gradients
from ...patches.host.autograd import differentiable_options, gradients
from ...patches.inversion import Inversion, ModelIdentity
from ...patches.unify.balance import Balance
from ...patches.unify.sampler import UnifySampler
from ...patches.unify.settings import UnifyOptions, UnifySettings
from ...patches.unify.source import active_entry, record
from . import whole_edit
from .attend_and_excite import attend_and_excite
from .bridge import conditioning, plain_cfg, sample
from .measuring import alternating, choose_attention, dtype, median_ratio, now, one_thread, peak_memory, sides
from .operations import Operations, print_operations
from .random_sd15 import NARROW, NARROW_ROUNDS, NARROW_SIDE, random_sd15
from .sdxl_memory import gradient_gib

SIDE = 16
NARROW_TOKENS = 2  # a side, of the layers that have SIDE at 64x64 latents
STEPS = 2  # of a timed run: the first holds the preparation and does not count
FEW, MANY = 5, 25
EDIT_STEPS, WIDE_EDIT_STEPS, WIDE_EDIT_SIDE = 50, 10, 32
AIMS = {
    "step_ratio_32": 2.0,
    "step_ratio_64": 2.0,
    "peak_memory_ratio_64": 1.8,
    "peak_memory_ratio_64_checkpointed": 1.4,
    "overhead_unify_ratio": 2.3,
    "overhead_unify_ratio_checkpointed": 3.0,
    "overhead_edit_ratio": 3.5,
    "sdxl_1024_gradient_gib": 6.0,
    "sdxl_1024_gradient_gib_checkpointed": 4.0,
}
CARD_AIMS = {
    "step_ratio_64": 2.4,
    "step_ratio_96": 2.0,
    "step_ratio_64_checkpointed": 3.5,
    "step_to_attend_and_excite_64": 0.7,
}


@dataclass(frozen=True, eq=False)
class Run:
    """One kind of sampling: a guider and a SAMPLER for each number of steps."""

    guider: Any
    sampler: Callable[[int], Any]

    def seconds(self, side: int) -> list[float]:
        """The time between callbacks: of each step but the first."""
        marks: list[float] = []
        self._sample(side, lambda *_: marks.append(now()))
        return [after - before for before, after in itertools.pairwise(marks)]

    def operations(self, side: int) -> Operations:
        """Those between the first two callbacks, of the second step."""
        found = Operations()
        turns = iter((found.__enter__, partial(found.__exit__, None, None, None)))
        self._sample(side, lambda *_: next(turns)())
        return found

    def _sample(self, side: int, callback: Callable[..., Any]) -> None:
        sampling = self.guider.model_patcher.get_model_object("model_sampling")
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
        self.guider.sample(
            noise,
            torch.zeros_like(noise),
            self.sampler(STEPS),
            comfy.samplers.calculate_sigmas(sampling, "normal", STEPS),
            callback=callback,
            disable_pbar=True,
            seed=1,
        )


def inversion(model: Any, side: int, steps: int) -> Inversion:
    """A random straight path: the cost of a step does not depend on the path."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    clean, noise = torch.randn(2, 1, 4, side, side, generator=torch.Generator().manual_seed(2))
    path = clean + sigmas.view(-1, 1, 1, 1, 1) * noise
    return Inversion(path, sigmas, conditioning(3), ModelIdentity.of(model))


def unify(model: Any, side: int, checkpoint: bool = False, tokens: int = SIDE) -> Run:
    """UnifyEdit with both losses at every step, at the layers up to `tokens` x `tokens`."""

    def sampler(steps: int) -> UnifySampler:
        settings = UnifySettings(
            inversion=inversion(model, side, steps),
            edit_tokens=whole_edit.TOKENS,
            balance=Balance(combination="norm"),
            options=UnifyOptions(max_self_attn_res=tokens, cross_attn_res=tokens, checkpointing=checkpoint),
        )
        return UnifySampler(settings)

    return Run(plain_cfg(model), sampler)


def stock(model: Any) -> Run:
    return Run(plain_cfg(model), lambda steps: comfy.samplers.sampler_object("euler"))


def gradient_only(model: Any, stop: bool) -> Run:
    """The target branch's forward and backward alone, with its UNet ended after the last layer or not."""

    def step(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, callback: Callable, **_: Any
    ) -> torch.Tensor:
        mark = {"i": 0, "denoised": x, "x": x}
        guider, (height, width) = model.inner_model, x.shape[-2:]
        network = unet_of(guider.inner_model.diffusion_model, "UnifyEdit")
        layers = network.layers.values()
        entry = active_entry(guider.conds["positive"], float(sigmas[0]))
        assert entry is not None
        callback(mark)
        with gradients():
            leaf = x.clone().requires_grad_()
            recorder = AttentionRecorder(
                network,
                structure_layers(layers, height, width, SIDE),
                word_layers(layers, height, width, SIDE),
                stop=stop,
            )
            options = differentiable_options(extra_args["model_options"])
            record(guider.inner_model, recorder, entry, leaf, sigmas[0] * x.new_ones([1]), options)
            ends = [
                found.q for found in (*recorder.self_attention.values(), *recorder.cross_attention.values())
            ]
            loss = LossGradient(leaf.new_zeros(1), [(q, torch.ones_like(q)) for q in ends])
            loss_gradients([loss], [leaf])
        callback(mark)
        return x

    return Run(plain_cfg(model), lambda steps: comfy.samplers.KSAMPLER(step))


def timed(runs: dict[str, Run], side: int, rounds: int) -> dict[str, list[float]]:
    """Each run's steps of `rounds` samplings in alternating order, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, counted in alternating(runs, rounds):
        steps = runs[name].seconds(side)
        times[name] += steps if counted else []
    return times


def peak(run: Run, side: int, steps: int) -> int:
    """Bytes."""
    return peak_memory(partial(sample, run.guider, side, run.sampler(steps), steps))


def narrow(rounds: int) -> dict[str, float]:
    """The overhead: SD1.5's whole depth with hardly any arithmetic."""
    with torch.inference_mode(), one_thread():
        model = random_sd15(dtype=dtype(), width=NARROW)
        choose_attention(model)
        side = NARROW_SIDE
        runs = {
            "stock": stock(model),
            "unify": unify(model, side, tokens=NARROW_TOKENS),
            "checkpointed": unify(model, side, checkpoint=True, tokens=NARROW_TOKENS),
        }
        times = timed(runs, side, NARROW_ROUNDS * rounds)
        counts = {name: run.operations(side) for name, run in runs.items()}
        options = UnifyOptions(max_self_attn_res=NARROW_TOKENS, cross_attn_res=NARROW_TOKENS)
        whole = whole_edit.measure(model, side, EDIT_STEPS, rounds, options, "overhead_")
    for name, steps in times.items():
        print(f"narrow, {name}: {statistics.median(steps) * 1e3:.1f} ms a step", flush=True)
    print_operations(counts)
    return {
        "overhead_unify_ratio": median_ratio(times["unify"], times["stock"]),
        "overhead_unify_ratio_checkpointed": median_ratio(times["checkpointed"], times["stock"]),
        "ops_unify_ratio": counts["unify"].computed / counts["stock"].computed,
        **whole,
    }


def wide(rounds: int, compare: bool = False) -> dict[str, float]:
    """The arithmetic: the full width; and memory."""
    found = {
        "sdxl_1024_gradient_gib": gradient_gib(checkpoint=False),
        "sdxl_1024_gradient_gib_checkpointed": gradient_gib(checkpoint=True),
    }
    with torch.inference_mode():
        model = random_sd15(dtype=dtype())
        choose_attention(model)
        few, many = (peak(unify(model, 8), 8, steps) for steps in (FEW, MANY))
        found["memory_growth_mb_25_to_5_steps"] = (many - few) / 1e6
        found["trajectory_mb_50_steps_64"] = inversion(model, 64, 50).trajectory.nbytes / 1e6
        least, checkpointed, most = (
            peak(run, 64, 2) for run in (stock(model), unify(model, 64, checkpoint=True), unify(model, 64))
        )
        for name, size in (("stock", least), ("checkpointed", checkpointed), ("optimised", most)):
            print(f"peak memory at 64x64, {name}: {size / 1e9:.2f} GB", flush=True)
        found["peak_memory_ratio_64"] = most / least
        found["peak_memory_ratio_64_checkpointed"] = checkpointed / least
        heads = ("stock step", "optimised step", "checkpointed", "gradient", "without stop")
        print(f"{'latent':<8}" + "".join(f"{head:>16}" for head in heads))
        for side in sides():
            steps = {
                "stock": stock(model),
                "unify": unify(model, side),
                "checkpointed": unify(model, side, checkpoint=True),
            }
            backward = {"stopped": gradient_only(model, stop=True), "whole": gradient_only(model, stop=False)}
            times = timed(steps, side, rounds) | timed(backward, side, rounds)
            median = {name: statistics.median(values) for name, values in times.items()}
            print(f"{side}x{side:<5}" + "".join(f"{value:>15.2f}s" for value in median.values()), flush=True)
            found[f"step_ratio_{side}"] = median["unify"] / median["stock"]
            found[f"step_ratio_{side}_checkpointed"] = median["checkpointed"] / median["stock"]
            found[f"early_stop_share_{side}"] = median["stopped"] / median["whole"]
            if compare:
                other = attend_and_excite(side, rounds)
                found[f"attend_and_excite_step_ratio_{side}"] = other["seconds"] / median["stock"]
                found[f"step_to_attend_and_excite_{side}"] = median["unify"] / other["seconds"]
        options = UnifyOptions(max_self_attn_res=SIDE, cross_attn_res=SIDE)
        found |= whole_edit.measure(model, WIDE_EDIT_SIDE, WIDE_EDIT_STEPS, max(1, rounds // 2), options)
    if compare:
        found["attend_and_excite_peak_memory_ratio_64"] = other["peak"] / least
    return found
