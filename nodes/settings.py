"""Nodes for UnifyEdit's settings: options and balance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from comfy_api.input import CurveInput
from comfy_api.latest import io

from ..patches.inversion import MODES
from ..patches.unify.balance import COMBINATIONS, Balance, draw_balance
from ..patches.unify.losses import FORMS
from ..patches.unify.settings import REGIONS, TARGETS, UnifyOptions
from .inversion import ALIASES, CATEGORY
from .previews import show_images

BalanceType = io.Custom("DESCEDIT_BALANCE")
OptionsType = io.Custom("DESCEDIT_UNIFY_OPTIONS")
CurveType = io.Custom("CURVE")


class DescEditAdaptiveScheduler(io.ComfyNode):
    """Node: `patches.unify.balance.Balance`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Balance()
        return io.Schema(
            node_id="DescEditAdaptiveScheduler",
            display_name="Adaptive Scheduler (UnifyEdit)",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Balances keeping the structure against following the words over the sampling. The "
                "structure's weight is beta1 exp(-k1 (1 - p)), the words' weight beta2 exp(-k2 p), with p "
                "from 0 at pure noise to 1 at the image; or curves of your own. The paper does not "
                "publish its function. These have the published shape and are this pack's choice."
            ),
            search_aliases=[*ALIASES, "adaptive time-step scheduler", "balance"],
            inputs=[
                io.Combo.Input(
                    "combination",
                    options=list(COMBINATIONS),
                    default=default.combination,
                    tooltip="balanced: unit-norm gradients, weights that change over time. norm: unit-norm "
                    "gradients, constant weights. naive: the plain sum of the gradients, in which one of "
                    "them usually dominates.",
                ),
                io.Float.Input(
                    "beta1",
                    default=default.beta1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of keeping the structure, 0 to 10, in lengths of a denoising step, and "
                    "never more than the loss asks for. 0: off. Use about 0.3 for a change of style.",
                ),
                io.Float.Input(
                    "k1",
                    default=default.k1,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How fast the structure's weight grows towards the image, 0 to 20. 0: constant. "
                    "High values limit it to the last steps.",
                ),
                io.Float.Input(
                    "beta2",
                    default=default.beta2,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of following the words, 0 to 10, in lengths of what text guidance "
                    "(CFG) moves in a step, and never more than the loss asks for. 0: off.",
                ),
                io.Float.Input(
                    "k2",
                    default=default.k2,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How fast the words' weight falls from its start at pure noise, 0 to 20. 0: "
                    "constant. High values limit it to the first steps.",
                ),
                *(
                    CurveType.Input(
                        f"{name}_curve",
                        optional=True,
                        tooltip=f"The {name}'s weight from noise to image, 0 to 1, times {beta}, from Curve "
                        f"Editor. Connected: {rate} has no effect. Acts with combination at balanced.",
                        extra_dict={"forceInput": True},
                    )
                    for name, beta, rate in (("structure", "beta1", "k1"), ("words", "beta2", "k2"))
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
        structure_curve: CurveInput | None = None,
        words_curve: CurveInput | None = None,
    ) -> io.NodeOutput:
        balance = Balance(combination, beta1, k1, beta2, k2)
        if structure_curve is not None or words_curve is not None:
            along = np.linspace(0.0, 1.0, 101)
            weights = zip(*(Balance(k1=k1, k2=k2, beta2=1.0).weights(p) for p in along), strict=True)
            structure, words = (
                tuple(curve if drawn is None else CurveInput.from_raw(drawn).interp_array(along).tolist())
                for curve, drawn in zip(weights, (structure_curve, words_curve), strict=True)
            )
            balance = replace(balance, drawn=(structure, words))
        plot = draw_balance(balance)
        return io.NodeOutput(balance, plot, ui=show_images(cls, plot))


class DescEditUnifyOptions(io.ComfyNode):
    """Node: `patches.unify.settings.UnifyOptions`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = UnifyOptions
        return io.Schema(
            node_id="DescEditUnifyOptions",
            display_name="UnifyEdit Options",
            category=CATEGORY,
            description=(
                "Settings that few edits need: form, layers and region of the losses, balance curves, range "
                "of optimised steps, inversion, memory. For UnifyEdit and UnifyEdit Sampler."
            ),
            search_aliases=[*ALIASES, "settings"],
            inputs=[
                BalanceType.Input(
                    "balance",
                    optional=True,
                    tooltip="Other curves, from Adaptive Scheduler. Its beta1 and beta2 replace structure "
                    "and words, which must stay at their defaults.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=list(FORMS),
                    default=default.alignment,
                    optional=True,
                    tooltip="Form of the word loss. token_ratio: the words' share of the description's "
                    "attention inside the mask. absolute: their attention inside the mask. spatial_ratio: "
                    "the share of their attention that lies inside. area_ratio: inside against outside, "
                    "squared, as quoted from the paper; unbounded. The last two need a mask.",
                ),
                io.Combo.Input(
                    "structure_region",
                    options=list(REGIONS),
                    default=default.structure_region,
                    optional=True,
                    tooltip="Where structure is kept: outside the mask, inside it, or everywhere. Without a "
                    "mask, or with one of the whole image, it is kept everywhere.",
                ),
                io.Int.Input(
                    "max_self_attn_res",
                    default=default.max_self_attn_res,
                    optional=True,
                    min=1,
                    max=256,
                    tooltip="Structure is kept at self-attention layers with at most this many tokens per "
                    "side, 1 to 256. Low values keep the layout only; high ones keep detail and need more "
                    "time and memory. 1, or any value below the model's coarsest grid: the coarsest grid. "
                    "With Flux and Chroma the places per side of the maps.",
                ),
                io.Int.Input(
                    "cross_attn_res",
                    default=default.cross_attn_res,
                    optional=True,
                    min=0,
                    max=256,
                    tooltip="The word loss uses the cross-attention layers with the grid nearest to this "
                    "many tokens per side, 0 to 256. 0: the layers where this kind of model was measured to "
                    "keep its words, else 16. 1: the model's coarsest grid. 256: the finest. With Flux and "
                    "Chroma the places per side of the maps.",
                ),
                io.String.Input(
                    "structure_layers",
                    default=default.structure_layers,
                    optional=True,
                    tooltip="Names of the self-attention layers to keep, such as output.3.0 or "
                    "double_block.9, or prefixes such as output or input.4, separated by commas. They are "
                    "used instead of those of max_self_attn_res. Empty: by resolution, with Flux and Chroma "
                    "a part of the double blocks.",
                ),
                io.String.Input(
                    "word_layers",
                    default=default.word_layers,
                    optional=True,
                    tooltip="Names of the cross-attention layers for the words, written the same way. They "
                    "are used instead of those of cross_attn_res. Empty: by resolution, with Flux and Chroma "
                    "the last third of the double blocks.",
                ),
                io.Combo.Input(
                    "update_target",
                    options=list(TARGETS),
                    default=default.update_target,
                    optional=True,
                    tooltip="latent: move the latent before each prediction. noise: add the gradient to the "
                    "predicted noise, the paper's ablation.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=default.inner_steps,
                    optional=True,
                    min=1,
                    max=100,
                    tooltip="Gradient steps before each prediction, 1 to 100, each with the length set by "
                    "the balance. Time grows with them. Must be 1 with update_target noise.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=default.start_percent,
                    optional=True,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of sampling after which optimisation starts, 0 to 1. 0: from the "
                    "first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=default.end_percent,
                    optional=True,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of sampling after which optimisation stops, above start_percent, up "
                    "to 1. 1: to the end. Steps without optimisation cost no more than stock ones.",
                ),
                io.Boolean.Input(
                    "auto_mask",
                    default=default.auto_mask,
                    optional=True,
                    tooltip="On: if no mask is connected, or one of the whole image, find one from where the "
                    "edit's words and the words they replace attend in the inverted image. Off for a change "
                    "of style.",
                ),
                io.Combo.Input(
                    "inversion",
                    options=list(MODES),
                    default=default.inversion,
                    optional=True,
                    tooltip="For UnifyEdit. ddim: find the image's own noise. virtual: use any noise, "
                    "without an inversion pass; every step then costs one more full model call.",
                ),
                io.Int.Input(
                    "refine",
                    default=default.refine,
                    optional=True,
                    min=0,
                    max=50,
                    tooltip="For UnifyEdit: extra model calls that make a ddim inversion more exact, per "
                    "step on average, 0 to 50. Each one costs as much as the inversion at 0.",
                ),
                io.Int.Input(
                    "virtual_seed",
                    default=default.virtual_seed,
                    optional=True,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="For UnifyEdit: seed of a virtual inversion's noise, 0 to 4294967295.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=default.checkpointing,
                    optional=True,
                    tooltip="On: less memory for the gradients, more time. Same result.",
                ),
            ],
            outputs=[OptionsType.Output("options")],
        )

    @classmethod
    def execute(
        cls,
        balance: Balance | None = None,
        alignment: str = UnifyOptions.alignment,
        structure_region: str = UnifyOptions.structure_region,
        max_self_attn_res: int = UnifyOptions.max_self_attn_res,
        cross_attn_res: int = UnifyOptions.cross_attn_res,
        structure_layers: str = UnifyOptions.structure_layers,
        word_layers: str = UnifyOptions.word_layers,
        update_target: str = UnifyOptions.update_target,
        inner_steps: int = UnifyOptions.inner_steps,
        start_percent: float = UnifyOptions.start_percent,
        end_percent: float = UnifyOptions.end_percent,
        auto_mask: bool = UnifyOptions.auto_mask,
        inversion: str = UnifyOptions.inversion,
        refine: int = UnifyOptions.refine,
        virtual_seed: int = UnifyOptions.virtual_seed,
        checkpointing: bool = UnifyOptions.checkpointing,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            UnifyOptions(
                balance=balance,
                alignment=alignment,
                structure_region=structure_region,
                max_self_attn_res=max_self_attn_res,
                cross_attn_res=cross_attn_res,
                structure_layers=structure_layers,
                word_layers=word_layers,
                update_target=update_target,
                inner_steps=inner_steps,
                start_percent=start_percent,
                end_percent=end_percent,
                auto_mask=auto_mask,
                inversion=inversion,
                refine=refine,
                virtual_seed=virtual_seed,
                checkpointing=checkpointing,
            )
        )


NODES = [DescEditUnifyOptions, DescEditAdaptiveScheduler]
