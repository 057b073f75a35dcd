"""UnifyEdit (arXiv 2504.05594): balance the gradients, sample, and see what happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.input import CurveInput
from comfy_api.latest import io

from ..patches.host.inputs import read_mask
from ..patches.inversion import Inversion
from ..patches.unify.balance import COMBINATIONS, CURVES, Balance, draw_balance
from ..patches.unify.losses import FORMS
from ..patches.unify.presets import CUSTOM, PRESETS
from ..patches.unify.sampler import UnifySampler
from ..patches.unify.settings import METHODS, REGIONS, UnifySettings
from ..patches.unify.tokens import EditTokens
from ..patches.unify.trace import read_trace
from .errors import naming
from .inversion import ALIASES, CATEGORY, EditTokensType, InversionType

BalanceType = io.Custom("DESCEDIT_BALANCE")
_DRAWN = (
    io.Curve.Input(
        "structure_curve",
        default=[(0.0, 0.0), (1.0, 1.0)],
        tooltip="For the curve drawn: the structure's weight from noise to image, 0 to 1, times beta1.",
    ),
    io.Curve.Input(
        "words_curve",
        default=[(0.0, 1.0), (1.0, 0.0)],
        tooltip="For the curve drawn: the words' weight from noise to image, 0 to 1, times beta2.",
    ),
)


class DescEditAdaptiveScheduler(io.ComfyNode):
    """Node: `patches.unify.balance.Balance`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Balance()
        return io.Schema(
            node_id="DescEditAdaptiveScheduler",
            display_name="Adaptive Scheduler (UnifyEdit)",
            category=CATEGORY,
            description=(
                "Balances keeping the structure against following the words over the sampling: structure "
                "weighs beta1 exp(-k1 (1 - p)), the words beta2 exp(-k2 p), with p from 0 at pure noise to 1 "
                "at the image, or other curves with the same ends. The paper's own function is not "
                "published; these are the pack's choice with the published shape."
            ),
            search_aliases=[*ALIASES, "adaptive time-step scheduler", "balance"],
            inputs=[
                io.Combo.Input(
                    "combination",
                    options=list(COMBINATIONS),
                    default=default.combination,
                    tooltip="balanced: unit-norm gradients, weights that change over time. norm: unit-norm "
                    "gradients, constant weights. naive: the plain sum of the gradients, where one of them "
                    "usually wins.",
                ),
                io.Float.Input(
                    "beta1",
                    default=default.beta1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of keeping the structure, 0 to 10, in lengths of a denoising step. 0 "
                    "switches it off.",
                ),
                io.Float.Input(
                    "k1",
                    default=default.k1,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How fast the structure's weight grows towards the image, 0 to 20. 0 keeps it "
                    "constant; high values leave it to the last steps.",
                ),
                io.Float.Input(
                    "beta2",
                    default=default.beta2,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of following the words, 0 to 10, in lengths of a denoising step. 0 "
                    "switches it off.",
                ),
                io.Float.Input(
                    "k2",
                    default=default.k2,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How fast the words' weight falls from its start at pure noise, 0 to 20. 0 "
                    "keeps it constant; high values leave it to the first steps.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    optional=True,
                    tooltip="Values for a kind of edit, with simple (a red circle) or complex descriptions; "
                    "every other input is then ignored. Chosen on the Tiny Studio; only style differs from "
                    "this node's defaults. custom: the inputs of this node.",
                ),
                io.DynamicCombo.Input(
                    "curve",
                    options=[
                        io.DynamicCombo.Option(name, list(_DRAWN) if name == "drawn" else [])
                        for name in CURVES
                    ],
                    optional=True,
                    tooltip="How the weights of balanced change: exponential; linear and cosine, which are 0 "
                    "from 1/k of the way on; drawn, along two curves instead of k.",
                ),
            ],
            outputs=[
                BalanceType.Output("balance"),
                io.Image.Output("plot", tooltip="The two weights over the sampling."),
            ],
        )

    @classmethod
    def execute(
        cls,
        combination: str,
        beta1: float,
        k1: float,
        beta2: float,
        k2: float,
        preset: str = CUSTOM,
        curve: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        if preset != CUSTOM:
            return _balance(PRESETS[preset])
        curve, drawn = curve or {"curve": Balance.curve}, None
        if curve["curve"] == "drawn":
            along = np.linspace(0.0, 1.0, 101)
            drawn = tuple(
                tuple(CurveInput.from_raw(curve[item.id]).interp_array(along).tolist()) for item in _DRAWN
            )
        balance = Balance(combination, beta1, k1, beta2, k2, curve["curve"], drawn)
        return _balance(balance)


def _balance(balance: Balance) -> io.NodeOutput:
    return io.NodeOutput(balance, draw_balance(balance))


class DescEditUnifySampler(io.ComfyNode):
    """Node: `patches.unify.sampler.UnifySampler`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditUnifySampler",
            display_name="UnifyEdit Sampler",
            category=CATEGORY,
            description=(
                "A SAMPLER for SamplerCustomAdvanced that edits an inverted image with no training. Before "
                "each Euler step it moves the latent down the gradient of two losses: keep the "
                "self-attention of the source, make the edit's words take hold in the cross-attention. It "
                "starts from the inversion's noise, so what is wired to the noise input does not matter: "
                "DisableNoise, or the noise output here, which also carries the trace. Of latent_image only "
                "the size, the number of images and the noise mask count."
            ),
            search_aliases=[*ALIASES, "prompt to prompt", "tuning-free editing"],
            inputs=[
                InversionType.Input(
                    "inversion",
                    tooltip="From Invert Image, made with the guider's model and the sampler's SIGMAS.",
                ),
                EditTokensType.Input(
                    "edit_tokens", tooltip="Which words carry the edit, from Find Edit Tokens."
                ),
                BalanceType.Input(
                    "balance", tooltip="How the two losses are balanced, from Adaptive Scheduler."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the words shall take hold: 1 edited, 0 not. Of the image's size or "
                    "proportions, not empty. Without it they shall take hold everywhere, which suits style "
                    "and background.",
                ),
                io.Int.Input(
                    "structure_side",
                    default=UnifySettings.structure_side,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="Structure is kept at self-attentions with at most this many tokens a side, 1 "
                    "to 256. Low values keep the layout only; high ones keep detail and cost time and "
                    "memory. Below the model's coarsest grid it is that grid: 1 is always the coarsest.",
                ),
                io.Int.Input(
                    "word_side",
                    default=UnifySettings.word_side,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="Words take hold at the cross-attentions whose grid is nearest to this many "
                    "tokens a side, 1 to 256: 1 is the coarsest that the model has, 256 the finest.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=list(FORMS),
                    default=UnifySettings.alignment,
                    optional=True,
                    advanced=True,
                    tooltip="What makes a word take hold. token_ratio: its share among the description's "
                    "words inside the mask; the only one that works without a mask. spatial_ratio: the share "
                    "of its attention that falls inside. area_ratio: inside against outside, squared, the "
                    "form quoted from the paper, without a bound.",
                ),
                io.Combo.Input(
                    "keep",
                    options=list(REGIONS),
                    default=UnifySettings.keep,
                    optional=True,
                    advanced=True,
                    tooltip="Where structure is kept: everywhere, or only among the places inside or outside "
                    "of the mask.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=UnifySettings.method,
                    optional=True,
                    advanced=True,
                    tooltip="latent: move the latent before each prediction. noise: add the gradient to the "
                    "predicted noise instead, the paper's ablation.",
                ),
                io.Int.Input(
                    "inner_iterations",
                    default=UnifySettings.inner_iterations,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Gradient steps before each prediction, 1 to 100, each as long as the balance "
                    "says. Time grows with them. 1 for the method noise.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=UnifySettings.start,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the sampling after which the latent is optimised, 0 to 1. 0: from the "
                    "start.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=UnifySettings.end,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the sampling after which it is not any more, above start_percent, to "
                    "1. 1: to the end. Steps that are not optimised cost no more than stock ones.",
                ),
                io.Boolean.Input(
                    "mask_update",
                    default=UnifySettings.mask_update,
                    optional=True,
                    advanced=True,
                    tooltip="On: the latent is moved inside the mask only. Needs a mask.",
                ),
                io.Boolean.Input(
                    "auto_mask",
                    default=UnifySettings.auto_mask,
                    optional=True,
                    tooltip="On: where no mask is wired, find one from where the edit's words look and where "
                    "the words they replace do. A wired mask comes first.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=UnifySettings.checkpoint,
                    optional=True,
                    advanced=True,
                    tooltip="On: take less memory for the gradients and more time. The result is the same.",
                ),
                io.String.Input(
                    "structure_sites",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Names of the self-attentions to keep, such as output.3.0, or beginnings such as "
                    "output or input.4, separated by commas; they replace structure_side. Empty: by side.",
                ),
                io.String.Input(
                    "word_sites",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Names of the cross-attentions for the words, in the same way; they replace "
                    "word_side. Empty: by side.",
                ),
            ],
            outputs=[
                io.Sampler.Output("sampler"),
                io.Noise.Output(
                    "noise",
                    tooltip="For the noise input of SamplerCustomAdvanced in place of DisableNoise: no noise "
                    "either, and the sampled latent carries the trace for Trace (UnifyEdit).",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        inversion: Inversion,
        edit_tokens: EditTokens,
        balance: Balance,
        structure_side: int,
        word_side: int,
        mask: torch.Tensor | None = None,
        alignment: str = UnifySettings.alignment,
        keep: str = UnifySettings.keep,
        method: str = UnifySettings.method,
        inner_iterations: int = UnifySettings.inner_iterations,
        start_percent: float = UnifySettings.start,
        end_percent: float = UnifySettings.end,
        mask_update: bool = UnifySettings.mask_update,
        auto_mask: bool = UnifySettings.auto_mask,
        checkpointing: bool = UnifySettings.checkpoint,
        structure_sites: str = "",
        word_sites: str = "",
    ) -> io.NodeOutput:
        mask = None if mask is None else read_mask("mask", mask)
        settings = UnifySettings(
            inversion,
            edit_tokens,
            balance,
            mask,
            structure_side,
            word_side,
            structure_sites,
            word_sites,
            alignment,
            keep,
            method,
            inner_iterations,
            start_percent,
            end_percent,
            mask_update,
            auto_mask,
            checkpointing,
        )
        sampler = UnifySampler(settings, naming(cls))
        return io.NodeOutput(sampler, sampler.noise)


class DescEditTrace(io.ComfyNode):
    """Node: `patches.unify.trace.Trace`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditTrace",
            display_name="Trace (UnifyEdit)",
            category=CATEGORY,
            description=(
                "What happened in a run of UnifyEdit Sampler, by step: both losses and the norms of their "
                "gradients, each relative to its largest value, and the steps that were skipped because no "
                "gradient was usable. Wire the sampler's noise output to SamplerCustomAdvanced for it."
            ),
            search_aliases=[*ALIASES, "loss curve", "gradient norm"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="The output of the SamplerCustomAdvanced that had UnifyEdit Sampler's sampler "
                    "and noise.",
                )
            ],
            outputs=[
                io.Image.Output("plot", tooltip="A picture for each image: losses above, gradients below."),
                io.String.Output("text", tooltip="How many steps were optimised and skipped, for people."),
            ],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any]) -> io.NodeOutput:
        trace = read_trace(latent)
        return io.NodeOutput(trace.draw(), trace.describe())


NODES = [DescEditAdaptiveScheduler, DescEditUnifySampler, DescEditTrace]
