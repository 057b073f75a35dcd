"""An attention bridge at work in a UNet: one call reads the reference, others are fed from what it left.

At each site (DescriptiveEdit, arXiv 2508.20505), with normed hidden states h of the picture and r of the
reference and direction `edit_queries`:

    Z'    = (W_o + dW_o) Attention((W_q + dW_q) h, (W_k + dW_k) r, (W_v + dW_v) r)
    Z_out = Z + strength * mask * F(Z')

`reference_queries` swaps h and r. W are the host's own weights with every LoRA on them. The host hands over
W_q h, W_k h and W_v h; only the updates are computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange

from ...models.bridge import AttentionBridge
from ...models.sites import SiteKey, find_sites
from ..attention.checks import TAKE_OUT, check_grid, check_keys, check_rows, layer_name

Matrix = tuple[torch.Tensor, torch.Tensor]


class Kept(NamedTuple):
    """What the reference pass left at a site: K and V, or Q, each [references or 1, tokens, width], and the
    output projection and F as one matrix and bias, if they act as one.
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    merged: Matrix | None


class _ReferenceRead(Exception):
    """Ends the reference pass at the last site; never leaves `Bank.read`."""


class Bank:
    """A bridge, the sites of the UNet it works in, and what the last reference pass left at each."""

    def __init__(self, bridge: AttentionBridge, unet: torch.nn.Module) -> None:
        self.bridge, self.settings = bridge, bridge.settings
        self.sites = find_sites(unet)
        self.outputs = {site.key: unet.get_submodule(site.path).attn1.to_out for site in self.sites}
        self.kept: dict[SiteKey, Kept] = {}

    def read(
        self,
        unet: torch.nn.Module,
        x: torch.Tensor,
        options: dict[str, Any],
        *,
        joined: bool = False,
        merge: Callable[[SiteKey, torch.Tensor], Matrix | None] | None = None,
        timesteps: torch.Tensor | None = None,
        **conditions: Any,
    ) -> None:
        """The reference pass: clean latents `x` at timestep 0, with no ControlNet, up to the last site.

        options: the call's `transformer_options`. joined: all references as one long sequence of tokens.
        merge: a site's output matrix as one, or None. timesteps: other than 0, for experiments, [references].
        conditions: `context`, `y`. Where a gradient is wanted, the frozen UNet gets none unless the
        reference passes through the bridge itself.
        """
        self.kept.clear()
        learning = torch.is_grad_enabled()
        reading = _Reading(self, joined, merge or (lambda key, like: None), learning)
        timesteps = torch.zeros(len(x), device=x.device) if timesteps is None else timesteps
        through = torch.set_grad_enabled(learning and self.settings.reference_self_bridge)
        with through, suppress(_ReferenceRead):
            unet(
                x,
                timesteps,
                control=None,
                transformer_options=reading.install(options),
                **conditions,
            )
        missing = [site.name for site in self.sites if site.key not in self.kept]
        if missing:
            raise ValueError(
                f"the reference pass did not reach {layer_name('attn1', ', '.join(missing))}: "
                f"another node leaves the layer out or replaces it. {TAKE_OUT}"
            )

    def free(self) -> None:
        self.kept.clear()
        self.outputs.clear()


@dataclass
class _Patches:
    """The bridge's patches for one call of the UNet, from the outside in: ours sees a block's input after
    every other patch and its output before every other.
    """

    bank: Bank

    def __post_init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self.attended: torch.Tensor | None = None

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """A call's `transformer_options` with these patches; the original is not touched."""
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), self.before]
        patches["attn1_output_patch"] = [self.after, *patches.get("attn1_output_patch", ())]
        replace = dict(options.get("patches_replace", {}))
        attn1 = dict(replace.get("attn1", {}))
        for site in self.bank.sites:
            previous = attn1.get(site.key, attn1.get(site.key[:2]))
            attn1[site.key] = partial(self.around, site.key, previous or _attention)
        replace["attn1"] = attn1
        return {**options, "patches": patches, "patches_replace": replace}

    @torch.compiler.disable
    def before(self, n: torch.Tensor, context: Any, value: Any, extra_options: dict[str, Any]) -> tuple:
        self.hidden = n
        return n, context, value

    def fused(self, key: SiteKey, own: torch.Tensor) -> torch.Tensor:
        """F(Z') of the attention result in `attended`; `own` is the self-attention's Z."""
        kept, site = self.bank.kept[key], self.bank.bridge.site(key)
        attended, self.attended = self.attended, None
        if kept.merged is not None:
            return torch.nn.functional.linear(attended, *kept.merged)
        result = self.bank.outputs[key](attended) + site.out(attended)
        match self.bank.settings.fusion:
            case "linear":
                return site.fuse(result)
            case "add":
                return result
            case _:
                return result - own


