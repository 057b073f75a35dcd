"""Recording the attention probabilities of the host's UNet, with or without gradient.

A recorder lives for one model call. It rides in the call's own `model_options` as a wrapper around the UNet,
which puts recording patches into the attention slots, chained before whatever patch another node has put
there. The model's output is bit for bit what it is without the recorder, unless the recorder was asked to
stop early: then the UNet ends at the last attention that is recorded, and its output is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from einops import einsum, rearrange

from ..models.sites import Site, SiteKey
from .options import read_options, replace_options

WRAPPER_KEY = "descriptive_edit.attention_maps"


class _LastSiteReached(Exception):
    """Ends a UNet's forward after the last attention that is wanted; never leaves `AttentionRecorder`."""


class AttentionRecorder:
    """Attention probabilities of one model call.

    self_sites, cross_sites: where to record. stop: end the UNet after the last of them; with `whole_layers`
    not inside of a layer but before the next block, as `checkpointing` needs.

    After the call, `self_attention` and `cross_attention` map a site's key to probabilities of shape [rows,
    heads, queries, keys] in float32 that sum to 1 over keys; a row is an image of the call's batch. Where the
    call has a gradient, they belong to a graph that ends at this recorder, and `gradients` carries losses
    back through the UNet.
    """

    def __init__(
        self,
        self_sites: Iterable[Site],
        cross_sites: Iterable[Site],
        *,
        stop: bool = False,
        whole_layers: bool = False,
    ) -> None:
        self._wanted = {
            "attn1": {site.key for site in self_sites},
            "attn2": {site.key for site in cross_sites},
        }
        self._pending = {(name, key) for name, keys in self._wanted.items() for key in keys}
        self._stop, self._whole_layers = stop, whole_layers
        self._seen: dict[tuple[str, SiteKey], tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._outer: list[torch.Tensor] = []
        self._inner: list[torch.Tensor] = []
        self.self_attention: dict[SiteKey, torch.Tensor] = {}
        self.cross_attention: dict[SiteKey, torch.Tensor] = {}

    @property
    def complete(self) -> bool:
        """Whether every wanted site was recorded; not so if another node kept the UNet from running."""
        return not self._pending

    def attach(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of `model_options` whose model calls are recorded here; the original is not touched."""
        options = comfy.model_patcher.create_model_options_clone(model_options)
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, self._wrap, options, is_model_options=True
        )
        return options

    def gradients(self, losses: Sequence[torch.Tensor], latent: torch.Tensor) -> list[torch.Tensor]:
        """d(sum of a loss)/d(latent) for each of `losses`, with the recorded probabilities as the way back
        into the UNet. The graph is gone afterwards.

        losses: each [rows], a function of its own row's maps. latent: the leaf the model call started from,
        [rows, ...]. Gradients of attention losses are far below what half precision can hold, so what enters
        the UNet is scaled row by row to a largest value of 1, and scaled back in float32.
        """
        found = []
        for number, loss in enumerate(losses, start=1):
            keep = number < len(losses)
            inner = torch.autograd.grad(loss.sum(), self._inner, retain_graph=keep, allow_unused=True)
            used = [(outer, grad) for outer, grad in zip(self._outer, inner, strict=True) if grad is not None]
            peaks = torch.stack([grad.flatten(1).abs().amax(dim=1) for _, grad in used]).amax(dim=0)
            peaks = torch.where(peaks > 0, peaks, torch.ones_like(peaks))
            scaled = [(grad / peaks[:, None, None]).to(outer.dtype) for outer, grad in used]
            (gradient,) = torch.autograd.grad([outer for outer, _ in used], latent, scaled, retain_graph=keep)
            found.append(gradient.float() * peaks.view(-1, *[1] * (gradient.ndim - 1)))
        return found

    def _wrap(self, executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = dict(read_options(args, kwargs))
        replace = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
        for name, keys in self._wanted.items():
            patches = replace.setdefault(name, {})
            for key in keys:
                patches[key] = self._patch(name, key, patches.get(key, patches.get(key[:2])))
        options["patches_replace"] = replace
        if self._stop and self._whole_layers:
            patches = options["patches"] = dict(options.get("patches", {}))
            for name in ("input_block_patch", "output_block_patch"):
                patches[name] = [self._end_block, *patches.get(name, ())]
        args, kwargs = replace_options(args, kwargs, options)
        try:
            output = executor(*args, **kwargs)
        except _LastSiteReached:
            output = torch.zeros_like(args[0])
        # Out here, where it is no part of a layer that is computed again.
        for (name, key), pair in self._seen.items():
            maps = self.self_attention if name == "attn1" else self.cross_attention
            maps[key] = attention_probabilities(*pair)
        self._seen.clear()
        return output

    def _patch(self, name: str, key: SiteKey, previous: Callable | None) -> Callable:
        def patch(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
        ) -> torch.Tensor:
            heads = extra_options["n_heads"]
            if (name, key) in self._pending:  # not so when a checkpointed layer is computed again
                self._seen[name, key] = self._boundary(q), self._boundary(k), heads
                self._pending.discard((name, key))
                if self._stop and not self._pending and not self._whole_layers:
                    raise _LastSiteReached
            if previous is not None:
                return previous(q, k, v, extra_options)
            precision = extra_options.get("attn_precision")
            return optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        return patch

    def _end_block(self, hidden: torch.Tensor, *rest: Any) -> Any:
        """A block patch of the host, for either side: (h, options) or (h, skip, options)."""
        if not self._pending:
            raise _LastSiteReached
        return hidden if len(rest) == 1 else (hidden, rest[0])

    def _boundary(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in float32; with gradient, as a leaf of its own whose partner in the UNet's graph is
        kept.
        """
        if not tensor.requires_grad:
            return tensor.float()
        leaf = tensor.detach().float().requires_grad_()
        self._outer.append(tensor)
        self._inner.append(leaf)
        return leaf


def attention_probabilities(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) head by head.

    q: [rows, queries, heads * d], k: [rows, keys, heads * d], as the host's attention slots receive them.
    Returns [rows, heads, queries, keys].
    """
    q = rearrange(q, "b n (h d) -> b h n d", h=heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=heads)
    return (einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5).softmax(dim=-1)
