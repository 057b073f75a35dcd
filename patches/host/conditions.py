"""What the host makes of a conditioning for one call of a network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel


def model_conditions(
    model: BaseModel, entry: dict[str, Any], latents: torch.Tensor, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """The conditions of a model call that `names` lists, by the host's name, as far as there are any.

    They are on the latents' device and, if they are floats, in the dtype that the network computes in.

    entry: of a CONDITIONING, in the host's inner form (`convert_cond`).
    latents: of the call, [rows, channels, height, width]: the host reads sizes from them.
    names: such as `c_crossattn` for the text and `y` for pooled text.
    """
    (found,) = comfy.samplers.encode_model_conds(
        model.extra_conds,
        [entry],
        latents,
        latents.device,
        "positive",
        latent_image=latents,
        denoise_mask=None,
    )
    dtype, rows = model.get_dtype_inference(), len(latents)
    tensors = {
        name: cond.process_cond(batch_size=rows, area=None).cond
        for name, cond in found["model_conds"].items()
        if name in names
    }
    return {
        name: tensor.to(latents.device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
