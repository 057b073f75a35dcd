"""Trains an InstructPix2Pix (arXiv 2211.09800) from the Tiny Studio: `python dev.py run
lab.tiny_studio.train_instruct`.

The shipped UNet gets four more input channels, for the source's latent, whose weights start at zero, and
learns to follow instructions. Pairs, batch, noise, loss weight and the number of steps are those of a bridge
that is trained from the beginning. As in the paper, the text, the image, or both are dropped, each of the
three for 5% of the pairs. Other than in the paper the text encoder learns too: it does not know words such as
"replace". Resumes from its checkpoint and is packed when it is done; `--pack FILE` packs the current state.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import safetensors.torch
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_sampling import ModelSamplingDiscrete

from ...models.files import replacing
from ...models.operations import disable_weight_init
from ...models.tiny_studio import networks, scenes, studio, words
from ...training.objective import sample_noise
from ...training.pairs import batches
from ...training.settings import Objective
from ...training.state import read_state
from . import train_bridge
from .stage import Stage, learning_rate, muon_and_adamw, say
from .train_diffusion import ADAM_RATE, MUON_RATE, TextAndUNet, packed

PACKED = Path(__file__).resolve().parents[1] / "studies" / "instruct_pix2pix.safetensors"
NAME = "instruct"
STEPS, BATCH, SEED = train_bridge.VARIANTS[train_bridge.SHIPPED].steps, train_bridge.SETTINGS.batch, 5
RATE = 0.4  # fraction of the studio's own rates
DROPPED = 0.05
FIRST = "unet.input_blocks.0.0.weight"


def vocabulary() -> list[int]:
    """The studio's tokens, then those that only instructions have."""
    known = words.vocabulary()
    pairs = (
        scenes.sample_edit(edit_type, seed) for seed in range(400) for edit_type in train_bridge.EDIT_TYPES
    )
    used = {token for pair in pairs for token in words.tokens(scenes.instruction(pair))}
    return [*known, *sorted(used - set(known))]


def new_network(start: Path = studio.FILE) -> TextAndUNet:
    """The packed studio with eight input channels; it ignores the four new ones."""
    network = TextAndUNet(vocabulary())
    network.unet = UNetModel(**{**networks.UNET, "in_channels": 8}, operations=disable_weight_init)
    state = packed(start)
    state[FIRST] = F.pad(state[FIRST], (0, 0, 0, 0, 0, 4))
    with torch.no_grad():
        network.table[: len(state["table"])] = state["table"]
    network.load_state_dict({**state, "table": network.table.detach()})
    return network


def dropped(draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs lose their text and which their image, for draws from 0 to 1, [pairs]."""
    text, image = draws < 2 * DROPPED, (draws >= DROPPED) & (draws < 3 * DROPPED)
    return text, image


def train(work: Path, steps: int = STEPS) -> None:
    """Train until `steps`, from the checkpoint if there is one, and pack the averaged weights."""
    pairs = train_bridge.encoded_pairs(work)
    texts = [scenes.instruction(pair) for pair in train_bridge.drawn_edits()]
    torch.manual_seed(SEED)
    device = comfy.model_management.get_torch_device()
    network = new_network().to(device)
    stage = Stage(work / f"{NAME}.pt", network, muon_and_adamw(network, MUON_RATE, ADAM_RATE), 0.9985)
    schedule: Any = ModelSamplingDiscrete().sigmas
    sigmas = schedule.float().to(device)
    objective = Objective(
        dropout="none",
        min_snr=train_bridge.SETTINGS.objective.min_snr,
        offset_noise=train_bridge.SETTINGS.objective.offset_noise,
    )

    def losses() -> tuple[torch.Tensor]:
        numbers = _numbers(pairs.sizes, stage.step)
        batch = pairs.batch(numbers, device, lambda latent: latent)
        first = stage.step * BATCH
        sample = sample_noise(objective, range(first, first + BATCH), batch.edit.shape[1:], len(sigmas))
        draws = torch.rand(BATCH, generator=torch.Generator().manual_seed(SEED * 10**6 + stage.step))
        no_text, no_image = dropped(draws)
        timesteps, noise = sample.timesteps.to(device), sample.noise.to(device)
        instructions = ["" if no_text[i] else texts[number] for i, number in enumerate(numbers)]
        sigma = sigmas[timesteps]
        kept = 1 / (1 + sigma.square())[:, None, None, None]
        noised = kept.sqrt() * batch.edit * networks.LATENT_SCALE + (1 - kept).sqrt() * noise
        seen = torch.where(no_image.to(device)[:, None, None, None], 0.0, batch.source)
        rows = words.padded(instructions, network.rows).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = network(torch.cat([noised, seen], dim=1), timesteps, rows)
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        snr = sigma**-2
        return ((error * snr.clamp(max=objective.min_snr) / snr).mean(),)

    stage.run(steps, losses, lambda step, steps: RATE * learning_rate(step, steps))
    pack(work, PACKED)


def _numbers(sizes: Sequence[tuple[int, int]], step: int) -> list[int]:
    """The pairs of a step."""
    epoch, index = divmod(step, len(sizes) // BATCH)
    return batches(sizes, BATCH, SEED, epoch)[index]


def pack(work: Path, path: Path) -> None:
    """The averaged weights as float16: a packed studio without a VAE; the file says how many steps it had."""
    checkpoint = read_state(work / f"{NAME}.pt")
    state = {
        {"table": "text.table"}.get(name, name): value.half().contiguous()
        for name, value in checkpoint["average"].items()
    }
    state["text.tokens"] = torch.tensor(vocabulary())
    with replacing(path) as part:
        safetensors.torch.save_file(state, part, {"steps": str(checkpoint["step"])})
    say(f"wrote {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.tiny_studio.train_instruct", description=__doc__)
    parser.add_argument("--work", type=Path, default=train_bridge.WORK, help="checkpoint and encoded pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pack", type=Path, help="only write the network trained so far")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pack:
        pack(args.work, args.pack)
        return
    train(args.work)


if __name__ == "__main__":
    main()
