"""Trains the Tiny Studio's bridges on its drawn scenes: `python dev.py run lab.tiny_studio.train_bridge`.

One is the bridge that ships. The others are for the comparison in the bridge study, with the same pairs and
seeds: those of the two directions with the whole budget, the rest with a small one. Each resumes from its
checkpoint and is packed when it is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...models.bridge import DIRECTIONS, FUSIONS, AttentionBridge, BridgeSettings
from ...models.bridge_file import load_bridge, save_bridge
from ...models.tiny_studio import scenes, studio
from ...patches.attention.networks import network_of
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


SHIPPED, AGAIN = "shipped", "shipped_again"  # the second after the model itself has learned on
EDIT_TYPES = (*scenes.EDIT_TYPES, scenes.TWO)
WHOLE = Variant(steps=4400, rate=5e-3, decay=2200)
VARIANTS = {
    SHIPPED: WHOLE,
    AGAIN: Variant(steps=1000, rate=4e-3, decay=1000, again=True),
    **{direction: replace(WHOLE, direction=direction) for direction in DIRECTIONS},
    **{f"{d}_{f}": Variant(d, f) for d in DIRECTIONS for f in FUSIONS},
    "random_start": Variant(zero_start=False),
    "same_time": Variant(reference_time="same"),
    "instruction": Variant(instruction=True),
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

    encoders = studio.load_vae(), studio.load_clip()
    return encode_pairs(drawn_pairs(instruction), *encoders, work / "pairs", report)


def new_bridge(variant: Variant, widths: dict, seed: int) -> AttentionBridge:
    settings = BridgeSettings(
        studio.TinySD15.__name__, widths, RANK, float(RANK), variant.direction, variant.fusion
    )
    bridge = AttentionBridge(settings, torch.float32).reset(seed)
    if not variant.zero_start:
        torch.manual_seed(seed)
        for key in widths:
            fuse: Any = bridge.layer(key).fuse
            torch.nn.Linear.reset_parameters(fuse)
    return bridge


def train(name: str, work: Path) -> None:
    """Train one variant, from its checkpoint if there is one, and pack its averaged weights."""
    variant = VARIANTS[name]
    pairs = encoded_pairs(work, variant.instruction)
    device = comfy.model_management.get_torch_device()
    model = studio.load_model(disable_dynamic=True, dtype=torch.float32).model.to(device)
    objective = replace(SETTINGS.objective, reference_time=variant.reference_time)
    settings = replace(SETTINGS, learning_rate=variant.rate, decay=variant.decay, objective=objective)
    bridge = new_bridge(variant, network_of(model.diffusion_model).widths, settings.seed).to(device)
    if variant.again:
        bridge.load_state_dict(load_bridge(studio.BRIDGE).model.state_dict())
    trainer = Trainer(model, bridge, pairs, settings, device)
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

    trainer.run(variant.steps, on_step, keep, "Lower SETTINGS.batch")
    target = studio.BRIDGE if name in (SHIPPED, AGAIN) else COMPARED / f"{name}.safetensors"
    save_bridge(trainer.learned(torch.float16), target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.tiny_studio.train_bridge", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints and encoded pairs")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[name for name in VARIANTS if name != AGAIN]
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.variants:
        train(name, args.work)


if __name__ == "__main__":
    main()
