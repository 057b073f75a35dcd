"""Recording the attention of the host's UNet, with or without gradient.

A recorder lives for one model call. It rides in the call's own `model_options` as a wrapper around the UNet,
which puts recording patches into the attention slots, chained before whatever patch another node has put
there. The model's output is bit for bit what it is without the recorder, unless the recorder was asked to
stop early: then the UNet ends at the last attention that is recorded, and its output is zero.

Queries and keys are kept, not probabilities, which take up to a hundred times as much: they are made from the
two when they are looked at, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from einops import einsum, rearrange

from ...models.sites import Site, SiteKey
from ..host.options import read_options, replace_options
from .checks import check_call, check_gradient, check_grid, check_keys, check_rows, check_text, layer_name
from .token_order import TokenOrder

WRAPPER_KEY = "descriptive_edit.attention_maps"
PIECE = 2**24  # probabilities at a time: 64 MiB


@dataclass(frozen=True)
class Expected:
    """What a recorded call must be like, so that what is recorded has a meaning.

    rows, size: of the latent, its images and height and width. text: tokens of the
    description. own_grid: whether self-attention must be on the grid that the network's layout gives it, and
    not on one that another node has shrunk.
    """

    rows: int
    size: tuple[int, int]
    text: int
    own_grid: bool = False


class _LastSiteReached(Exception):
    """Ends a UNet's forward after the last attention that is wanted; never leaves `AttentionRecorder`."""


class Piece(NamedTuple):
    """A part of an attention's probabilities: some of its heads, some of its queries, all of its keys."""

    heads: slice = slice(None)
    queries: slice = slice(None)


_WHOLE = Piece()


