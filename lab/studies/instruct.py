"""InstructPix2Pix (arXiv 2211.09800), trained from the Tiny Studio on a bridge's pairs, as a method: the main
comparison of DescriptiveEdit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.utils
import node_helpers
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Guider_DualCFG

from ...models.tiny_studio import scenes, studio
from ..bench.measuring import torch_attention
from ..tiny_studio.train_instruct import PACKED
from .studio import Batch, Studio, StudioMethod, conditioning, sample, schedule


class TinyInstruct(studio.TinySD15):
    """The studio's family with the host's model that takes a source beside the noised latent."""

    unet_config: ClassVar[dict] = {}

    def get_model(self, *_: Any, **__: Any) -> comfy.model_base.BaseModel:
        return comfy.model_base.SD15_instructpix2pix(self)


def load_instruct(file: Path = PACKED) -> ModelPatcher:
    """The network of a file of `train_instruct`, in float32."""
    state = safetensors.torch.load_file(file)
    state = comfy.utils.state_dict_prefix_replace(state, {"unet.": ""}, filter_keys=True)
    config = TinyInstruct(comfy.model_detection.detect_unet_config(state, ""))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model()
    model.load_model_weights(state, "")
    management = comfy.model_management
    patcher = ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())
    patcher.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
    return patcher


def steps_learned(file: Path = PACKED) -> int:
    """How many steps the network of a file had."""
    with safetensors.safe_open(file, "pt") as opened:
        return int(opened.metadata()["steps"])


def instructed(image: float, text: float, file: Path = PACKED) -> StudioMethod:
    """Instructions, from each case's own noise. image, text: s_I and s_T of equation 3."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        told = Studio(load_instruct(file), studio.load_clip(file), tiny.vae)
        instruction = told.text([scenes.instruction(pair) for pair in batch.pairs])
        shown = {"concat_latent_image": batch.latent}
        middle = conditioning(told.text([""]).expand_as(instruction))
        guider = Guider_DualCFG(told.model)
        guider.set_conds(
            node_helpers.conditioning_set_values(conditioning(instruction), shown),
            node_helpers.conditioning_set_values(middle, shown),
            middle,
        )
        guider.set_cfg(text, image)
        return sample(guider, batch.noise, torch.zeros_like(batch.latent), schedule(tiny))

    return StudioMethod("InstructPix2Pix", edit, f"instruct {image} {text}", (file,))
