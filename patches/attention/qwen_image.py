"""Qwen-Image, as the host builds it.

Text and image attend to each other in one joint attention a block. The host's slots show its queries, keys
and values before they are rotated by the tokens' positions (RoPE), but not its result: that is what a
function in place of the attention returns, which is put there for each block by the block's own slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

from ..host.blocks import RunBlock, Slot, inside_blocks
from .dit import DiT, JointHooks
from .hooks import OVERRIDE, After, Before
from .layers import AttentionLayer


class QwenImage(DiT):
    """The adapter of Qwen-Image."""

    conditions = ("attention_mask",)
    any_reference_size = True
    joint_text = 256

    def __init__(self, module: QwenImageTransformer2DModel) -> None:
        blocks: Any = module.transformer_blocks
        patch, heads = module.patch_size, blocks[0].num_attention_heads
        channels = module.img_in.in_features // patch**2
        super().__init__(module, "Qwen-Image", channels, patch, module.inner_dim, heads)

    def install(
        self,
        options: dict[str, Any],
        before: Before,
        after: After | None = None,
        *,
        size: tuple[int, int],
        self_layers: Iterable[AttentionLayer],
    ) -> dict[str, Any]:
        """A call's `transformer_options` with hooks in these layers; the original is unchanged.

        size: height and width of the call's latent.
        """
        hooks = _Hooks(before, after, size, {"attn1": self_layers})
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), hooks.enter]
        return inside_blocks({**options, "patches": patches}, self.module, hooks.block)

    def text_mask(self, lengths: Sequence[int], image: int) -> torch.Tensor:
        """The same, [rows, tokens of the text] of 0 and 1."""
        return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()

    def positions(
        self, options: dict[str, Any], image: tuple[int, int], reference: tuple[int, int]
    ) -> dict[str, Any]:
        """The same. The host counts positions from the middle, and those of a text after the image's."""
        whole, part = self._grid(image), self._grid(reference)
        if whole == part:
            return {}

        def move(args: dict[str, Any]) -> dict[str, Any]:
            ids = args["img_ids"].clone()
            for axis, (most, own) in enumerate(zip(whole, part, strict=True), 1):
                ids[..., axis] = (ids[..., axis] + own // 2) * ((most - 1) / max(own - 1, 1)) - most // 2
            return {**args, "img_ids": ids, "txt_ids": args["txt_ids"] + (max(whole) // 2 - max(part) // 2)}

        return {"patches": {"post_input": [move]}}

    def shifts(
        self,
        options: dict[str, Any],
        parts: Sequence[tuple[int, ...]],
        whole: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor:
        """As of `FluxDiT`."""
        moved = []
        for *size, top, left in parts:
            pairs = zip((top, left), self._grid((size[0], size[1])), self._grid(whole), strict=True)
            moved.append(
                [start / self.module.patch_size + own // 2 - most // 2 for start, own, most in pairs]
            )
        return self.rotations(torch.tensor(moved), 3, device)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return next(iter(self.layers.values())).grid(*size)


class _Hooks(JointHooks):
    """The same hooks, and one in place of the attention."""

    def block(self, slot: Slot, args: dict[str, Any], block: RunBlock) -> dict[str, Any]:
        """A block, whose attention is computed by ours."""
        options = args["transformer_options"]
        own = partial(self.attention, options)
        return block({**args, "transformer_options": {**options, OVERRIDE: own}})

    @torch.compiler.disable
    def attention(
        self, options: dict[str, Any], backend: Callable, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """In place of an attention, also of the one that `Before` computes.

        options: those that the host gave the block, with another node's function in this slot.
        """
        other = options.get(OVERRIDE)
        compute = backend if other is None else partial(other, backend)
        return self.output(compute(*args, **{**kwargs, "transformer_options": options}), options)
