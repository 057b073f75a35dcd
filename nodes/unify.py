"""Nodes for UnifyEdit (arXiv 2504.05594): the whole edit, its SAMPLER, and its mask."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..patches.host.inputs import read_mask, samples_of
from ..patches.inversion import Inversion
from ..patches.unify.balance import Balance
from ..patches.unify.edit import edit_latent
from ..patches.unify.mask import find_mask_of_image
from ..patches.unify.sampler import UnifySampler
from ..patches.unify.settings import UnifyOptions, UnifySettings
from ..patches.unify.tokens import EditTokens
from .describe import EditTokensType
from .errors import naming
from .inversion import ALIASES, CATEGORY, InversionType
from .previews import show_images, show_text
from .settings import BalanceType, OptionsType

_NEGATIVE = (
    "What to guide away from, usually an empty description. Not connected: zeros, as from "
    "ConditioningZeroOut."
)
_MASK = (
    "Edit region: 1 = edit, 0 = keep. Same size or aspect ratio as the image, not empty. Not connected: the "
    "whole image, which suits a change of style or background."
)


class DescEditUnify(io.ComfyNode):
    """Node: `patches.unify.edit.edit_latent`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Balance()
        return io.Schema(
            node_id="DescEditUnify",
            display_name="UnifyEdit",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Edits an image from a description of the image and a description of the result, without "
                "training. It inverts the image to noise, then samples with the edit description. Two "
                "losses on the attention keep the structure and make the edit's words take effect. Used "
                "like a KSampler."
            ),
            search_aliases=[
                *ALIASES,
                *("image edit", "edit image", "image editing", "image to image", "KSampler"),
                *("p2p", "prompt-to-prompt", "ip2p", "instructpix2pix", "masactrl", "plug and play"),
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.x, SD2.x, SDXL, Flux.1, Flux.2 or Chroma, with its patches."
                ),
                io.Conditioning.Input("source", tooltip="What the image shows now, from Describe Edit."),
                io.Conditioning.Input("edit", tooltip="What the edited image shows, from Describe Edit."),
                EditTokensType.Input(
                    "edit_tokens", tooltip="Which words carry the edit, from Describe Edit."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The image to edit, from VAE Encode. A noise mask in it protects the area "
                    "outside.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip=_NEGATIVE),
                io.Mask.Input("mask", optional=True, tooltip=_MASK),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="Steps of the inversion and of the sampling, 1 or more. More steps follow the "
                    "image more closely and take longer.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the text guidance, 0 to 100. 1: the edit description alone, which "
                    "halves the time of a prediction, and suits distilled models (Flux.1 dev). High values "
                    "change more.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.SCHEDULER_NAMES),
                    default="normal",
                    tooltip="Schedule of the sigmas. The sampler is always Euler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much noise the edit starts from, 0.01 to 1. 1: all of it. Low values change "
                    "less.",
                ),
                io.Float.Input(
                    "structure",
                    default=default.beta1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of keeping the structure, 0 to 10 (beta1). 0: off. Use about 0.3 for "
                    "a change of style.",
                ),
                io.Float.Input(
                    "words",
                    default=default.beta2,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of following the edit's words, 0 to 10 (beta2). 0: off.",
                ),
                OptionsType.Input(
                    "options", optional=True, tooltip="What few edits need, from UnifyEdit Options."
                ),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="The edited image, for VAE Decode."),
                io.Mask.Output(
                    "mask", tooltip="The edit region used: the given or found mask, or 1 everywhere."
                ),
                io.Image.Output(
                    "plot",
                    tooltip="Losses and gradient norms by step, one plot per image. Each curve is relative "
                    "to its largest value. Crosses are steps without a usable gradient.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        source: list[Any],
        edit: list[Any],
        edit_tokens: EditTokens,
        latent: dict[str, Any],
        steps: int,
        cfg: float,
        scheduler: str,
        denoise: float,
        structure: float,
        words: float,
        negative: list[Any] | None = None,
        mask: torch.Tensor | None = None,
        options: UnifyOptions | None = None,
    ) -> io.NodeOutput:
        samples, region, trace = edit_latent(
            model,
            samples_of("latent", latent),
            latent.get("noise_mask"),
            source=source,
            edit=edit,
            negative=negative,
            edit_tokens=edit_tokens,
            mask=None if mask is None else read_mask("mask", mask),
            steps=steps,
            cfg=cfg,
            scheduler=scheduler,
            denoise=denoise,
            structure=structure,
            words=words,
            options=options or UnifyOptions(),
            report=show_text,
        )
        show_text(f"edited, in {float(region.mean()):.0%} of the image")
        kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
        plot = trace.draw()
        shown = (region, plot) if options is not None and options.auto_mask else (plot,)
        return io.NodeOutput({**kept, "samples": samples}, region, plot, ui=show_images(cls, *shown))


