"""UNets of Stable Diffusion's kind, as the host builds them: SD1.x, SD2.x, SDXL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

from .hooks import After, Attention, Before, ForwardEnded, Inputs, attend
from .layers import AttentionLayer, Block, structure_layers, word_layers


class UNet:
    """The adapter of UNets. Another kind of network is another class with these methods.

    module: the host's `diffusion_model`.
    layers: by key, in the order in which they run.
    outputs: by key, what a self-attention's result passes before a bridge joins it: here the output
        projection.
    name: for messages.
    channels: of the network's input.
    conditions: of a model call, what the network takes beside the text.
    positional: whether its tokens have positions.
    any_reference_size: whether a reference may have another size than the image.
    text_tokens: how many tokens of a text training uses, None for all: the first 77, as in the paper.
    joint_text: tokens of a text that take part in the image's attention, for estimates.

    Raises ValueError for a UNet without cross-attention.
    """

    name = "UNet"
    conditions = ("y",)
    positional = False
    any_reference_size = True
    text_tokens = 77
    joint_text = 0

    def __init__(self, module: UNetModel) -> None:
        self.module = module
        self.channels: int = module.in_channels
        self.layers: dict[str, AttentionLayer] = {}
        self.outputs: dict[str, torch.nn.Module] = {}
        level = 0
        for block, path, part in _parts(module):
            if isinstance(part, (Downsample, Upsample)):
                level += 1 if isinstance(part, Downsample) else -1
            elif isinstance(part, SpatialTransformer):
                blocks: Any = part.transformer_blocks
                for depth, inner in enumerate(blocks):
                    if inner.attn2 is not None and not inner.disable_self_attn:
                        key, width = f"{block}.{depth}", inner.n_heads * inner.d_head
                        place = f"{path}.transformer_blocks.{depth}"
                        self.layers[key] = AttentionLayer(key, level, width, inner.n_heads, place)
                        self.outputs[key] = inner.attn1.to_out
        if not self.layers:
            raise ValueError("this model's UNet has no self- and cross-attention: use SD1.5, SD2.x or SDXL")

    @property
    def widths(self) -> dict[str, int]:
        """Channels of a token at each layer."""
        return {key: layer.width for key, layer in self.layers.items()}

    def install(
        self,
        options: dict[str, Any],
        before: Before,
        after: After | None = None,
        *,
        size: tuple[int, int],
        self_layers: Iterable[AttentionLayer],
        cross_layers: Iterable[AttentionLayer] = (),
    ) -> dict[str, Any]:
        """A call's `transformer_options` with hooks in these layers; the original is unchanged.

        size: height and width of the call's latent, which other networks need.

        Another node's patch in a slot still computes the attention: it runs inside, on copies of q and k.
        """
        hooks = _Hooks(before, after)
        patches = dict(options.get("patches", {}))
        others = patches.get("attn1_patch", ())
        patches["attn1_patch"] = [hooks.enter, *others, hooks.leave] if others else [hooks.leave]
        if after is not None:
            patches["attn1_output_patch"] = [hooks.output, *patches.get("attn1_output_patch", ())]
        replace = dict(options.get("patches_replace", {}))
        for kind, layers in (("attn1", self_layers), ("attn2", cross_layers)):
            slots = replace[kind] = dict(replace.get(kind, {}))
            for layer in layers:
                block, number, depth = layer.key.split(".")
                slot = block, int(number), int(depth)
                slots[slot] = partial(hooks.attention, layer, kind, slots.get(slot, slots.get(slot[:2])))
        return {**options, "patches": patches, "patches_replace": replace}

    def structure_layers(
        self, height: int, width: int, res: int, names: str = "", kind: str = ""
    ) -> tuple[AttentionLayer, ...]:
        """The layers where structure is kept: `layers.structure_layers`."""
        return structure_layers(self.layers.values(), height, width, res, names)

    def word_layers(
        self, height: int, width: int, res: int, names: str = "", kind: str = ""
    ) -> tuple[AttentionLayer, ...]:
        """The layers where words are read: `layers.word_layers`."""
        return word_layers(self.layers.values(), height, width, res, names, kind)

    @staticmethod
    def text_offset(*_: Any) -> int:
        """How far a description's tokens are moved in its context: not at all."""
        return 0

    @staticmethod
    def source(entry: dict[str, Any]) -> dict[str, Any]:
        """A conditioning entry as a reference is read with it: as it is."""
        return entry

    @staticmethod
    def positions(*_: Any) -> dict[str, Any]:
        """What puts a reference on the image's positions: nothing."""
        return {}

    @staticmethod
    def text_mask(*_: Any) -> None:
        """A mask that hides what shorter texts of a call lack: none."""

    @staticmethod
    def shifts(*_: Any) -> None:
        """What moves tokens to a part of the latent: nothing."""

    @staticmethod
    def check_conditions(*_: Any) -> None:
        """Nothing that the host cannot run."""

    @staticmethod
    def end_between_blocks(options: dict[str, Any], done: Callable[[], bool]) -> dict[str, Any]:
        """A call's `transformer_options` that end the forward between two blocks once `done` returns true.

        With checkpointing it must not end inside one.
        """

        def end(hidden: torch.Tensor, *rest: Any) -> Any:
            if done():
                raise ForwardEnded
            return hidden if len(rest) == 1 else (hidden, rest[0])  # (h, options) or (h, skip, options)

        patches = dict(options.get("patches", {}))
        for slot in ("input_block_patch", "output_block_patch"):
            patches[slot] = [end, *patches.get(slot, ())]
        return {**options, "patches": patches}

    def blocks(self, height: int, width: int) -> Iterator[Block]:
        """The blocks of the network, in the order in which they run, for a latent of `height` x `width`."""
        for path, part in self.module.named_modules():
            tokens, kind, inputs, outputs, depth, convolved = height * width, "resize", 0, 0, 0, False
            if isinstance(part, Downsample):
                height, width = (height + 1) // 2, (width + 1) // 2
            elif isinstance(part, Upsample):
                height, width = height * 2, width * 2
            elif isinstance(part, ResBlock):
                kind, inputs, outputs = "residual", part.channels, part.out_channels
            elif isinstance(part, SpatialTransformer):
                kind, depth, convolved = "transformer", len(part.transformer_blocks), not part.use_linear
                inputs = outputs = part.transformer_blocks[0].n_heads * part.transformer_blocks[0].d_head
            else:
                continue
            weights = sum(weight.numel() for weight in part.parameters())
            yield Block(path, kind, tokens, inputs, outputs, depth, convolved, weights)


