"""Stable Diffusion 3 and 3.5, as the host builds them.

Text and image attend to each other in one joint attention a block; in some blocks of SD3.5 medium the image's
tokens have a self-attention of their own as well. The host has one slot for both, a function in place of
every attention of a call. It is put there for each block by the block's own slot, so that it knows the block.
A token's position is in its content, and nothing is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

from ..host.blocks import RunBlock, Slot, inside_blocks
from .dit import DiT, join
from .hooks import OVERRIDE, After, Attention, Before
from .layers import AttentionLayer


class SD3(DiT):
    """The adapter of SD3 and SD3.5."""

    conditions = ("y",)
    text_tokens = joint_text = 154  # CLIP's 77 and T5's first 77

    def __init__(self, module: MMDiT) -> None:
        blocks: Any = module.joint_blocks
        second = [number for number, block in enumerate(blocks) if block.x_block.x_block_self_attn]
        name, width = "Stable Diffusion 3", module.hidden_size
        super().__init__(module, name, module.in_channels, module.patch_size, width, module.num_heads, second)

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
        hooks = _Hooks(before, after, size, self_layers, self.module.joint_blocks)
        return inside_blocks(options, self.module, hooks.block)

    @staticmethod
    def shifts(*_: Any) -> NoReturn:
        """Raises ValueError: what an area shows of the latent has other positions than its part of the
        reference.
        """
        raise ValueError(
            "a conditioning has an area, whose tokens are on other positions in Stable Diffusion 3 than the "
            "same part of the reference: take the area away (ConditioningSetMask with set_cond_area default "
            "has none)"
        )


class _Hooks:
    """Hooks in the slots of one call."""

    def __init__(
        self,
        before: Before,
        after: After | None,
        size: tuple[int, int],
        layers: Iterable[AttentionLayer],
        blocks: Any,
    ) -> None:
        self._before, self._after, self._size, self._blocks = before, after, size, blocks
        self._layers = {layer.key: layer for layer in layers}

    def block(self, slot: Slot, args: dict[str, Any], block: RunBlock) -> dict[str, Any]:
        """A block, whose attentions are computed by ours."""
        options = args["transformer_options"]
        own = partial(self.attention, slot, args["img"].shape[1], options)
        options = {**options, OVERRIDE: own}
        if not torch.is_grad_enabled():
            return block({**args, "transformer_options": options})
        # The host's function in the slot checkpoints the block by itself, outside of a `gradients` region.
        text, image = self._blocks[slot[1]](
            args["txt"], args["img"], c=args["vec"], use_checkpoint=False, transformer_options=options
        )
        return {"txt": text, "img": image}

    @torch.compiler.disable
    def attention(
        self,
        slot: Slot,
        tokens: int,
        options: dict[str, Any],
        backend: Callable,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """In place of an attention; q, k and v are [rows, tokens, width] or [rows, tokens, heads, channels].

        tokens: of the image, which follow the text's.
        options: those that the host gave the block, with another node's function in this slot.
        """
        image = slice(q.shape[1] - tokens, None)
        turn = 0 if image.start else 1  # the image alone is the second
        layer = self._layers[f"{slot[0]}.{slot[1]}.{turn}"]
        own_q, own_k, own_v = (tensor[:, image] for tensor in (q, k, v))
        at = Attention(layer, "attn1", own_q, own_k, own_v, options, layer.grid(*self._size), None)
        found = self._before(at)
        other = options.get(OVERRIDE)
        compute = backend if other is None else partial(other, backend)
        out = compute(q, k, v, *args, **{**kwargs, "transformer_options": options})
        return out if found is None or self._after is None else join(self._after, layer, image, found, out)
