"""Learn the Tiny Studio's own bridges from drawn edit pairs: `python dev.py run training.tiny_studio`.

No pair has a held-out combination of attributes, on either side. A run saves its state often, goes on from it
when called again with the same arguments, and writes the bridge at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.bridge import DIRECTIONS, FUSIONS, AttentionBridge, BridgeSettings, widths_of
from ..models.bridge_file import save_bridge
from ..models.sites import find_sites
from ..models.tiny_studio import scenes, studio
from ..models.tiny_studio.training_tools import say
from .objective import REFERENCE_TIMES, Batch, Objective
from .trainer import Trainer, TrainSettings

WORK = Path(__file__).resolve().parents[1] / ".studio"
PAIRS = 9000


class DrawnPairs:
    """Encoded drawn pairs in memory, in the place of pairs on disk: the edit types in turn, simple and
    complex wording by halves.
    """

    def __init__(self, count: int, vae: Any, clip: Any) -> None:
        self.sizes = [(16, 16)] * count
        self._texts: dict[str, int] = {}
        contexts: list[torch.Tensor] = []
        self._latents = torch.empty(count, 2, 4, 16, 16)
        self._places = torch.empty(count, 2, dtype=torch.long)

        def place(text: str) -> int:
            if text not in self._texts:
                self._texts[text] = len(contexts)
                contexts.append(clip.encode_from_tokens(clip.tokenize(text), return_pooled=False).half())
            return self._texts[text]

        self._empty = place("")
        for number in range(count):
            wording = "simple" if number // len(scenes.EDIT_TYPES) % 2 else "complex"
            pair = scenes.sample_edit(scenes.EDIT_TYPES[number % len(scenes.EDIT_TYPES)], number, wording)
            pictures = np.stack([pair.source.draw(), pair.target.draw()])
            self._latents[number] = vae.encode(torch.from_numpy(pictures))
            self._places[number] = torch.tensor([place(pair.source_text), place(pair.edit_text)])
            if number % 1000 == 0:
                say(f"pairs {number}/{count}")
        self._contexts = torch.cat(contexts)
        self._white = vae.encode(torch.ones(1, 128, 128, 3))

    def batch(self, numbers: Sequence[int], device: torch.device, process_latent_in: Callable) -> Batch:
        source, edit = (process_latent_in(self._latents[list(numbers), role]) for role in (0, 1))
        texts = [self._contexts[self._places[list(numbers), role]].float() for role in (0, 1)]
        empty = self._contexts[self._empty][None].float()
        return Batch(source, edit, *texts, empty, process_latent_in(self._white))


def run(trainer: Trainer, steps: int, state: Path) -> None:
    """Steps until `steps`, with the state saved every three minutes."""
    begin = saved = time.time()
    first = trainer.step
    while trainer.step < steps:
        trainer.run_step()
        if trainer.step % 50 == 0:
            left = (steps - trainer.step) * (time.time() - begin) / (trainer.step - first) / 60
            loss = np.mean(trainer.losses[-50:])
            say(f"{state.stem} {trainer.step}/{steps} loss {loss:.4f}, {left:.0f} min left")
        if time.time() - saved > 180:
            trainer.save(state)
            saved = time.time()
    trainer.save(state)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py run training.tiny_studio", description=__doc__)
    parser.add_argument("--direction", choices=DIRECTIONS, default=DIRECTIONS[0])
    parser.add_argument("--fusion", choices=FUSIONS, default=FUSIONS[0])
    parser.add_argument("--reference-time", choices=REFERENCE_TIMES, default=REFERENCE_TIMES[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=WORK, help="where states and bridges are kept")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = f"bridge_{args.direction}_{args.fusion}_{args.reference_time}"
    args.work.mkdir(parents=True, exist_ok=True)
    model, clip, vae = studio.load_model(), studio.load_clip(), studio.load_vae()
    with torch.no_grad():
        pairs = DrawnPairs(PAIRS, vae, clip)
    sites = find_sites(model.model.diffusion_model, "training")
    base = type(model.model.model_config).__name__
    settings = BridgeSettings(
        base, widths_of(sites), args.rank, float(args.rank), args.direction, args.fusion
    )
    bridge = AttentionBridge(settings, torch.float32, torch.device("cpu")).reset()
    objective = Objective(reference_time=args.reference_time)
    trainer = Trainer(
        model.model,
        bridge,
        pairs,
        TrainSettings(
            args.batch, learning_rate=args.learning_rate, ema=0.99, precision="bf16", objective=objective
        ),
        "cpu",
    )
    model.model.diffusion_model.requires_grad_(False)
    state = args.work / f"{name}.pt"
    if state.exists():
        trainer.load(state)
    run(trainer, args.steps, state)
    with trainer.averaged():
        save_bridge(bridge.half(), args.work / f"{name}.safetensors")
    say(f"wrote {name}.safetensors")


if __name__ == "__main__":
    main()