def _parts(unet: UNetModel) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """The parts of a UNet's blocks in the order in which they run: the block's name, such as `output.3`, and
    the part's path in the module tree.
    """
    for stage in ("input", "output"):
        for number, block in enumerate(getattr(unet, f"{stage}_blocks")):
            for index, part in enumerate(block):
                yield f"{stage}.{number}", f"{stage}_blocks.{number}.{index}", part
        if stage == "input":
            for index, part in enumerate(unet.middle_block or ()):
                yield "middle.0", f"middle_block.{index}", part


class _Hooks:
    """Hooks in the slots of one call. The host visits a layer's slots in this order."""

    def __init__(self, before: Before, after: After | None) -> None:
        self._before, self._after = before, after
        self._normed: torch.Tensor | None = None
        self._inputs: Inputs | None = None
        self._found: tuple[AttentionLayer, torch.Tensor] | None = None

    @torch.compiler.disable
    def enter(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> tuple:
        """First in `attn1_patch`."""
        self._normed = n
        return n, context, value

    @torch.compiler.disable
    def leave(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> tuple:
        """Last in `attn1_patch`."""
        self._inputs = Inputs(n, context, n if self._normed is None else self._normed)
        self._normed = None
        return n, context, value

    @torch.compiler.disable
    def attention(
        self,
        layer: AttentionLayer,
        kind: str,
        previous: Callable | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """In place of the attention."""
        inputs, self._inputs = self._inputs, None
        shape = options.get("activations_shape")
        grid = (shape[-2], shape[-1]) if shape else None
        at = Attention(layer, kind, q, k, v, options, grid, inputs if kind == "attn1" else None)
        found = self._before(at)
        if found is not None:
            self._found = layer, found
        if previous is not None:
            return previous(q.clone(), k.clone(), v, options)  # it may write into them
        return attend(q, k, v, at)

    @torch.compiler.disable
    def output(self, out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """First in `attn1_output_patch`."""
        found, self._found = self._found, None
        return out if found is None or self._after is None else self._after(*found, out)
