"""DiTs of Flux's kind, as the host builds them: Flux.1, Flux.2, Chroma, Chroma Radiance.

Text and image attend to each other in one joint attention a block. The host's slots show its queries, keys
and values before they are rotated by the tokens' positions (RoPE), and its result before the output
projection: a block's weights are never read, so they may be quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.chroma_radiance.model import ChromaRadiance
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.flux.model import Flux

from .hooks import After, Attention, Before
from .layers import AttentionLayer
from .unet import Block


class DiT:
    """The adapter of DiTs; the methods are those of `UNet`.

    module: the host's `diffusion_model`.
    layers: by key, in the order in which they run.
    outputs: by key, what a joint attention's result passes before a bridge joins it: nothing.

    Raises ValueError for LongCat-Image, which moves the tokens' positions outside of the network.
    """

    conditions = ("y", "guidance", "attention_mask")
    positional = True
    text_tokens = None
    joint_text = 512  # of Flux.1 dev and Flux.2; fewer elsewhere

    def __init__(self, module: Flux | Chroma) -> None:
        if list(module.params.txt_ids_dims) == [1, 2]:
            raise ValueError("LongCat-Image is not supported yet: use Flux.1, Flux.2 or Chroma")
        self.module, self.name = module, type(module).__name__
        # Chroma Radiance counts its channels before it cuts the image into patches.
        whole = isinstance(module, ChromaRadiance)
        self.channels: int = module.in_channels // (1 if whole else module.patch_size**2)
        # Chroma does not read the option that would put a reference of another size on the image's positions.
        self.any_reference_size = isinstance(module, Flux)
        level, width, heads = round(math.log2(module.patch_size)), module.hidden_size, module.num_heads
        self.layers: dict[str, AttentionLayer] = {}
        for kind, blocks in (("double_block", module.double_blocks), ("single_block", module.single_blocks)):
            for index in range(len(blocks)):
                key = f"{kind}.{index}.0"
                self.layers[key] = AttentionLayer(key, level, width, heads, f"{kind}s.{index}")
        self.outputs: dict[str, torch.nn.Module] = dict.fromkeys(self.layers, torch.nn.Identity())

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
    ) -> dict[str, Any]:
        """A call's `transformer_options` with hooks in these layers; the original is unchanged.

        size: height and width of the call's latent. The image's tokens follow the text's; those of reference
        latents may follow them, and stay as they are.
        """
        hooks = _Hooks(before, after, size, self_layers)
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), hooks.enter]
        if after is not None:
            patches["attn1_output_patch"] = [hooks.output, *patches.get("attn1_output_patch", ())]
        return {**options, "patches": patches}

    def blocks(self, height: int, width: int) -> Iterator[Block]:
        """The blocks of the network, in the order in which they run, for a latent of `height` x `width`."""
        image = math.prod(next(iter(self.layers.values())).grid(height, width))
        for path, block in self.module.named_modules():
            if isinstance(block, DoubleStreamBlock | SingleStreamBlock):
                weights = sum(weight.numel() for weight in block.parameters())
                size = self.module.hidden_size
                yield Block(path, "joint", image + self.joint_text, size, size, 1, False, weights)

    def source(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A conditioning entry as a reference is read with it: without other images, and with guidance 1
        where the network has learned guidance, as OminiControl (arXiv 2411.15098) trains.
        """
        dropped = ("reference_latents", "reference_latents_method", "guidance")
        entry = {name: value for name, value in entry.items() if name not in dropped}
        return {**entry, "guidance": 1.0} if getattr(self.module.params, "guidance_embed", False) else entry

    def check_conditions(self, conditions: dict[str, Any]) -> None:
        """Raise ValueError for a model call that the host itself cannot run; `conditions` are by name."""
        params = self.module.params
        method = conditions.get("ref_latents_method", getattr(params, "default_ref_method", None))
        blockwise = not getattr(params, "global_modulation", False)
        if blockwise and conditions.get("ref_latents") and method == "index_timestep_zero":
            raise ValueError(
                "the conditioning has reference latents by the method index_timestep_zero, with which "
                "ComfyUI itself fails on Flux.1: choose index in FluxKontextMultiReferenceLatentMethod, and "
                "take FluxKVCache out of the MODEL's chain"
            )

    def positions(
        self, options: dict[str, Any], image: tuple[int, int], reference: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of `transformer_options` that put the tokens of a reference on the image's positions.

        options: the `transformer_options` of the sampling, whose own scale and shift are kept.
        image, reference: height and width of the latents.
        """
        grids = [next(iter(self.layers.values())).grid(*size) for size in (image, reference)]
        rope = dict(options.get("rope_options") or {})
        for axis, whole, part in zip("yx", *grids, strict=True):
            if part != whole:
                scale = rope.get(f"scale_{axis}", 1.0)
                rope[f"scale_{axis}"] = scale * (whole - 1) / max(part - 1, 1)
        return {"rope_options": rope} if rope else {}

    def shifts(
        self, options: dict[str, Any], places: Sequence[tuple[int, int]], device: torch.device
    ) -> torch.Tensor:
        """The rotations that move tokens from the corner of the latent to these places.

        options: the call's `transformer_options`.
        places: top and left of a row's part of the latent.

        Returns [rows, 1, 1, channels / 2, 2, 2].
        """
        rope = options.get("rope_options") or {} if self.any_reference_size else {}
        ids = torch.zeros(len(places), 1, len(self.module.params.axes_dim))
        ids[:, 0, 1:3] = torch.tensor(places) / self.module.patch_size
        ids[:, 0, 1] *= rope.get("scale_y", 1.0)
        ids[:, 0, 2] *= rope.get("scale_x", 1.0)
        return self.module.pe_embedder(ids.to(device))


class _Hooks:
    """Hooks in the slots of one call. The host visits a layer's slots in this order."""

    def __init__(
        self,
        before: Before,
        after: After | None,
        size: tuple[int, int],
        layers: Iterable[AttentionLayer],
    ) -> None:
        self._before, self._after = before, after
        self._size, self._layers = size, {layer.key: layer for layer in layers}
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
        **rest: Any,
    ) -> dict[str, torch.Tensor]:
        """Last in `attn1_patch`; q, k and v are [rows, heads, tokens, channels]."""
        layer = self._layers.get(f"{extra_options['block_type']}_block.{extra_options['block_index']}.0")
        if layer is not None:
            text = extra_options["img_slice"][0]
            image = slice(text, text + math.prod(layer.grid(*self._size)))
            q, k, v = (tensor[:, :, image].transpose(1, 2) for tensor in (q, k, v))
            rotation = None if pe is None else pe[:, :, image]
            found = self._before(Attention(layer, "attn1", q, k, v, extra_options, None, None, rotation))
            self._found = None if found is None else (layer, image, found)
        return {}

    @torch.compiler.disable
    def output(self, out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """First in `attn1_output_patch`; [rows, tokens, width]."""
        found, self._found = self._found, None
        if found is None or self._after is None:
            return out
        layer, image, attended = found
        own = out[:, image]
        joined = self._after(layer, attended, own)
        if joined is not own:
            out = out.clone() if out.requires_grad else out  # the attention's own gradient may read it
            out[:, image] = joined
        return out
