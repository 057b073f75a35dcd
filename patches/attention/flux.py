"""DiTs of Flux's kind, as the host builds them: Flux.1, Flux.2, Chroma, Chroma Radiance.

Text and image attend to each other in one joint attention a block. The host's slots show its queries, keys
and values before they are rotated by the tokens' positions (RoPE), and its result before the output
projection: a block's weights are never read, so they may be quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.chroma_radiance.model import ChromaRadiance
from comfy.ldm.flux.model import Flux

from ..host.blocks import RunBlock, around_blocks
from .dit import DiT, JointHooks
from .hooks import After, Before, ForwardEnded
from .layers import MEASURED, MEASURED_STRUCTURE, USUAL, AttentionLayer, named_layers


class FluxDiT(DiT):
    """The adapter of DiTs of Flux's kind.

    Raises ValueError for LongCat-Image, which moves the tokens' positions outside of the network.
    """

    def __init__(self, module: Flux | Chroma) -> None:
        if list(module.params.txt_ids_dims) == [1, 2]:
            raise ValueError("LongCat-Image is not supported yet: use Flux.1, Flux.2 or Chroma")
        patch = module.patch_size
        # Chroma Radiance counts its channels before it cuts the image into patches.
        channels = module.in_channels // (1 if isinstance(module, ChromaRadiance) else patch**2)
        super().__init__(module, type(module).__name__, channels, patch, module.hidden_size, module.num_heads)
        # Chroma does not read the option that would put a reference of another size on the image's positions.
        self.any_reference_size = isinstance(module, Flux)

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

        size: height and width of the call's latent. The image's tokens follow the text's; those of reference
        latents may follow them, and stay as they are.
        """
        layers = {"attn1": self_layers, "attn2": cross_layers}
        hooks = JointHooks(before, after, size, layers)
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), hooks.enter]
        if after is not None:
            patches["attn1_output_patch"] = [hooks.output, *patches.get("attn1_output_patch", ())]
        return {**options, "patches": patches}

    def structure_layers(
        self, height: int, width: int, res: int, names: str = "", kind: str = ""
    ) -> tuple[AttentionLayer, ...]:
        """The layers where structure is kept, with maps of at most `res` x `res` places.

        By default those measured for this kind of model, else every third double block from a third of their
        number on. Raises ValueError for a name that fits no layer.

        kind: the name of the host's class of the model's configuration.
        names: of layers instead of these, separated by commas.
        """
        count = len(self.module.double_blocks)
        usual = [number for number in range(count) if number >= count // 3 and (count - 1 - number) % 3 == 0]
        return self._maps("structure_layers", names or MEASURED_STRUCTURE.get(kind, ""), usual, res)

    def word_layers(
        self, height: int, width: int, res: int, names: str = "", kind: str = ""
    ) -> tuple[AttentionLayer, ...]:
        """The layers where words are read, with maps of at most `res` x `res` places, 0 for 16.

        By default those measured for this kind of model, else the last third of the double blocks, where
        ConceptAttention (arXiv 2502.04320) reads its maps of Flux.1. Other arguments as above.
        """
        count = len(self.module.double_blocks)
        usual = [number for number in range(count) if 3 * number >= 2 * count]
        return self._maps("word_layers", names or MEASURED.get(kind, ""), usual or [count - 1], res or USUAL)

    def _maps(self, name: str, names: str, usual: list[int], res: int) -> tuple[AttentionLayer, ...]:
        layers = self.layers.values()
        if names.strip():
            found = named_layers(name, layers, names)
        else:
            found = tuple(self.layers[f"double_block.{number}.0"] for number in usual)
        return tuple(replace(layer, side=res) for layer in found)

    def end_between_blocks(self, options: dict[str, Any], done: Callable[[], bool]) -> dict[str, Any]:
        """As of a UNet."""

        def run(args: dict[str, Any], block: RunBlock) -> dict[str, Any]:
            if done():
                raise ForwardEnded
            return block(args)

        return around_blocks(options, self.module, run)

    @staticmethod
    def text_offset(entry: dict[str, Any]) -> int:
        """How far a description's tokens are moved in its context: Flux.2 pads a text in front."""
        context, text = entry["model_conds"]["c_crossattn"].cond, entry.get("cross_attn")
        return 0 if text is None else max(0, context.shape[1] - text.shape[1])

    def source(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The same, and with guidance 1 where the network has learned guidance, as OminiControl (arXiv
        2411.15098) trains.
        """
        entry = super().source(entry)
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

    def text_mask(self, lengths: Sequence[int], image: int) -> torch.Tensor:
        """The same, [rows, 1, 1, tokens of text and image] of bool."""
        text = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return torch.cat([text, torch.ones(len(lengths), image, dtype=torch.bool)], dim=1)[:, None, None]

    def positions(
        self, options: dict[str, Any], image: tuple[int, int], reference: tuple[int, int]
    ) -> dict[str, Any]:
        """The same; other nodes' scale and shift are kept."""
        grids = [next(iter(self.layers.values())).grid(*size) for size in (image, reference)]
        rope = dict(options.get("rope_options") or {})
        for axis, whole, part in zip("yx", *grids, strict=True):
            if part != whole:
                scale = rope.get(f"scale_{axis}", 1.0)
                rope[f"scale_{axis}"] = scale * (whole - 1) / max(part - 1, 1)
        return {"rope_options": rope} if rope else {}

    def shifts(
        self,
        options: dict[str, Any],
        parts: Sequence[tuple[int, ...]],
        whole: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor:
        """The rotations that move the tokens of parts of the latent to their places in it.

        options: the call's `transformer_options`.
        parts: of each row height, width, top and left.
        whole: height and width of the latent.

        Returns [rows, 1, 1, channels / 2, 2, 2].
        """
        rope = options.get("rope_options") or {} if self.any_reference_size else {}
        scales = rope.get("scale_y", 1.0), rope.get("scale_x", 1.0)
        moved = torch.tensor([part[2:] for part in parts]) / self.module.patch_size * torch.tensor(scales)
        return self.rotations(moved, len(self.module.params.axes_dim), device)
