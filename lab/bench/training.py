"""Cost of training a bridge for SD1.5: `python dev.py run lab.bench.training`.

Memory is computed, not measured. The objective runs on tensors without content, and every storage that
autograd keeps for the gradients is summed, so the values are the same on every machine. Attention is torch's
flash kernel, which keeps no probabilities. Not included: the own use of CUDA and torch's allocator.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_base import BaseModel
from comfy.supported_models import SD15
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from ...models.bridge import AttentionBridge, BridgeSettings
from ...models.operations import disable_weight_init
from ...patches.attention.networks import network_of
from ...patches.bridge.core import ReferenceCache
from ...training.objective import Batch, NoiseSample, losses
from ...training.settings import PRECISIONS, Objective
from ...training.texts import Text
from ..output import write_json
from .measuring import device, now, on_card
from .random_sd15 import UNET

RESOLUTIONS = (256, 512, 768)
BATCHES = (1, 4, 8, 32)
STEPS = 100_000
TOKENS, TEXT_WIDTH = 77, 768
GB = 1e9


def parts(dtype: torch.dtype, device: torch.device | None = None) -> tuple[BaseModel, AttentionBridge]:
    """SD1.5 as the host builds it, with frozen weights in their own dtype, and its bridge at rank 64."""
    config = SD15(dict(UNET))
    config.set_inference_dtype(dtype, None)
    config.custom_operations = disable_weight_init
    model = config.get_model({}, "", device=device)
    settings = BridgeSettings("SD15", network_of(model.diffusion_model).widths)
    return model, AttentionBridge(settings, torch.float32, device)


def row_loss(
    model: BaseModel, bridge: AttentionBridge, rows: int, resolution: int, precision: str, checkpointing: bool
) -> torch.Tensor:
    """The loss of `rows` pairs without content, as training computes it."""
    device = next(bridge.parameters()).device
    latents = rows, 4, resolution // 8, resolution // 8
    text = Text(torch.zeros(1, TOKENS, TEXT_WIDTH, device=device))
    picture = torch.zeros(latents, device=device)
    batch = Batch(picture, picture, [text] * rows, [text] * rows, text, picture[:1])
    times = torch.full((rows,), 500, device=device)
    never = [False] * rows
    sample = NoiseSample(times, torch.zeros(latents, device=device), never, never, never)
    objective = Objective(dropout="none")
    dtype = PRECISIONS[precision]
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        cache = ReferenceCache(bridge, network_of(model.diffusion_model))
        return losses(model, cache, batch, sample, objective, checkpointing).mean()


@cache
def kept(rows: int, resolution: int, precision: str, checkpointing: bool) -> tuple[int, int, Counter]:
    """Bytes that autograd keeps; the maximum of them in one layer; and the bytes that are always there."""
    with FakeTensorMode():
        model, bridge = parts(PRECISIONS[precision] or torch.float32)
        weights = [*model.diffusion_model.parameters(), *bridge.parameters()]
        fixed = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        learned = sum(p.nbytes for p in bridge.parameters())
        always = Counter(
            unet=sum(p.nbytes for p in model.diffusion_model.parameters()),
            bridge=learned,
            gradient=learned,
            adamw=2 * learned,
            average=learned,
            parameters=sum(p.numel() for p in bridge.parameters()),
        )
        layers: Counter = Counter()
        seen: dict[StorageWeakRef, torch.Tensor] = {}
        now = [""]
        for name, layer in model.diffusion_model.named_modules():
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                layer.register_forward_pre_hook(lambda *_, name=name: now.__setitem__(0, name))

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in fixed and storage not in seen:
                seen[storage] = tensor  # kept alive, so that no storage is reused
                layers[now[0]] += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            row_loss(model, bridge, rows, resolution, precision, checkpointing)
    return sum(layers.values()), max(layers.values()), always


def memory(precision: str) -> dict[str, float]:
    """Memory in GB: what is always there, what each row adds, and the sum by batch."""
    *_, always = kept(1, RESOLUTIONS[0], precision, False)
    found: dict[str, float] = {"parameters": always["parameters"]}
    names = ("unet", "bridge", "gradient", "adamw", "average")
    found |= {f"{name}_gb": always[name] / GB for name in names}
    # Independent of the rows: the bridge's weights as autocast casts them.
    one, two = (kept(rows, RESOLUTIONS[0], precision, True)[0] for rows in (1, 2))
    rest = 2 * one - two
    for resolution in RESOLUTIONS:
        row, layer, _ = kept(1, resolution, precision, False)
        less, *_ = kept(1, resolution, precision, True)
        # With checkpointing, one layer's activations are recomputed for its gradient.
        for label, each, again in ((f"{resolution}", row, 0), (f"{resolution}_checkpointed", less, layer)):
            found[f"row_gb_{label}"] = (each - rest) / GB
            for batch in BATCHES:
                total = sum(always[name] for name in names) + rest + batch * (each - rest + again)
                found[f"total_gb_{label}_batch_{batch}"] = total / GB
    return found


def step_seconds(batch: int, resolution: int, precision: str, checkpointing: bool, steps: int = 3) -> float:
    """The median time of a step here, with random weights."""
    model, bridge = parts(PRECISIONS[precision] or torch.float32, device())
    for weight in [*model.diffusion_model.parameters(), *bridge.parameters()]:
        torch.nn.init.normal_(weight, std=0.02)
    optimiser = torch.optim.AdamW(bridge.parameters(), lr=1e-5)
    times = []
    for _ in range(steps):
        begin = now()
        row_loss(model, bridge, batch, resolution, precision, checkpointing).backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(now() - begin)
    return sorted(times)[len(times) // 2]


def table(found: dict[str, float], precision: str) -> str:
    """The values as a table."""
    fixed = ", ".join(
        f"{name} {found[f'{name}_gb']:.2f}" for name in ("unet", "bridge", "gradient", "adamw", "average")
    )
    lines = [
        f"{found['parameters']:,.0f} learned parameters; {precision}; GB: {fixed}",
        f"{'pixels':>8}{'checkpointing':>15}{'a row':>9}" + "".join(f"{f'batch {b}':>10}" for b in BATCHES),
    ]
    for resolution in RESOLUTIONS:
        for name, suffix in (("no", ""), ("yes", "_checkpointed")):
            label = f"{resolution}{suffix}"
            totals = "".join(f"{found[f'total_gb_{label}_batch_{b}']:>10.1f}" for b in BATCHES)
            lines.append(f"{resolution:>8}{name:>15}{found[f'row_gb_{label}']:>9.2f}{totals}")
    if "step_seconds" in found:
        lines.append(
            f"{STEPS:,} steps of {found['step_seconds']:.2f} s: {found['hours_100k_steps']:,.1f} hours"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench training", description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--step-seconds", type=float, help="of a step on your machine")
    when.add_argument("--measure", action="store_true", help="measure a step here")
    parser.add_argument("--batch", type=int, default=1, help="of the measured step")
    parser.add_argument("--resolution", type=int, default=256, help="of the measured step")
    parser.add_argument("--checkpointing", action="store_true", help="in the measured step")
    parser.add_argument("--json", type=Path, help="write the results as one flat JSON object")
    args = parser.parse_args()
    found: dict[str, Any] = memory(args.precision)
    seconds = args.step_seconds
    if args.measure:
        seconds = step_seconds(args.batch, args.resolution, args.precision, args.checkpointing)
    if seconds:
        found |= {"step_seconds": seconds, "hours_100k_steps": seconds * STEPS / 3600}
    if args.measure:
        found |= on_card()
    print(table(found, args.precision))
    write_json(args.json, found)


if __name__ == "__main__":
    main()
