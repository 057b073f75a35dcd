"""Small stand-ins for what public nodes do to a MODEL: tiles, windows, shuffled tokens, and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def tiled(model: Any, side: int, together: int) -> Any:
    """MODEL whose latent is predicted in tiles of `side`, `together` of them as one batch, tile by tile."""

    def call(apply_model: Callable, args: dict[str, Any]) -> torch.Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        height, width = x.shape[-2:]
        places = [(i, j) for i in range(0, height, side) for j in range(0, width, side)]
        out = torch.zeros_like(x)
        for first in range(0, len(places), together):
            some = places[first : first + together]
            tiles = torch.cat([x[..., i : i + side, j : j + side] for i, j in some])
            text = c["c_crossattn"].repeat(len(some), 1, 1)
            found = apply_model(tiles, t.repeat(len(some)), **{**c, "c_crossattn": text})
            for (i, j), tile in zip(some, found.chunk(len(some)), strict=True):
                out[..., i : i + side, j : j + side] = tile
        return out

    patched = model.clone()
    patched.set_model_unet_function_wrapper(call)
    return patched


def windows(host: Any, model: Any, length: int) -> Any:
    """MODEL with the host's own context windows over the images of a batch."""
    return host.execute(
        "ContextWindowsManual",
        model=model,
        context_length=length,
        context_overlap=0,
        fuse_method="flat",
        dim=0,
        causal_window_fix=False,
    )[0]


def shuffled(model: Any) -> Any:
    """MODEL whose self-attentions get their tokens in another order, and put them back afterwards."""
    order: dict[str, torch.Tensor] = {}

    def mix(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        order["now"] = torch.randperm(n.shape[1], generator=torch.Generator().manual_seed(n.shape[1]))
        return n[:, order["now"]], context, value

    def back(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return out[:, order["now"].argsort()]

    patched = model.clone()
    patched.set_model_attn1_patch(mix)
    patched.set_model_attn1_output_patch(back)
    return patched


def banked(model: Any) -> Any:
    """MODEL whose self-attentions look at other tokens too, as reference nodes make them."""

    def more(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        return n, torch.cat([context, context + 0.1], dim=1), torch.cat([value, value + 0.1], dim=1)

    patched = model.clone()
    patched.set_model_attn1_patch(more)
    return patched


def coupled(model: Any) -> Any:
    """MODEL whose cross-attentions run once for each of two regions."""

    def twice(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        return n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    def once(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return out.chunk(2)[0]

    patched = model.clone()
    patched.set_model_attn2_patch(twice)
    patched.set_model_attn2_output_patch(once)
    return patched


def more_text(model: Any) -> Any:
    """MODEL whose cross-attentions get tokens in front of the description's."""

    def front(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        both = torch.cat([context[:, :3], context], dim=1)
        return n, both, both

    patched = model.clone()
    patched.set_model_attn2_patch(front)
    return patched


def negated(model: Any) -> Any:
    """MODEL for conditionings whose tokens are a key and a value in turn."""

    def split(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        return n, context[:, 0::2], value[:, 1::2]

    patched = model.clone()
    patched.set_model_attn2_patch(split)
    return patched


def without_gradient(model: Any) -> Any:
    """MODEL whose middle transformer is computed without gradients."""
    from comfy.ldm.modules.attention import SpatialTransformer

    def run(layer: Any, x: torch.Tensor, emb: Any, context: Any, options: dict[str, Any], *_: Any) -> Any:
        with torch.no_grad():
            return layer(x, context, options)

    return in_slot(model, (SpatialTransformer, run), "forward_timestep_embed_patch")


def dropped(model: Any, block: tuple[str, int]) -> Any:
    """MODEL that leaves the transformers of one block out."""
    from comfy.ldm.modules.attention import SpatialTransformer

    def run(layer: Any, x: torch.Tensor, emb: Any, context: Any, options: dict[str, Any], *_: Any) -> Any:
        return x if options["block"] == block else layer(x, context, options)

    return in_slot(model, (SpatialTransformer, run), "forward_timestep_embed_patch")


def in_slot(model: Any, patch: Any, slot: str) -> Any:
    """MODEL with a patch in one of the host's lists of patches."""
    patched = model.clone()
    patched.set_model_patch(patch, slot)
    return patched


def writes(model: Any, slot: str, in_place: bool) -> Any:
    """MODEL with a patch in one of the host's lists that scales half of what it gets by what it read off it,
    as FreeU does: in place, or else in a copy.
    """

    def written(h: torch.Tensor) -> torch.Tensor:
        h, half = h if in_place else h.clone(), h.shape[1] // 2
        h[:, :half] = h[:, :half] * (1 + 0.3 * torch.sigmoid(h.mean(1, keepdim=True)))
        return h

    def patch(first: Any, *rest: Any) -> Any:
        if isinstance(first, dict):
            return {**first, "h": written(first["h"])}
        tensors = (first, *rest[:-1])
        new = {id(tensor): tensor for tensor in tensors}
        new = {name: written(tensor) for name, tensor in new.items()}
        found = tuple(new[id(tensor)] for tensor in tensors)
        return found if rest[:-1] else found[0]

    return in_slot(model, patch, slot)
