"""Trains the Tiny Studio's bridges on its drawn scenes: `python dev.py run lab.tiny_studio.train_bridge`.

One is the bridge that ships. The others are for the comparison in the bridge study, with the same pairs and
seeds: those of the two directions with the whole budget, the rest with a small one. Those whose names begin
with `flux` are of the Tiny Flux. Each resumes from its checkpoint and is packed when it is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...models.bridge import DIRECTIONS, FUSIONS, AttentionBridge, BridgeSettings
from ...models.bridge_file import load_bridge, save_bridge
from ...models.tiny_studio import flux, scenes, studio
from ...patches.attention.networks import network_of
from ...patches.host.autograd import gradients
from ...training.base_model import to_device
from ...training.cache import EncodedPairs, encode_pairs
from ...training.pairs import EditPair
from ...training.settings import Objective, TrainSettings
from ...training.trainer import Trainer
from . import train_diffusion
from .stage import say

WORK = Path(__file__).resolve().parents[2] / ".studio" / "bridges"
COMPARED = Path(__file__).resolve().parents[1] / "studies" / "bridges"
PAIRS_A_TYPE = 800
RANK = 32
SAVE_EVERY = 60  # seconds
FUSE_RANKS = (48, 16)  # a quarter and a twelfth of the Tiny Flux's width
SETTINGS = TrainSettings(
    batch=16,
    optimiser="muon",
    precision="bf16",
    ema=0.99,
    objective=Objective(offset_noise=train_diffusion.OFFSET_NOISE, min_snr=0.2),
)


@dataclass(frozen=True)
class Variant:
    """A bridge and its training.

    zero_start: whether a linear F starts at zero.
    instruction: whether the edit's text names only the change.
    rate: the learning rate.
    decay: the steps over which it falls.
    again: whether it starts from the bridge that ships.
    batch: pairs a step.
    flux: whether its base is the Tiny Flux.
    fuse_rank: of a linear F, 0 for a full one.
    """

    direction: str = "reference_queries"
    fusion: str = "linear"
    zero_start: bool = True
    instruction: bool = False
    reference_time: str = "zero"
    steps: int = 500
    rate: float = 6e-3
    decay: int = 0
    again: bool = False
    batch: int = SETTINGS.batch
    flux: bool = False
    fuse_rank: int = 0

    @property
    def settings(self) -> TrainSettings:
        """How it is trained. A flow has neither offset noise nor min-SNR weights."""
        plain = Objective() if self.flux else SETTINGS.objective
        objective = replace(plain, reference_time=self.reference_time)
        return replace(
            SETTINGS, batch=self.batch, learning_rate=self.rate, decay=self.decay, objective=objective
        )


SHIPPED, AGAIN = "shipped", "shipped_again"  # the second after the model itself has learned on
EDIT_TYPES = (*scenes.EDIT_TYPES, scenes.TWO)
WHOLE = Variant(steps=4400, rate=5e-3, decay=2200)
ON_FLUX = Variant(flux=True)  # as those that are compared on the UNet
VARIANTS = {
    SHIPPED: WHOLE,
    AGAIN: Variant(steps=1000, rate=4e-3, decay=1000, again=True),
    **{direction: replace(WHOLE, direction=direction) for direction in DIRECTIONS},
    **{f"{d}_{f}": Variant(d, f) for d in DIRECTIONS for f in FUSIONS},
    "random_start": Variant(zero_start=False),
    "same_time": Variant(reference_time="same"),
    "instruction": Variant(instruction=True),
    **{f"flux_{d}": replace(ON_FLUX, direction=d) for d in DIRECTIONS},
    **{
        f"flux_{d}_{rank}": replace(ON_FLUX, direction=d, fuse_rank=rank)
        for d in DIRECTIONS
        for rank in FUSE_RANKS
    },
}


def drawn_edits() -> Iterator[scenes.EditPair]:
    """The training edits, of all edit types and wordings; none has a held-out combination."""
    for seed in range(PAIRS_A_TYPE):
        wording = scenes.WORDINGS[seed % len(scenes.WORDINGS)]
        for edit_type in EDIT_TYPES:
            yield scenes.sample_edit(edit_type, seed, wording)


def drawn_pairs(instruction: bool = False) -> Iterator[EditPair]:
    """Their images and texts. instruction: the edit's text names only the change."""
    for number, pair in enumerate(drawn_edits()):
        text = scenes.instruction(pair) if instruction else pair.edit_text
        source, edit = (torch.from_numpy(scene.draw()) for scene in (pair.source, pair.target))
        yield EditPair(f"{pair.edit_type}-{number // len(EDIT_TYPES)}", source, edit, pair.source_text, text)


