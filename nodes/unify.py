"""UnifyEdit (arXiv 2504.05594): invert the image, find the words, balance the gradients, sample."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.inversion import Inversion, invert
from ..patches.tokens import EditTokens, find_tokens
from ..patches.unify_balance import COMBINATIONS, Balance, draw_balance
from ..patches.unify_sampler import UnifySampler, UnifySettings

CATEGORY = "descriptive edit/unifyedit"
ALIASES = ["UnifyEdit", "2504.05594", "attention guidance", "latent optimization"]

InversionType = io.Custom("INVERSION")
EditTokensType = io.Custom("EDIT_TOKENS")
BalanceType = io.Custom("BALANCE")


class DescEditInvert(io.ComfyNode):
    """Node: `patches.inversion.invert`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditInvert",
            display_name="Invert Image (DDIM)",
            category=CATEGORY,
            description=(
                "Finds the noise from which the stock Euler sampler, with the same SIGMAS, the source "
                "description and guidance 1, gives this image back, and keeps the whole path. UnifyEdit "
                "follows that path."
            ),
            search_aliases=[*ALIASES, "DDIM inversion", "inverse noise", "unsample"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample. Wire the same one to the guider."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The image to edit, from VAEEncode. Several images are inverted together. A "
                    "noise mask in it is ignored.",
                ),
                io.Conditioning.Input(
                    "source", tooltip="The source description, encoded: what the image shows now."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels that fall to 0, the same that the sampler will get. More steps "
                    "follow the image more closely. Denoise below 1 starts from less noise and changes less.",
                ),
                io.Int.Input(
                    "refine",
                    default=3,
                    min=0,
                    max=50,
                    advanced=True,
                    tooltip="Extra model calls per step that make the inversion more exact, 0 to 50. 0 is "
                    "plain DDIM inversion, which drifts from the image; each one more costs as much as the "
                    "inversion at 0.",
                ),
            ],
            outputs=[
                InversionType.Output("inversion", tooltip="The path from image to noise."),
                io.Latent.Output(
                    "noise",
                    tooltip="The path's noisy end, in the latent's own scale. Sample it with DisableNoise "
                    "and the same SIGMAS.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, latent: dict[str, Any], source: list[Any], sigmas: torch.Tensor, refine: int
    ) -> io.NodeOutput:
        inversion = invert(model, latent["samples"], source, sigmas, refine)
        noise = {name: value for name, value in latent.items() if name != "noise_mask"}
        noise["samples"] = model.model.process_latent_out(inversion.trajectory[0].clone())
        return io.NodeOutput(inversion, noise)


class DescEditFindTokens(io.ComfyNode):
    """Node: `patches.tokens.find_tokens`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditFindTokens",
            display_name="Find Edit Tokens",
            category=CATEGORY,
            description=(
                "Finds the tokens of the edit description that carry the edit: by default the words that are "
                "not in the source description."
            ),
            search_aliases=[*ALIASES, "token index", "word position"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that encodes the edit description."),
                io.String.Input(
                    "source_description",
                    multiline=True,
                    tooltip="What the image shows now. Not empty, at most 75 tokens.",
                ),
                io.String.Input(
                    "edit_description",
                    multiline=True,
                    tooltip="What it shall show, the same text that is encoded for the guider. Not empty, "
                    "at most 75 tokens, and other words than the source description. Weights such as "
                    "(red:1.3) are allowed.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="Words or phrases of the edit description that carry the edit, separated by "
                    "commas. Empty: the words that differ from the source description, or, where words are "
                    "only left out, the ones beside them.",
                ),
            ],
            outputs=[
                EditTokensType.Output("edit_tokens"),
                io.String.Output("text", tooltip="The words found and their token positions, for people."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, source_description: str, edit_description: str, words: str = ""
    ) -> io.NodeOutput:
        tokens = find_tokens(clip, source_description, edit_description, words)
        return io.NodeOutput(tokens, tokens.describe())


class DescEditAdaptiveScheduler(io.ComfyNode):
    """Node: `patches.unify_balance.Balance`."""

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
                "at the image. The paper's own function is not published; this one is the pack's choice with "
                "the published shape."
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
            ],
            outputs=[
                BalanceType.Output("balance"),
                io.Image.Output("plot", tooltip="The two weights over the sampling."),
            ],
        )

    @classmethod
    def execute(cls, combination: str, beta1: float, k1: float, beta2: float, k2: float) -> io.NodeOutput:
        try:
            balance = Balance(combination, beta1, k1, beta2, k2)
        except ValueError as error:
            raise ValueError(f"DescEditAdaptiveScheduler: {error}") from None
        return io.NodeOutput(balance, draw_balance(balance))


class DescEditUnifySampler(io.ComfyNode):
    """Node: `patches.unify_sampler.UnifySampler`."""

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
                "starts from the inversion's noise, so the noise input does not matter (use DisableNoise); "
                "of latent_image only its size, number of images and noise mask count."
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
                    "memory. Below the model's smallest grid it is an error.",
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
            ],
            outputs=[io.Sampler.Output("sampler")],
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
    ) -> io.NodeOutput:
        if mask is not None and bool((mask.flatten(1).amax(dim=1) <= 0).any()):
            raise ValueError(
                "DescEditUnifySampler: mask is empty (0 everywhere): paint where the edit happens, or leave "
                "it unconnected"
            )
        settings = UnifySettings(inversion, edit_tokens, balance, mask, structure_side, word_side)
        return io.NodeOutput(UnifySampler(settings))


NODES = [DescEditInvert, DescEditFindTokens, DescEditAdaptiveScheduler, DescEditUnifySampler]
