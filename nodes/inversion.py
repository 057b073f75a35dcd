"""The node that inverts an image to noise, for UnifyEdit."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..patches.host.inputs import samples_of
from ..patches.inversion import MODES, REFINE, invert, invert_virtually, sampler_inputs

CATEGORY = "descriptive edit/unifyedit"
ALIASES = ["UnifyEdit", "2504.05594", "attention guidance", "latent optimization"]

InversionType = io.Custom("DESCEDIT_INVERSION")


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
                "description and guidance 1, reproduces this image, and keeps the whole path for UnifyEdit. "
                "Mode `virtual` needs no inversion pass; see the `mode` input."
            ),
            search_aliases=[
                *ALIASES,
                *("DDIM inversion", "inversion", "invert image", "inverse noise", "unsample", "unsampler"),
                *("null text", "null-text inversion", "rf inversion", "virtual inversion", "InfEdit"),
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
                    "source", tooltip="The encoded source description: what the image shows now."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Sigmas that fall to 0, the same as the sampler's. More steps follow the image "
                    "more closely. A denoise below 1 starts from less noise and changes less.",
                ),
                io.Int.Input(
                    "refine",
                    default=REFINE,
                    min=0,
                    max=50,
                    advanced=True,
                    tooltip="Extra model calls that make the inversion more exact, per step on average, "
                    "0 to 50. 0: about plain DDIM inversion, which drifts from the image. Each one costs as "
                    "much as the inversion at 0. Only for mode ddim.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    optional=True,
                    advanced=True,
                    tooltip="ddim: find the image's own noise, which the stock sampler can use too. "
                    "virtual: use any noise, without a model call; UnifyEdit Sampler then corrects the "
                    "source description's error at every step, which costs one full model call per step "
                    "there.",
                ),
                io.Int.Input(
                    "virtual_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of the noise in mode virtual, 0 to 4294967295. Not used in mode ddim.",
                ),
            ],
            outputs=[
                InversionType.Output("inversion", tooltip="The path from image to noise."),
                io.Latent.Output(
                    "noise",
                    tooltip="The noisy end of the path, in the latent's own scale. Sample it with "
                    "DisableNoise and the same SIGMAS. On flow models (Flux, Chroma): the image itself; "
                    "sample it with sampler_noise.",
                ),
                io.Noise.Output(
                    "sampler_noise",
                    tooltip="Together with the latent above, the noisy end of the path for "
                    "SamplerCustomAdvanced, on every model. On flow models it is needed in place of "
                    "DisableNoise.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
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
        noise = {name: value for name, value in latent.items() if name != "noise_mask"}
        noise["samples"], sampler_noise = sampler_inputs(model, samples, inversion)
        return io.NodeOutput(inversion, noise, sampler_noise)


NODES = [DescEditInvert]
