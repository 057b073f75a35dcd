"""What the adapters of DiTs have in common: a joint attention of text and image a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..host.blocks import blocks_of
from .hooks import After, Attention, Before, Joint
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

    def text_mask(self, lengths: Sequence[int], image: int) -> torch.Tensor | None:
        """The `attention_mask` that hides what shorter texts of a call lack, if the network takes one.

        lengths: tokens of each row's text.
        image: tokens of the image.
        """
        return None

    def positions(
        self, options: dict[str, Any], image: tuple[int, int], reference: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of `transformer_options` that put the tokens of a reference on the image's positions.

        options: the `transformer_options` of the sampling.
        image, reference: height and width of the latents.
        """
        return {}

    def rotations(self, moved: torch.Tensor, axes: int, device: torch.device) -> torch.Tensor:
        """The rotations of positions that differ by `moved`, [rows, 2], down and to the right; of `axes` axes
        these are the second and the third. Returns [rows, 1, 1, channels / 2, 2, 2].
        """
        ids = torch.zeros(len(moved), 1, axes)
        ids[:, 0, 1:3] = moved
        return self.module.pe_embedder(ids.to(device))


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


class JointHooks:
    """Hooks in the slots of one call, for networks whose `attn1_patch` shows q, k and v before any rotation.
    The host visits a layer's slots in this order.
    """

    def __init__(
        self,
        before: Before,
        after: After | None,
        size: tuple[int, int],
        layers: dict[str, Iterable[AttentionLayer]],
    ) -> None:
        self._before, self._after, self._size = before, after, size
        self._layers: dict[str, list[tuple[str, AttentionLayer]]] = {}
        for kind, some in layers.items():
            for layer in some:
                self._layers.setdefault(layer.key, []).append((kind, layer))
        self._found: tuple[AttentionLayer, slice, torch.Tensor] | None = None

    @torch.compiler.disable
    def enter(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        extra_options: dict[str, Any],
        pe: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> dict[str, torch.Tensor]:
        """Last in `attn1_patch`; q, k and v are [rows, heads, tokens, channels]."""
        self._found = None
        key = f"{extra_options['block_type']}_block.{extra_options['block_index']}.0"
        for kind, layer in self._layers.get(key, ()):
            text, grid = extra_options["img_slice"][0], layer.grid(*self._size)
            image = slice(text, text + math.prod(grid))
            own = (tensor[:, :, image].transpose(1, 2) for tensor in (q, k, v))
            rotation = None if pe is None else pe[:, :, image]
            joint = Joint(q, k, pe, text, attn_mask is not None)
            found = self._before(Attention(layer, kind, *own, extra_options, grid, None, rotation, joint))
            self._found = None if found is None else (layer, image, found)
        return {}

    @torch.compiler.disable
    def output(self, out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """First in `attn1_output_patch`; [rows, tokens, width]."""
        found, self._found = self._found, None
        if found is None or self._after is None:
            return out
        return join(self._after, *found, out)
