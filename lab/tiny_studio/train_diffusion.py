"""Trains the Tiny Studio's UNet and text encoder on stored latents.

ε-prediction on SD1.5's schedule. Two things decide the quality of so small a model (measured): the loss
weight min(1/ᾱ, 8), and offset noise in training. Without the latter, the schedule leaves a trace of the
image's mean in pure noise, and a network that reads colours there does not read them in the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from comfy.model_sampling import ModelSamplingDiscrete

from ...models.tiny_studio import networks, scenes, words
from .stage import Stage, learning_rate, muon_and_adamw

OFFSET_NOISE = 0.5
CAPTION_DROP = 0.1
CONTEXT_LENGTH = 77
BATCH = 48
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


class TextAndUNet(torch.nn.Module):
    """Text encoder with a compact token table, and UNet. Text outputs from the end mark on are zero, as in
    the host.
    """

    def __init__(self, vocabulary: list[int]) -> None:
        super().__init__()
        self.rows = {token: row for row, token in enumerate(vocabulary)}
        self.unet = networks.new_unet()
        self.text = networks.new_text_model()
        self.text.text_projection.requires_grad_(False)
        embeddings = self.text.text_model.embeddings
        del embeddings.token_embedding
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
        layers: Any = self.text.text_model.encoder.layers
        for layer in layers:
            # The host adds to its hidden state in place, which must not change a layer's saved input.
            for norm in (layer.layer_norm1, layer.layer_norm2):
                norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
        self.table = torch.nn.Parameter(torch.randn(len(vocabulary), int(networks.TEXT["hidden_size"])))

    def context(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, LENGTH] table rows -> [B, 77, width]."""
        missing = CONTEXT_LENGTH - rows.shape[1]
        embeds = F.pad(self.table[rows], (0, 0, 0, missing))
        hidden = self.text(None, embeds=embeds, num_tokens=[1] * len(rows), dtype=torch.float32)[0]
        return hidden * F.pad(rows != self.rows[words.END], (0, missing))[..., None]

    def forward(self, noised: torch.Tensor, step: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.unet(noised, step.float(), context=self.context(rows))


def packed(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a packed studio as a state of TextAndUNet, in float32."""
    state = safetensors.torch.load_file(path)
    if state.pop("text.tokens").tolist() != words.vocabulary():
        raise ValueError(f"{path.name} was trained on other words: train again without a start")
    state["table"] = state.pop("text.table")
    return {name: value.float() for name, value in state.items() if not name.startswith("vae.")}


def train(
    work: Path,
    pool: list[scenes.Scene],
    steps: int,
    start: Path | None = None,
    rate: Callable[[int, int], float] = learning_rate,
) -> None:
    """Train until `steps`, from the last checkpoint, or without one from the packed studio `start`.

    rate: as of `Stage.run`.
    """
    torch.manual_seed(2)
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
    model = TextAndUNet(words.vocabulary())
    if start:
        model.load_state_dict(packed(start))
    stage = Stage(work / "diffusion.pt", model, muon_and_adamw(model, MUON_RATE, ADAM_RATE), 0.9985)
    sigmas: Any = ModelSamplingDiscrete().sigmas
    alpha_bar = 1 / (sigmas.float() ** 2 + 1)
    rng = np.random.default_rng(2000 + stage.step)
    torch.manual_seed(2000 + stage.step)

    def losses() -> tuple[torch.Tensor]:
        picked = rng.integers(len(latents), size=BATCH)
        texts = [
            "" if rng.random() < CAPTION_DROP else scenes.caption(pool[i], scenes.random_named(pool[i], rng))
            for i in picked
        ]
        clean = latents[picked].float()
        noise = torch.randn_like(clean) + OFFSET_NOISE * torch.randn(BATCH, clean.shape[1], 1, 1)
        t = torch.randint(0, 1000, (BATCH,))
        kept = alpha_bar[t][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(
                kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, words.padded(texts, model.rows)
            )
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return ((error * (1 / kept.flatten()).clamp(max=8.0)).mean(),)

    stage.run(steps, losses, rate)