def encoded_pairs(work: Path, instruction: bool = False) -> EncodedPairs:
    """The training pairs as latents and text embeddings; missing ones are encoded."""
    total = PAIRS_A_TYPE * len(EDIT_TYPES)

    def report(done: int) -> None:
        if done % 600 == 0:
            say(f"encoded {done}/{total} pairs")

    encoders = studio.load_vae(dtype=torch.float32), studio.load_clip()
    return encode_pairs(drawn_pairs(instruction), *encoders, work / "pairs", report)


def new_bridge(variant: Variant, widths: dict, seed: int) -> AttentionBridge:
    family = flux.TinyFlux if variant.flux else studio.TinySD15
    settings = BridgeSettings(
        family.__name__,
        widths,
        RANK,
        float(RANK),
        variant.direction,
        variant.fusion,
        fuse_rank=variant.fuse_rank,
    )
    bridge = AttentionBridge(settings, torch.float32).reset(seed)
    if not variant.zero_start:
        torch.manual_seed(seed)
        for key in widths:
            fuse: Any = bridge.layer(key).fuse
            torch.nn.Linear.reset_parameters(fuse)
    return bridge


def base_model(variant: Variant, network: Path) -> ModelPatcher:
    """The base, frozen, in float32. network: the Tiny Flux's packed weights."""
    if variant.flux:
        model = flux.load_model(network, disable_dynamic=True, dtype=torch.float32)
    else:
        model = studio.load_model(disable_dynamic=True, dtype=torch.float32)
    model.model.requires_grad_(False)
    return model


def train(name: str, work: Path, network: Path = flux.FILE, steps: int | None = None) -> None:
    """Train one variant, from its checkpoint if there is one, and pack its averaged weights.

    network: the packed weights of the Tiny Flux, for a bridge of it.
    steps: in place of the variant's.
    """
    variant = VARIANTS[name]
    variant = variant if steps is None else replace(variant, steps=steps)
    patcher, settings = base_model(variant, network), variant.settings
    pairs = encoded_pairs(work, variant.instruction)
    to_device(patcher)
    model, device = patcher.model, patcher.load_device
    bridge = new_bridge(variant, network_of(model.diffusion_model).widths, settings.seed)
    if variant.again:
        bridge.load_state_dict(load_bridge(studio.BRIDGE).model.state_dict())
    trainer = Trainer(model, bridge.to(device), pairs, settings, device)
    path = work / f"{name}.pt"
    if path.exists():
        trainer.load(path)
    begin = saved = time.monotonic()
    first = trainer.step

    def keep() -> str:
        trainer.save(path)
        return f"{path} is saved"

    def on_step() -> None:
        nonlocal saved
        if trainer.step % 50 == 0:
            rate = (trainer.step - first) / (time.monotonic() - begin)
            recent = trainer.losses[-200:]
            say(
                f"{name} {trainer.step}/{variant.steps} loss {sum(recent) / len(recent):.4f}, "
                f"{rate:.2f} steps/s, {(variant.steps - trainer.step) / rate / 60:.0f} min left"
            )
        if time.monotonic() - saved > SAVE_EVERY or trainer.step == variant.steps:
            keep()
            saved = time.monotonic()

    with gradients():
        trainer.run(variant.steps, on_step, keep, "Lower SETTINGS.batch")
    target = studio.BRIDGE if name in (SHIPPED, AGAIN) else COMPARED / f"{name}.safetensors"
    save_bridge(trainer.learned(torch.float16), target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.tiny_studio.train_bridge", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints and encoded pairs")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[name for name, variant in VARIANTS.items() if not (variant.again or variant.flux)],
    )
    parser.add_argument("--network", type=Path, default=flux.FILE, help="packed weights of a Tiny Flux")
    parser.add_argument("--steps", type=int, help="in place of the variants' own")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.variants:
        train(name, args.work, args.network, args.steps)


if __name__ == "__main__":
    main()