@dataclass(frozen=True, eq=False)
class Projections:
    """What one attention computes its probabilities from, in one model call.

    q: [rows, queries, heads * d], k: [rows, keys, heads * d], as the host's attention slots receive them, in
    the UNet's dtype; a row is an image of the call's batch. Where the call has a gradient they are in its
    graph.
    """

    q: torch.Tensor
    k: torch.Tensor
    heads: int

    def pieces(self, whole_heads: bool = False) -> Iterator[Piece]:
        """Pieces of at most PIECE probabilities, or of one query, which cover all; with `whole_heads` every
        piece has all queries of its heads.
        """
        rows, queries, _ = self.q.shape
        line = rows * self.k.shape[1]
        heads = max(1, PIECE // (line * queries))
        places = queries if whole_heads or line * queries <= PIECE else max(1, PIECE // line)
        for head in range(0, self.heads, heads):
            for place in range(0, queries, places):
                yield Piece(slice(head, head + heads), slice(place, place + places))

    def probabilities(self, piece: Piece = _WHOLE) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) of the piece, [rows, heads, queries, keys] in float32; it sums to 1 over
        keys.
        """
        q, k = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (self.q, self.k))
        q, k = q[:, piece.heads, piece.queries].float(), k[:, piece.heads].float()
        scores = einsum(q, k, "b h i d, b h j d -> b h i j")
        return scores.mul_(q.shape[-1] ** -0.5).softmax(dim=-1)

    def mean(self) -> torch.Tensor:
        """The probabilities' mean over heads, [rows, queries, keys] in float32."""
        total = self.q.new_zeros(*self.q.shape[:2], self.k.shape[1], dtype=torch.float32)
        for piece in self.pieces():
            total[:, piece.queries] += self.probabilities(piece).sum(dim=1)
        return total.div_(self.heads)


@dataclass(frozen=True, eq=False)
class LossGradient:
    """A loss of some attentions' probabilities, and where its way back into the UNet begins.

    values: [rows]. parts: queries or keys in the UNet's graph, each [rows, tokens, heads * d], and the
    derivative of the values' sum by them in float32.
    """

    values: torch.Tensor
    parts: list[tuple[torch.Tensor, torch.Tensor]]

    def by_latent(self, latent: torch.Tensor, keep_graph: bool = False) -> torch.Tensor:
        """d(sum of values)/d(latent), in float32. Uses `parts` up, so that they take no memory while the
        UNet's gradient is computed.

        latent: the leaf the model call started from, [rows, ...]; each row's loss is a function of its own
        row. Gradients of attention losses are far below what half precision can hold, so what enters the
        UNet is scaled row by row to a largest value of 1, and scaled back in float32.
        """
        peaks = torch.stack([grad.flatten(1).abs().amax(dim=1) for _, grad in self.parts]).amax(dim=0)
        peaks = torch.where(peaks > 0, peaks, torch.ones_like(peaks))
        ends, scaled = [], []
        while self.parts:
            end, grad = self.parts.pop()
            ends.append(end)
            scaled.append((grad / peaks[:, None, None]).to(end.dtype))
        (gradient,) = torch.autograd.grad(ends, latent, scaled, retain_graph=keep_graph)
        return gradient.float() * peaks.view(-1, *[1] * (gradient.ndim - 1))


class AttentionRecorder:
    """Attention of one model call.

    self_sites, cross_sites: where to record. stop: end the UNet after the last of them; with `whole_layers`
    not inside of a layer but before the next block, as `checkpointing` needs.

    After the call, `self_attention` and `cross_attention` map a site's key to its queries and keys.
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
            "attn1": {site.key: site for site in self_sites},
            "attn2": {site.key: site for site in cross_sites},
        }
        self._pending = {(name, key) for name, keys in self._wanted.items() for key in keys}
        self._stop, self._whole_layers = stop, whole_layers
        self._expected: Expected | None = None
        self._differentiated = False
        self._order = TokenOrder(self._pending)
        self.self_attention: dict[SiteKey, Projections] = {}
        self.cross_attention: dict[SiteKey, Projections] = {}

    @property
    def missing(self) -> list[str]:
        """The wanted attentions that were not recorded, for people, in the order in which they run."""
        return [
            layer_name(name, site.name)
            for name, sites in self._wanted.items()
            for site in sites.values()
            if (name, site.key) in self._pending
        ]

    @property
    def ran(self) -> bool:
        """Whether any wanted attention was recorded; not so if another node kept the UNet from running."""
        return len(self._pending) < sum(map(len, self._wanted.values()))

    @property
    def moved(self) -> list[tuple[str, torch.Tensor]]:
        """What `TokenOrder` saw at the self-attentions."""
        return self._order.moved

    def clear(self) -> None:
        """Forget what was recorded. A graph whose layers are computed again refers to itself through it, and
        would take memory until Python looks for such circles.
        """
        self.self_attention.clear()
        self.cross_attention.clear()

    def attach(self, model_options: dict[str, Any], expected: Expected | None = None) -> dict[str, Any]:
        """A copy of `model_options` whose model calls are recorded here; the original is not touched.

        A call that is not as `expected` raises ValueError.
        """
        self._expected = expected
        options = comfy.model_patcher.create_model_options_clone(model_options)
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, self._wrap, options, is_model_options=True
        )
        return options

    def _wrap(self, executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        options, x = dict(read_options(args, kwargs)), args[0]
        if (expected := self._expected) is not None:
            check_call(x, expected.rows, expected.size)
        self._differentiated = x.requires_grad
        replace = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
        for name, keys in self._wanted.items():
            patches = replace.setdefault(name, {})
            for key in keys:
                patches[key] = self._patch(name, key, patches.get(key, patches.get(key[:2])))
        options["patches_replace"] = replace
        patches = options["patches"] = dict(options.get("patches", {}))
        patches["attn1_patch"] = self._order.around(patches.get("attn1_patch", []))
        if self._stop and self._whole_layers:
            for name in ("input_block_patch", "output_block_patch"):
                patches[name] = [self._end_block, *patches.get(name, ())]
        args, kwargs = replace_options(args, kwargs, options)
        try:
            return executor(*args, **kwargs)
        except _LastSiteReached:
            return torch.zeros_like(args[0])

    def _patch(self, name: str, key: SiteKey, previous: Callable | None) -> Callable:
        seen = self.self_attention if name == "attn1" else self.cross_attention

        def patch(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
        ) -> torch.Tensor:
            heads = extra_options["n_heads"]
            if (name, key) in self._pending:  # not so when a checkpointed layer is computed again
                if self._expected is not None:
                    self._check(self._expected, name, key, q, k, extra_options)
                seen[key] = Projections(q, k, heads)
                self._pending.discard((name, key))
                if self._stop and not self._pending and not self._whole_layers:
                    raise _LastSiteReached
            if previous is not None:
                return previous(q.clone(), k.clone(), v, extra_options)  # it may write into them
            precision = extra_options.get("attn_precision")
            return optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        return patch

    def _check(
        self,
        expected: Expected,
        name: str,
        key: SiteKey,
        q: torch.Tensor,
        k: torch.Tensor,
        extra_options: dict[str, Any],
    ) -> None:
        site, within = self._wanted[name][key], name == "attn1"
        layer, grid = layer_name(name, site.name), site.grid(*expected.size)
        check_rows(layer, len(q), expected.rows)
        check_rows(layer, len(k), expected.rows)
        if within and not expected.own_grid:
            grid = tuple(extra_options.get("activations_shape", grid)[-2:])
        check_grid(layer, q.shape[1], grid, extra_options, "this node")
        if within:
            check_keys(layer, k.shape[1], q.shape[1])
        else:
            check_text(layer, k.shape[1], expected.text)
        if self._differentiated:
            check_gradient(layer, *((q, k) if within else (q,)))

    def _end_block(self, hidden: torch.Tensor, *rest: Any) -> Any:
        """A block patch of the host, for either side: (h, options) or (h, skip, options)."""
        if not self._pending:
            raise _LastSiteReached
        return hidden if len(rest) == 1 else (hidden, rest[0])
