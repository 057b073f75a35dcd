"""UnifyEdit (arXiv 2504.05594), what comes before the sampling: invert the image, find the words."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.host.inputs import samples_of
from ..patches.inversion import MODES, invert, invert_virtually
from ..patches.unify.tokens import find_tokens
from ..patches.unify.trace import KEY as TRACE

CATEGORY = "descriptive edit/unifyedit"
ALIASES = ["UnifyEdit", "2504.05594", "attention guidance", "latent optimization"]

InversionType = io.Custom("DESCEDIT_INVERSION")
EditTokensType = io.Custom("DESCEDIT_EDIT_TOKENS")


class DescEditInvert(io.ComfyNode):
    """Node: `patches.inversion`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditInvert",
            display_name="Invert Image (DDIM)",
            category=CATEGORY,
            description=(
                "Finds the noise from which the stock Euler sampler, with the same SIGMAS, the source "
                "description and guidance 1, gives this image back, and keeps the whole path. UnifyEdit "
                "follows that path. The mode virtual skips the search: see there."
            ),
            search_aliases=[
                *ALIASES,
                "DDIM inversion",
                "virtual inversion",
                "InfEdit",
                "inverse noise",
                "unsample",
            ],
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
                    "inversion at 0. Only for the mode ddim.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    optional=True,
                    advanced=True,
                    tooltip="ddim: find the image's own noise, which the stock sampler can use too. virtual: "
                    "take any noise, with no model call; UnifyEdit Sampler then corrects every step by what "
                    "the source description gets wrong, which takes one full model call a step there.",
                ),
                io.Int.Input(
                    "virtual_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    advanced=True,
                    tooltip="Which noise the mode virtual takes, 0 to 4294967295. The mode ddim does not use "
                    "it.",
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
        cls,
        model: Any,
        latent: dict[str, Any],
        source: list[Any],
        sigmas: torch.Tensor,
        refine: int,
        mode: str = MODES[0],
        virtual_seed: int = 0,
    ) -> io.NodeOutput:
        samples = samples_of("latent", latent)
        if mode == "virtual":
            inversion = invert_virtually(model, samples, source, sigmas, virtual_seed)
        else:
            inversion = invert(model, samples, source, sigmas, refine)
        noise = {name: value for name, value in latent.items() if name not in ("noise_mask", TRACE)}
        noise["samples"] = model.model.process_latent_out(inversion.trajectory[0].clone())
        return io.NodeOutput(inversion, noise)


class DescEditFindTokens(io.ComfyNode):
    """Node: `patches.unify.tokens.find_tokens`."""

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
                    "at most 75 tokens, and other words than the source description, unless some are named "
                    "below. Weights such as (red:1.3) and embedding:name are allowed.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="Words or phrases of the edit description that carry the edit, separated by "
                    "commas. Empty: the words that differ from the source description, or, where words are "
                    "only left out, the ones beside them. Punctuation, case and weights are no difference.",
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


NODES = [DescEditInvert, DescEditFindTokens]
