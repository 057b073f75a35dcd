"""Small random networks of Flux's kind, of the host's own classes: Flux.1 dev and schnell, Flux.2, Chroma.

The host's loader finds these families only at full size, so they are put together as it does after that.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as families
import memory_modes
import torch

CONTEXT_WIDTH = 32
_FLUX = {
    "image_model": "flux",
    "guidance_embed": True,
    "hidden_size": 64,
    "num_heads": 4,
    "axes_dim": [4, 6, 6],
    "depth": 2,
    "depth_single_blocks": 3,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "context_in_dim": CONTEXT_WIDTH,
    "vec_in_dim": CONTEXT_WIDTH,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "guidance_embed": False,
    "axes_dim": [4, 4, 4, 4],
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_CHROMA = {
    **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 48,
    "n_layers": 2,
}
_SD3 = {
    "in_channels": 16,
    "out_channels": None,
    "patch_size": 2,
    "depth": 2,
    "num_blocks": 3,
    "input_size": None,
    "adm_in_channels": CONTEXT_WIDTH,
    "num_patches": 24 * 24,
    "pos_embed_max_size": 24,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT_WIDTH, "out_features": 128},
    },
    "x_block_self_attn_layers": [0, 1],
}
_QWEN_IMAGE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": CONTEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
# Of Flux's kind.
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "Flux.1 dev": (families.Flux, _FLUX),
    "Flux.1 schnell": (families.FluxSchnell, {**_FLUX, "guidance_embed": False}),
    "Flux.2": (families.Flux2, _FLUX2),
    "Chroma": (families.Chroma, _CHROMA),
}
# Those whose attention only a bridge reaches.
OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "SD3.5": (families.SD3, _SD3),
    "Qwen-Image": (families.QwenImage, _QWEN_IMAGE),
}


def _model(name: str, dtype: torch.dtype, changes: dict[str, Any]) -> Any:
    """The host's BaseModel, without weights. Half precision is computed in float32, as on a CPU."""
    family, config = {**FAMILIES, **OTHERS}[name]
    config = {**config, **changes, "dtype": dtype}
    found = family(dict(config))
    found.unet_config = config  # the constructor adds what it does not know
    found.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    return found.get_model({}, "")


def state_dict(name: str, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Random weights, lively enough that text and place change the output; `changes` are of the config."""
    with memory_modes.resident():  # elsewhere there would be no shapes yet
        shapes = _model(name, torch.float32, changes).diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, weight in shapes.items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            gain = 0.5 if "mod" in key or "adaLN" in key else 1.0
            weights[key] = gain * noise / weight[0].numel() ** 0.5
        else:
            weights[key] = 0.05 * noise + float(key.endswith("weight"))
    return weights


def small_dit(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ModelPatcher around a random network with two double and three single blocks of width 64: 8x8 tokens
    for 16x16 latents, and 16x16 for Flux.2.

    `changes` are of the config. Loaded under inference mode, as the executor loads models.
    """
    weights = {key: weight.to(dtype) for key, weight in state_dict(name, seed, **changes).items()}
    with torch.inference_mode():
        model = _model(name, dtype, changes)
        patcher = comfy.model_patcher.CoreModelPatcher(
            model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        model.diffusion_model.load_state_dict(weights, assign=patcher.is_dynamic())
    return patcher