class DescEditUnifySampler(io.ComfyNode):
    """Node: `patches.unify.sampler.UnifySampler`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditUnifySampler",
            display_name="UnifyEdit Sampler",
            category=CATEGORY,
            description=(
                "UnifyEdit as a SAMPLER, for graphs with their own guider or SIGMAS; the node UnifyEdit "
                "does everything at once. Before each Euler step it moves the latent down the gradient of "
                "two losses: one keeps the self-attention of the source, the other makes the edit's words "
                "take effect in the cross-attention. It starts from the inversion's noise, so the noise "
                "input of SamplerCustomAdvanced has no effect: use DisableNoise. Of latent_image only the "
                "size, the number of images and the noise mask are used."
            ),
            search_aliases=ALIASES,
            inputs=[
                InversionType.Input(
                    "inversion",
                    tooltip="From Invert Image, made with the guider's model and the sampler's SIGMAS.",
                ),
                EditTokensType.Input(
                    "edit_tokens",
                    tooltip="Which words carry the edit, from Find Edit Tokens or Describe Edit.",
                ),
                BalanceType.Input(
                    "balance",
                    optional=True,
                    tooltip="How the two losses are balanced, from Adaptive Scheduler. Not connected: that "
                    "node's defaults.",
                ),
                io.Mask.Input("mask", optional=True, tooltip=_MASK),
                OptionsType.Input(
                    "options",
                    optional=True,
                    tooltip="Settings that few edits need, from UnifyEdit Options. Its inversion settings "
                    "have no effect here: set them in Invert Image.",
                ),
            ],
            outputs=[io.Sampler.Output("sampler")],
        )

    @classmethod
    def execute(
        cls,
        inversion: Inversion,
        edit_tokens: EditTokens,
        balance: Balance | None = None,
        mask: torch.Tensor | None = None,
        options: UnifyOptions | None = None,
    ) -> io.NodeOutput:
        options = options or UnifyOptions()
        if balance is not None and options.balance is not None:
            raise ValueError("balance is connected here and in options: connect one of them")
        settings = UnifySettings(
            inversion=inversion,
            edit_tokens=edit_tokens,
            balance=balance or options.balance or Balance(),
            mask=None if mask is None else read_mask("mask", mask),
            options=options,
        )
        return io.NodeOutput(UnifySampler(settings, naming(cls)))


class DescEditFindMask(io.ComfyNode):
    """Node: `patches.unify.mask.find_mask_of_image`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditFindMask",
            display_name="Find Edit Mask",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Finds where an edit would happen: where the edit's words, and the words they replace, "
                "attend in the image. The threshold is 0.3 of the highest attention, as in "
                "Prompt-to-Prompt's LocalBlend."
            ),
            search_aliases=[*ALIASES, "automatic mask", "LocalBlend", "segment", "DAAM"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.x, SD2.x, SDXL, Flux.1, Flux.2 or Chroma, with its patches."
                ),
                io.Conditioning.Input("source", tooltip="What the image shows now, from Describe Edit."),
                io.Conditioning.Input("edit", tooltip="What the edited image shows, from Describe Edit."),
                EditTokensType.Input(
                    "edit_tokens", tooltip="Which words carry the edit, from Describe Edit."
                ),
                io.Latent.Input("latent", tooltip="The image, from VAE Encode. Noise is added to it."),
                io.Int.Input(
                    "cross_attn_res",
                    default=UnifyOptions.cross_attn_res,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Cross-attention layers with the grid nearest to this many tokens per side are "
                    "read, 0 to 256. 0: the layers where this kind of model was measured to keep its words, "
                    "else 16. 1: the model's coarsest grid. 256: the finest.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="1 where the words attend, 0 elsewhere, in the image's size.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        source: list[Any],
        edit: list[Any],
        edit_tokens: EditTokens,
        latent: dict[str, Any],
        cross_attn_res: int = UnifyOptions.cross_attn_res,
    ) -> io.NodeOutput:
        samples = samples_of("latent", latent)
        mask = find_mask_of_image(model, samples, source, edit, edit_tokens, cross_attn_res)
        return io.NodeOutput(mask, ui=show_images(cls, mask))


NODES = [DescEditUnify, DescEditFindMask, DescEditUnifySampler]
