"""Encoded texts of a batch, and what a network is called with for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel

from ..patches.attention.networks import Network
from ..patches.host.conditions import model_conditions

_TEXT = "c_crossattn"


class Text(NamedTuple):
    """A text as its encoder gives it.

    embedding: [1, tokens, width].
    pooled: [1, width], of an encoder that has it.
    """

    embedding: torch.Tensor
    pooled: torch.Tensor | None = None

    def conditioning(self) -> list[Any]:
        """The same as a CONDITIONING."""
        return [[self.embedding, {"pooled_output": self.pooled}]]


def text_conditions(
    model: BaseModel, network: Network, texts: Sequence[Text], latents: torch.Tensor
) -> dict[str, Any]:
    """The arguments of the network's call beside latents and timesteps: those with which the host samples.

    texts: of each row. Where the network takes texts of any length, shorter ones are filled up and hidden by
        a mask, so that each row is what it is alone.
    latents: [rows, channels, height, width].

    Raises ValueError for texts of several lengths where the network has no such mask.
    """
    rows = []
    for row, text in enumerate(texts):
        embedding = text.embedding[:, : network.text_tokens]
        entry = {"cross_attn": embedding, "pooled_output": text.pooled, "model_conds": {}}
        names = (_TEXT, *network.conditions)
        rows.append(model_conditions(model, network.source(entry), latents[row : row + 1], names))
    embeddings = [found.pop(_TEXT) for found in rows]
    joined: dict[str, Any] = {name: torch.cat([found[name] for found in rows]) for name in rows[0]}
    longest = max(embedding.shape[1] for embedding in embeddings)
    filled = [F.pad(embedding, (0, 0, 0, longest - embedding.shape[1])) for embedding in embeddings]
    joined["context"] = torch.cat(filled)
    if any(embedding.shape[1] < longest for embedding in embeddings):
        grid = next(iter(network.layers.values())).grid(latents.shape[-2], latents.shape[-1])
        lengths = [embedding.shape[1] for embedding in embeddings]
        mask = network.text_mask(lengths, grid[0] * grid[1])
        if mask is None:
            shown = ", ".join(map(str, sorted(set(lengths))))
            raise ValueError(
                f"the descriptions of a batch have several lengths ({shown} tokens), and {network.name} "
                "cannot hide what the shorter ones lack: train with batch 1, or shorten the descriptions"
            )
        joined["attention_mask"] = mask.to(latents.device)
    return joined
