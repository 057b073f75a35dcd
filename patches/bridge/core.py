"""The bridge's formula in a network: one call reads the reference, the others use its features.

At each layer (DescriptiveEdit, arXiv 2508.20505), with normed hidden states h of the image being denoised and
r of the reference and direction `edit_queries`:

    Z'    = (W_o + dW_o) Attention((W_q + dW_q) h, (W_k + dW_k) r, (W_v + dW_v) r)
    Z_out = Z + strength * mask * F(Z')

`reference_queries` swaps h and r. W are the host's own weights with all LoRAs. The host provides W_q h, W_k h
and W_v h; only the updates are computed here, with weights that are read once a run (`weights.py`).

In a DiT's joint attention, with q, k, v of the image's tokens and q~, k~, v~ of the reference's as the slots
show them (projected, normed), R the rotation by a token's position, and F before the output projection:

    Z'    = Attention(R (1 + dW_q) q, R (1 + dW_k) k~, (1 + dW_v) v~)
    Z_out = Z + strength * mask * F((1 + dW_o) Z')

There dW_o is left out where F is learned, since F (1 + dW_o) is again such an F. The image and the reference
are on the same positions. Text is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from einops import rearrange

from ...models.bridge import AttentionBridge
from ..attention.checks import TAKE_OUT, check_grid, check_keys, check_rows, layer_name
from ..attention.hooks import Attention, ForwardEnded, attend, rotate
from ..attention.layers import AttentionLayer
from ..attention.networks import Network
from .weights import LayerWeights, prepare, updated

# What names the errors of a node; `nodes.errors.naming`.
Door = AbstractContextManager[Any]
# Of the reference at a layer.
Features = tuple[torch.Tensor, ...]


class ReferenceCache:
    """A bridge, its network, and by layer what the last reference pass left.

    features: K and V, each [references, or 1 if they are joined, tokens, width]; with `reference_queries` Q,
        [references, tokens, width].
    weights: the bridge's, for that pass and the calls after it.
    """

    def __init__(self, bridge: AttentionBridge, network: Network) -> None:
        self.bridge, self.settings, self.network = bridge, bridge.settings, network
        self.features: dict[str, Features] = {}
        self.weights: dict[str, LayerWeights] = {}

    def read(
        self,
        x: torch.Tensor,
        options: dict[str, Any],
        *,
        joined: bool = False,
        repaid: Callable[[AttentionLayer], bool] | None = None,
        timesteps: torch.Tensor | None = None,
        **conditions: Any,
    ) -> None:
        """The reference pass: clean latents at timestep 0, without ControlNet, up to the last layer.

        x: [references, channels, height, width].
        options: the call's `transformer_options`.
        joined: all references as one long sequence of tokens.
        repaid: whether merging a layer's output pays, for weights that stay the same; None merges none.
        timesteps: other than 0, for experiments, [references].
        conditions: `context`, `y`.

        The frozen network gets no gradient unless the reference passes through the bridge itself.
        Raises ValueError if a layer was not reached.
        """
        self.clear()
        learning = torch.is_grad_enabled()
        self.weights = prepare(self.bridge, self.network, repaid, x.dtype, x.device)
        hooks = ReferencePass(self, joined, learning)
        timesteps = torch.zeros(len(x), device=x.device) if timesteps is None else timesteps
        options = self.network.install(
            options,
            hooks.before,
            hooks.after if self.settings.reference_self_bridge else None,
            size=(x.shape[-2], x.shape[-1]),
            self_layers=self.network.layers.values(),
        )
        through = torch.set_grad_enabled(learning and self.settings.reference_self_bridge)
        with through, suppress(ForwardEnded):
            self.network.module(x, timesteps, control=None, transformer_options=options, **conditions)
        missing = [key for key in self.network.layers if key not in self.features]
        if missing:
            raise ValueError(
                f"the reference pass did not reach {layer_name('attn1', ', '.join(missing))}: "
                f"another node leaves the layer out or replaces it. {TAKE_OUT}"
            )

    def fused(self, layer: AttentionLayer, attended: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """F(Z'), [rows, tokens, width].

        attended: Z' before its output projection.
        own: Z.
        """
        result = self.weights[layer.key].output(attended)
        return result - own if self.settings.fusion == "replace" else result

    def clear(self) -> None:
        """Free what the reference pass left."""
        self.features, self.weights = {}, {}


class ReferencePass:
    """Hooks that fill the cache. The forward ends at the last layer, unless the reference's own rows pass
    through the bridge.
    """

    def __init__(self, cache: ReferenceCache, joined: bool, learning: bool) -> None:
        self._cache, self._joined, self._learning = cache, joined, learning

    def before(self, at: Attention) -> torch.Tensor | None:
        """Keep the layer's features. Returns Z' of the reference with itself, or None."""
        cache, self_bridge = self._cache, self._cache.settings.reference_self_bridge
        with torch.set_grad_enabled(self._learning):
            found = updated(cache.weights[at.layer.key].reading, at, slice(None))
        kept = found[:1] if cache.settings.direction == "reference_queries" else found[-2:]
        if self._joined:
            kept = [rearrange(tensor, "r n d -> 1 (r n) d") for tensor in kept]
        cache.features[at.layer.key] = tuple(kept)
        if self_bridge:
            query, key, value = found
            return attend(query, key, value, at)
        if len(cache.features) == len(cache.network.layers):
            raise ForwardEnded
        return None

    def after(self, layer: AttentionLayer, attended: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Z_out of the reference."""
        return out + self._cache.fused(layer, attended, out)


class DenoisePatches:
    """Hooks of a denoising call in which some rows see the reference.

    rows: of the call's batch, a slice or an index tensor; None for none.
    x: the latents of the call, for their number and size.
    features: function from a layer's key to its features in the cache, one for each of these rows.
    strength: factor of the bridge's output.
    masks: by layer, [rows or 1, tokens, 1], or None.
    shifts: of a DiT, the rotation of these rows' queries by the corner of their part of the latent, or None.
    door: context that is entered where an error is raised, since the call may be another node's.

    `fired` holds the keys of the layers at which the bridge acted.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        rows: slice | torch.Tensor | None,
        x: torch.Tensor,
        features: Callable[[str], Features],
        strength: float = 1.0,
        masks: Mapping[str, torch.Tensor] | None = None,
        shifts: torch.Tensor | None = None,
        door: Door | None = None,
    ) -> None:
        self.rows, self.fired = rows, set[str]()
        self._cache, self._features = cache, features
        self._from_reference = cache.settings.direction == "reference_queries"
        self._total, self._size = len(x), (x.shape[-2], x.shape[-1])
        self._strength, self._masks, self._shifts = strength, masks, shifts
        self._door = door or nullcontext()

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """A call's `transformer_options` with these hooks; the original is unchanged."""
        network = self._cache.network
        return network.install(
            options, self.before, self.after, size=self._size, self_layers=network.layers.values()
        )

    def before(self, at: Attention) -> torch.Tensor | None:
        """Z' before its output projection, [the rows that see the reference, tokens, width]."""
        if self.rows is None:
            return None
        try:
            self._check(at)
        except ValueError:
            with self._door:
                raise
        self.fired.add(at.layer.key)
        kept = self._features(at.layer.key)
        found = updated(self._cache.weights[at.layer.key].denoising, at, self.rows)
        query, key, value = (*kept, *found) if self._from_reference else (*found, *kept)
        if self._shifts is not None and not self._from_reference:
            query = rotate(query, self._shifts, at.layer.heads)
        return attend(query, key, value, at)

    def _check(self, at: Attention) -> None:
        name, grid = layer_name("attn1", at.layer.key), at.layer.grid(*self._size)
        tokens = (at.q if at.inputs is None else at.inputs.hidden).shape[1]
        check_rows(name, len(at.q), self._total)
        if at.inputs is None:
            check_grid(name, tokens, grid, at.grid, "a bridge in a DiT")
        if self._from_reference:
            check_grid(name, tokens, grid, at.grid, "a bridge with the direction reference_queries")
            check_keys(name, at.k.shape[1], tokens)
        if self._masks is not None:
            check_grid(name, tokens, grid, at.grid, "a mask")

    def after(self, layer: AttentionLayer, attended: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Z_out, in the rows that see the reference."""
        rows = self.rows
        assert rows is not None
        own = out[rows]
        fused = self._cache.fused(layer, attended, own)
        if self._masks is not None:
            fused = fused * self._masks[layer.key]
        if torch.is_grad_enabled():  # autograd may have saved what it would be added to
            fused = fused.to(out.dtype)
            if isinstance(rows, slice):
                joined = torch.add(own, fused, alpha=self._strength)
                return out.slice_scatter(joined, 0, rows.start, rows.stop)
            return out.index_add(0, rows, fused, alpha=self._strength)
        if isinstance(rows, slice):
            own.add_(fused, alpha=self._strength)
            return out
        return out.index_add_(0, rows, fused.to(out.dtype), alpha=self._strength)
