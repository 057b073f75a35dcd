"""SD1.5's UNet with random weights, at its full width or narrow, for measuring speed and memory."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.supported_models import SD15

from ...models.operations import disable_weight_init

WIDE, NARROW = 320, 32
NARROW_SIDE = 8  # of the latents of a narrow UNet
NARROW_ROUNDS = 8  # for each round that was asked for: a narrow step takes a fraction of a second
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDE,
    "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "legacy": False,
}


@torch.no_grad()
def random_sd15(seed: int = 0, dtype: torch.dtype = torch.float32, width: int = WIDE) -> Any:
    """A ModelPatcher of 860M parameters (3.4 GB in float32), weights uniform with SD1.5's usual spread.

    width: channels of the outermost blocks. With NARROW every layer is there and hardly any arithmetic.
    """
    config = SD15({**UNET, "model_channels": width})
    config.set_inference_dtype(dtype, None)
    config.custom_operations = disable_weight_init
    model = config.get_model({}, "")
    torch.manual_seed(seed)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))  # norms are neutral, biases zero
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