class _Reading(_Patches):
    """The reference pass: fills the bank."""

    def __init__(
        self,
        bank: Bank,
        joined: bool,
        merge: Callable[[SiteKey, torch.Tensor], Matrix | None],
        learning: bool,
    ) -> None:
        super().__init__(bank)
        self.joined, self.merge, self.learning = joined, merge, learning

    @torch.compiler.disable
    def around(
        self,
        key: SiteKey,
        own: Callable,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: dict[str, Any],
    ) -> torch.Tensor:
        bank, site, r = self.bank, self.bank.bridge.site(key), self.hidden
        asks, self_bridge = bank.settings.direction != "edit_queries", bank.settings.reference_self_bridge
        with torch.set_grad_enabled(self.learning):
            query = q + site.q(r) if asks or self_bridge else None
            key_, value = (k + site.k(r), v + site.v(r)) if not asks or self_bridge else (None, None)
        merged = self.merge(key, q)
        if asks:
            bank.kept[key] = Kept(query, None, None, merged)
        else:
            bank.kept[key] = Kept(None, self._join(key_), self._join(value), merged)
        if self_bridge:
            self.attended = _attention(query, key_, value, extra_options)
        elif len(bank.kept) == len(bank.sites):
            raise _ReferenceRead
        return own(q, k, v, extra_options)

    def _join(self, tensor: torch.Tensor) -> torch.Tensor:
        return rearrange(tensor, "r n d -> 1 (r n) d") if self.joined else tensor

    @torch.compiler.disable
    def after(self, out: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        if self.attended is None:
            return out
        return out + self.fused(_key(extra_options), out)


class Feeding(_Patches):
    """A denoising call whose `rows` see the reference.

    rows: of the call's batch, a slice or an index tensor; None for none. x: the latents of the call, for
    their number and size. answer: from a tensor of the bank to one for each of these rows. masks: at each
    site [rows or 1, tokens, 1], or None. `fired` holds the sites that were fed.
    """

    def __init__(
        self,
        bank: Bank,
        rows: slice | torch.Tensor | None,
        x: torch.Tensor,
        answer: Callable[[torch.Tensor], torch.Tensor],
        strength: float = 1.0,
        masks: Mapping[SiteKey, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(bank)
        self.rows, self.answer = rows, answer
        self.total, self.size = len(x), tuple(x.shape[-2:])
        self.strength, self.masks = strength, masks
        self.fired: set[SiteKey] = set()

    @torch.compiler.disable
    def around(
        self,
        key: SiteKey,
        own: Callable,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: dict[str, Any],
    ) -> torch.Tensor:
        if self.rows is not None:
            self.attended = self._attend(key, q, k, v, extra_options)
            self.fired.add(key)
        return own(q, k, v, extra_options)

    def _attend(
        self,
        key: SiteKey,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: dict[str, Any],
    ) -> torch.Tensor:
        layer = _layer(key)
        check_rows(layer, len(q), self.total)
        kept, site, h = self.bank.kept[key], self.bank.bridge.site(key), self.hidden[self.rows]
        if kept.query is None:
            query, key_, value = q[self.rows] + site.q(h), self.answer(kept.key), self.answer(kept.value)
        else:
            why = "a bridge with the direction reference_queries"
            check_grid(layer, h.shape[1], self._grid(key), extra_options, why)
            check_keys(layer, k.shape[1], h.shape[1])
            query, key_, value = self.answer(kept.query), k[self.rows] + site.k(h), v[self.rows] + site.v(h)
        return _attention(query, key_, value, extra_options)

    @torch.compiler.disable
    def after(self, out: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        if self.attended is None:
            return out
        key = _key(extra_options)
        fused = self.fused(key, out[self.rows])
        if self.masks is not None:
            mask = self.masks[key]
            check_grid(_layer(key), fused.shape[1], self._grid(key), extra_options, "a mask")
            fused = fused * mask.to(fused)
        if isinstance(self.rows, slice):
            out[self.rows].add_(fused, alpha=self.strength)
            return out
        return out.index_add_(0, self.rows, fused.to(out.dtype), alpha=self.strength)

    def _grid(self, key: SiteKey) -> tuple[int, int]:
        return next(site for site in self.bank.sites if site.key == key).grid(*self.size)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    return optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )


def _layer(key: SiteKey) -> str:
    return layer_name("attn1", ".".join(map(str, key)))


def _key(extra_options: dict[str, Any]) -> SiteKey:
    return (*extra_options["block"], extra_options["block_index"])
