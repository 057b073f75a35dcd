"""What training a bridge takes on SDXL, Flux and Chroma, by arithmetic; prints a table.

python dev.py run lab.bench.training_sizes

Memory is that of the base, of the bridge with AdamW, and what the pack asks the host for a step, blocks
computed again. Operations of a pair are four forwards of the frozen network: the reference, the edit, the
edit again, and its gradient; what the bridge adds is in docs/speed.md. CUDA's own use is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.supported_models as families
import torch
from comfy.model_base import BaseModel
from torch.utils.flop_counter import FlopCounterMode

from ...models.bridge import AttentionBridge, BridgeSettings
from ...models.operations import disable_weight_init
from ...patches.attention.networks import network_of
from ...patches.host.autograd import differentiable_options, gradients
from ...training.memory import training_bytes
from ...training.settings import TrainSettings
from .sdxl_memory import UNET

RESOLUTIONS = (512, 1024)
SPEED = 400e12  # operations a second, about half of what an H100 does in bf16 at its best
_GB = 1e9
_FLUX: dict[str, Any] = {
    "image_model": "flux",
    "guidance_embed": True,
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "depth": 19,
    "depth_single_blocks": 38,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "hidden_size": 6144,
    "num_heads": 48,
    "axes_dim": [32, 32, 32, 32],
    "depth": 8,
    "depth_single_blocks": 48,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "context_in_dim": 15360,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}
_CHROMA = {
    **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}


@dataclass(frozen=True)
class Base:
    """A base as it is released.

    family: the host's class.
    config: of its network.
    scale: pixels of a latent cell, a side.
    text: tokens and width of a text.
    pooled: width of the pooled text and sizes, 0 for none.
    """

    family: Any
    config: dict[str, Any]
    scale: int
    text: tuple[int, int]
    pooled: int

    def model(self, dtype: torch.dtype) -> BaseModel:
        """The host's model, without weights."""
        config = self.family(dict(self.config))
        config.unet_config = {**self.config, "dtype": dtype}
        config.set_inference_dtype(dtype, None if dtype == torch.bfloat16 else torch.bfloat16)
        config.custom_operations = disable_weight_init
        return config.get_model({}, "", device="meta")


BASES = {
    "SDXL": Base(families.SDXL, UNET, 8, (77, 2048), 2816),
    "Flux.1 dev": Base(families.Flux, _FLUX, 8, (256, 4096), 768),
    "Chroma": Base(families.Chroma, _CHROMA, 8, (256, 4096), 0),
    "Flux.2 dev": Base(families.Flux2, _FLUX2, 16, (512, 15360), 0),
}


def sizes(base: Base) -> dict[str, float]:
    """Learned parameters; GB of the base in bf16 and fp8, of the bridge's training and of a step by
    resolution; and TFLOP of a pair by resolution.
    """
    model = base.model(torch.bfloat16)
    network = network_of(model.diffusion_model)
    settings = BridgeSettings(base.family.__name__, network.widths)
    bridge = AttentionBridge(settings, torch.float32, torch.device("meta"))
    weights = sum(weight.numel() for weight in network.module.parameters())
    small = base.model(torch.float8_e4m3fn)
    found: dict[str, float] = {
        "parameters": settings.parameters(),
        "fuse_rank": settings.fuse_rank,
        "base_gb_bf16": 2 * weights / _GB,
        "base_gb_fp8": weights / _GB,
    }
    train = TrainSettings(batch=1, checkpointing=True)
    for resolution in RESOLUTIONS:
        size = resolution // base.scale, resolution // base.scale
        for name, each in (("bf16", model), ("fp8", small)):
            needed = training_bytes(each, bridge, train, [size], streamed=False)
            found[f"total_gb_{name}_{resolution}"] = found[f"base_gb_{name}"] + needed / _GB
        found[f"pair_tflop_{resolution}"] = 4 * forward_operations(base, model, size) / 1e12
    return found


def forward_operations(base: Base, model: BaseModel, size: tuple[int, int]) -> int:
    """Additions and multiplications of one row's forward."""
    place: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    latent = torch.empty(1, model.latent_format.latent_channels, *size, **place)
    given: dict[str, Any] = {"context": torch.empty(1, *base.text, **place), "control": None}
    if base.pooled:
        given["y"] = torch.empty(1, base.pooled, **place)
    if base.family is not families.SDXL:
        given["guidance"] = torch.empty(1, **place)
    with FlopCounterMode(display=False) as counter, gradients():
        options = differentiable_options({})["transformer_options"]
        model.diffusion_model(latent, torch.empty(1, **place), transformer_options=options, **given)
    return counter.get_total_flops()


def table() -> str:
    """The sizes of all bases, for Markdown."""
    lines = [
        "| base | learned | F | base, bf16 / fp8 | pixels | a step of one pair, bf16 / fp8 | TFLOP a pair | "
        f"seconds at {SPEED / 1e12:.0f} a second |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, base in BASES.items():
        found = sizes(base)
        rank = f"rank {found['fuse_rank']:.0f}" if found["fuse_rank"] else "full"
        for resolution in RESOLUTIONS:
            work = found[f"pair_tflop_{resolution}"]
            step = " / ".join(f"{found[f'total_gb_{dtype}_{resolution}']:.1f}" for dtype in ("bf16", "fp8"))
            lines.append(
                f"| {name} | {found['parameters'] / 1e6:.0f}M | {rank} "
                f"| {found['base_gb_bf16']:.1f} / {found['base_gb_fp8']:.1f} GB | {resolution} "
                f"| {step} GB | {work:.0f} | {work * 1e12 / SPEED:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
