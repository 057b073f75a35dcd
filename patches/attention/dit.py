"""What the adapters of DiTs have in common: a joint attention of text and image a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..host.blocks import blocks_of
from .hooks import After
from .layers import AttentionLayer, Block


class DiT:
    """The adapter of DiTs; the methods are those of `UNet`.

    module: the host's `diffusion_model`.
    layers: by key, in the order in which they run.
    outputs: by key, what a joint attention's result passes before a bridge joins it: nothing.
    """

    conditions: tuple[str, ...] = ("y", "guidance", "attention_mask")
    positional = True
    any_reference_size = False
    text_tokens: int | None = None
    joint_text = 512

    def __init__(
        self,
        module: Any,
        name: str,
        channels: int,
        patch: int,
        width: int,
        heads: int,
        second: Sequence[int] = (),
    ) -> None:
        """
        channels: of the network's input.
        patch: positions of the latent in a token, per side.
        second: numbers of the blocks whose image's tokens have a self-attention of their own as well.
        """
        self.module, self.name, self.channels = module, name, channels
        self.layers: dict[str, AttentionLayer] = {}
        for (kind, number), path, _ in blocks_of(module):
            for turn in range(1 + (number in second)):
                key = f"{kind}.{number}.{turn}"
                self.layers[key] = AttentionLayer(key, round(math.log2(patch)), width, heads, path)
        self.outputs: dict[str, torch.nn.Module] = dict.fromkeys(self.layers, torch.nn.Identity())

    @property
    def widths(self) -> dict[str, int]:
        """Channels of a token at each layer."""
        return {key: layer.width for key, layer in self.layers.items()}

    def blocks(self, height: int, width: int) -> Iterator[Block]:
        """The blocks of the network, in the order in which they run, for a latent of `height` x `width`."""
        layer = next(iter(self.layers.values()))
        tokens = math.prod(layer.grid(height, width)) + self.joint_text
        for _, path, block in blocks_of(self.module):
            weights = sum(weight.numel() for weight in block.parameters())
            yield Block(path, "joint", tokens, layer.width, layer.width, 1, False, weights)

    def source(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A conditioning entry as a reference is read with it: without other images."""
        dropped = ("reference_latents", "reference_latents_method", "guidance")
        return {name: value for name, value in entry.items() if name not in dropped}

    def check_conditions(self, conditions: dict[str, Any]) -> None:
        """Raise ValueError for a model call that the host itself cannot run; `conditions` are by name."""

    def positions(
        self, options: dict[str, Any], image: tuple[int, int], reference: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of `transformer_options` that put the tokens of a reference on the image's positions.

        options: the `transformer_options` of the sampling.
        image, reference: height and width of the latents.
        """
        return {}


def join(
    after: After, layer: AttentionLayer, image: slice, attended: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """A joint attention's result with what `after` makes of the image's tokens in it.

    out: [rows, tokens, width]; changed in place where it has no gradient.
    """
    out = out.clone() if out.requires_grad else out  # the attention's own gradient may read it
    own = out[:, image]
    joined = after(layer, attended, own)
    if joined is not own:
        out[:, image] = joined
    return out
