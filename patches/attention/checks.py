"""Checks a model call and each attention layer in it, where a patch of ours reads or feeds it.

Other nodes may change what reaches a layer. A change that a method cannot follow is refused here. The error
names the layer, what was found, what is needed, which nodes cause it, and what to do. Only shapes are
checked, so nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .layers import AttentionLayer

TAKE_OUT = "Take that node out of the MODEL's chain."
COMPILED = (
    "The model was compiled before (TorchCompileModel) and runs without it: restart ComfyUI and run the "
    "compiled model with this node first, or take TorchCompileModel away."
)
_COMPILE_KEY = "torch.compile"
_KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}


def layer_name(kind: str, key: str) -> str:
    """`the self-attention of layer output.3.0`.

    kind: the host's, `attn1` or `attn2`.
    key: the layer's. Blocks of DiTs have one attention for both, and some a second one of the image alone.
    """
    joint = "_block." in key and key.endswith(".0")
    return f"the {'joint attention' if joint else _KINDS[kind]} of layer {key}"


def check_entries(network: Any, entries: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for an entry of a processed conditioning that the host cannot run on a network."""
    for entry in entries:
        network.check_conditions({name: found.cond for name, found in entry["model_conds"].items()})


def check_rows(layer: str, found: int, expected: int) -> None:
    """Raise ValueError, naming the layer, unless the layer has the rows of its model call."""
    if found != expected:
        raise ValueError(
            f"{layer} has {found} rows, but the model was called with {expected}: a node cuts the "
            f"picture or its text into parts there (HyperTile, AttentionCouple). {TAKE_OUT}"
        )


def check_grid(
    layer: str, found: int, expected: tuple[int, int], at_work: tuple[int, int] | None, why: str
) -> None:
    """Raise ValueError, naming the layer, unless the layer has one token per position of its grid.

    found: tokens.
    expected: rows and columns of the layer's grid in this model call.
    at_work: the same of the image in the network at this moment, None if unknown.
    why: who needs the grid, for the message.
    """
    if found == math.prod(expected):
        return
    rows, columns = expected
    if at_work and found == math.prod(at_work):
        cause = f"a node has changed its grid to {at_work[1]}x{at_work[0]} (Deep Shrink)"
    else:
        cause = "a node merges tokens there (ToMe), or cuts them into windows"
    raise ValueError(
        f"{layer} has {found} tokens where {why} needs its grid of {columns}x{rows}: {cause}. {TAKE_OUT}"
    )


def check_keys(layer: str, found: int, expected: int) -> None:
    """Raise ValueError, naming the layer, unless a self-attention has as many keys as queries."""
    if found != expected:
        raise ValueError(
            f"{layer} has {found} keys for {expected} tokens: a node gives it tokens of other "
            f"pictures (Reference of Advanced-ControlNet, StyleAligned), or merges its own. {TAKE_OUT}"
        )


def check_text(layer: str, found: int, expected: int) -> None:
    """Raise ValueError, naming the layer, unless a cross-attention has the keys of its description.

    found: number of keys.
    expected: tokens of the conditioning. With NegPip a conditioning holds keys and values alternately, so
    half of them are keys.
    """
    if found not in (expected, expected / 2):
        raise ValueError(
            f"{layer} has {found} keys, but the description has {expected} tokens: a node adds text "
            f"or images to it, or takes some away, so that the words cannot be found. {TAKE_OUT}"
        )


def check_unmasked(layer: str, masked: bool) -> None:
    """Raise ValueError, naming the layer, if a joint attention has a mask."""
    if masked:
        raise ValueError(
            f"{layer} has a mask, which keeps tokens from each other: the conditioning or a node brings it "
            "(Apply Style Model at a strength below 1). Use the conditioning without it"
        )


def check_gradient(layer: str, *tensors: torch.Tensor) -> None:
    """Raise ValueError, naming the layer, unless these depend on the latent for autograd."""
    if not all(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{layer} has no gradient: a node computes what leads to it without one "
            f"(TokenPerturbationGuidance). {TAKE_OUT}"
        )


@torch.no_grad()
def moved_tokens(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Whether the tokens of any row, [rows, tokens, width], are the same ones in another order; a bool
    tensor. Merged tokens are detected by their number, which shuffled ones keep.
    """
    before, after = before[..., 0], after[..., 0]
    same = (before.sort(dim=1).values == after.sort(dim=1).values).all(dim=1)
    return (same & (before != after).any(dim=1)).any()


def check_order(found: Collection[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError, naming the first layer whose tokens were moved.

    found: layers' keys with the result of `moved_tokens`. Waits for the device if there are any.
    """
    flags = torch.stack([moved for _, moved in found]).tolist() if found else []
    for (key, _), moved in zip(found, flags, strict=True):
        if moved:
            raise ValueError(
                f"{layer_name('attn1', key)} gets its tokens in another order: a node shuffles them, or "
                f"merges tokens (ToMe). {TAKE_OUT}"
            )


def check_apart(found: Collection[torch.Tensor]) -> None:
    """Raise ValueError if a row of a model call had a gradient from another row's loss.

    found: bool tensors, each of one call. Waits for the device if there are any.
    """
    if found and bool(torch.stack(list(found)).any()):
        raise ValueError(
            "a node mixes the rows of a model call (it lets pictures of a batch see each other), but every "
            f"row has a gradient of its own here. {TAKE_OUT}"
        )


def check_call(x: torch.Tensor, rows: int, size: Sequence[int]) -> None:
    """Raise ValueError unless a model call has whole images.

    x: the input of the UNet.
    rows, size: of the latent; size is height and width.
    """
    if len(x) != rows or tuple(x.shape[-2:]) != tuple(size):
        height, width = size
        raise ValueError(
            f"the model is called with {_latents(x)} instead of {rows} of {width}x{height}: a node "
            f"cuts the latent into tiles or windows (TiledDiffusion, context windows). {TAKE_OUT}"
        )


def _latents(x: torch.Tensor) -> str:
    return f"{len(x)} latents of {x.shape[-1]}x{x.shape[-2]}"


def refused_parts(x: torch.Tensor, rows: int, size: Sequence[int], reason: str) -> ValueError:
    """The error for a model call on parts of the sampled latent that a bridge cannot follow for `reason`."""
    height, width = size
    return ValueError(
        f"the model is called with {_latents(x)} where the sampling has {rows} of {width}x{height}: "
        "a node cuts the latent into tiles or windows (TiledDiffusion, context windows). With a bridge that "
        f"needs one reference or joined ones, no mask, and edit_queries, but {reason}."
    )


def check_fired(kind: str, layers: Iterable[AttentionLayer], fired: Collection[str]) -> None:
    """Raise ValueError if some of the layers ran without our hooks; not if all or none of them did.

    fired: keys of those that ran with them.
    """
    missing = [layer.key for layer in layers if layer.key not in fired]
    if fired and missing:
        raise ValueError(
            f"{layer_name(kind, ', '.join(missing))} did not run with this node's patch: another "
            f"node leaves the layer out or replaces it. {TAKE_OUT}"
        )


def may_skip(options: dict[str, Any], own: str) -> bool:
    """Whether another node's wrapper around a model call could keep the UNet from running.

    options: the call's `transformer_options`.
    own: the key of our wrappers.
    """
    wrappers = options.get("wrappers", {})
    kinds = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    keys = {key for kind in kinds for key, found in wrappers.get(kind, {}).items() if found}
    return bool(keys - {own, _COMPILE_KEY})
