"""Records the attention of a model call, with or without gradient.

A recorder lives for one model call. It is passed in the call's own `model_options` as a wrapper around the
network, which puts hooks into the attention layers. The model's output stays bit for bit the same, unless the
recorder is set to stop early: then the forward ends at the last recorded attention, and its output is zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..host.options import read_options, replace_options
from .checks import (
    TAKE_OUT,
    check_call,
    check_entries,
    check_gradient,
    check_grid,
    check_keys,
    check_rows,
    check_text,
    check_unmasked,
    layer_name,
    moved_tokens,
)
from .hooks import Attention, ForwardEnded
from .layers import AttentionLayer
from .networks import Readable
from .projections import Projections, project

WRAPPER_KEY = "descriptive_edit.attention_maps"


@dataclass(frozen=True)
class Expected:
    """Requirements on a recorded call.

    rows: images of the latent, in each branch of the call.
    size: height and width of the latent.
    text: tokens of the description.
    own_grid: whether self-attention must be on the grid of the network's layout, and not on one that another
    node has shrunk.
    """

    rows: int
    size: tuple[int, int]
    text: int
    own_grid: bool = False


@dataclass(frozen=True, eq=False)
class LossGradient:
    """A loss of some attentions' probabilities, with the derivatives from which its backward pass starts.

    values: [rows].
    parts: queries or keys in the network's graph, each [rows, tokens, heads * d], and the derivative of the
    values' sum with respect to them in float32.
    """

    values: torch.Tensor
    parts: list[tuple[torch.Tensor, torch.Tensor]]


def loss_gradients(
    losses: Sequence[LossGradient], latents: Sequence[torch.Tensor], keep_graph: bool = False
) -> list[Any]:
    """d(sum of a loss's values)/d(its latent) in float32 for each loss, by one backward pass. Consumes the
    losses' `parts`, so that they take no memory during it.

    latents: for each loss the leaf that its rows of the model call started from, [rows, ...]; each row's loss
    depends on its own row only. More leaves may follow. Their gradients follow too, None for one that no loss
    depends on.
    keep_graph: whether the graph is needed again.

    Gradients of attention losses are far too small for half precision. So what enters the network is scaled
    row by row to a maximum of 1, and scaled back in float32.
    """
    ends, scaled, found = [], [], []
    for loss in losses:
        most = torch.stack([grad.flatten(1).abs().amax(dim=1) for _, grad in loss.parts]).amax(dim=0)
        found.append(torch.where(most > 0, most, torch.ones_like(most)))
        while loss.parts:
            end, grad = loss.parts.pop()
            ends.append(end)
            scaled.append((grad / found[-1][:, None, None]).to(end.dtype))
    gradients = torch.autograd.grad(ends, latents, scaled, retain_graph=keep_graph, allow_unused=True)
    peaks = [peak.view(-1, *[1] * (gradients[0].ndim - 1)) for peak in found]
    own = [gradient.float() * peak for gradient, peak in zip(gradients, peaks, strict=False)]
    return [*own, *gradients[len(peaks) :]]


class _Found(NamedTuple):
    """Queries and keys of one branch by layer; the fields are the host's names of the attentions."""

    attn1: dict[str, Projections]
    attn2: dict[str, Projections]


class AttentionRecorder:
    """Records the attention of one model call.

    network: of the model.
    self_layers, cross_layers: layers whose self- and cross-attention are recorded.
    stop: end the forward after the last of them.
    whole_layers: end it between two blocks, as `checkpointed` needs, and not inside one.
    branches: uuids of the conditioning entries of a call that runs several. The host may run them in several
    parts.

    After the call `self_attention` and `cross_attention` hold queries and keys by layer, `branch` those of
    one of several entries, and `moved` the input of `check_order`.
    """

    def __init__(
        self,
        network: Readable,
        self_layers: Iterable[AttentionLayer],
        cross_layers: Iterable[AttentionLayer],
        *,
        stop: bool = False,
        whole_layers: bool = False,
        branches: Sequence[Hashable] = (),
    ) -> None:
        self.network = network
        self._self_layers, self._cross_layers = tuple(self_layers), tuple(cross_layers)
        self._branches = tuple(branches) or (None,)
        wanted = {("attn1", layer.key) for layer in self._self_layers}
        wanted |= {("attn2", layer.key) for layer in self._cross_layers}
        self._pending = {branch: set(wanted) for branch in self._branches}
        self._called = self._branches
        self._stop, self._whole_layers = stop, whole_layers
        self._expected: Expected | None = None
        self._differentiated = False
        self._found: dict[Hashable, _Found] = {branch: _Found({}, {}) for branch in self._branches}
        self.moved: list[tuple[str, torch.Tensor]] = []

    @property
    def self_attention(self) -> dict[str, Projections]:
        """By layer; of the first branch."""
        return self._found[self._branches[0]].attn1

    @property
    def cross_attention(self) -> dict[str, Projections]:
        """By layer; of the first branch."""
        return self._found[self._branches[0]].attn2

    def branch(self, uuid: Hashable) -> tuple[dict[str, Projections], dict[str, Projections]]:
        """Self- and cross-attention of one of several entries, by layer."""
        return self._found[uuid]

    @property
    def missing(self) -> list[str]:
        """Names of the requested attentions that were not recorded, for messages, in the order in which they
        run.
        """
        return [
            layer_name(kind, layer.key)
            for kind, layers in (("attn1", self._self_layers), ("attn2", self._cross_layers))
            for layer in layers
            if any((kind, layer.key) in pending for pending in self._pending.values())
        ]

    @property
    def ran(self) -> bool:
        """Whether any requested attention was recorded. False if another node kept the network from
        running.
        """
        return any(any(found) for found in self._found.values())

    def clear(self) -> None:
        """Forget what was recorded.

        A graph whose layers are computed again refers to itself through the recorder, and would take memory
        until Python's garbage collector finds the cycle.
        """
        for found in self._found.values():
            found.attn1.clear()
            found.attn2.clear()

    def attach(self, model_options: dict[str, Any], expected: Expected | None = None) -> dict[str, Any]:
        """A copy of `model_options` whose model calls are recorded here; the original is unchanged.

        A call that is not as `expected` raises ValueError.
        """
        self._expected = expected
        options = comfy.model_patcher.create_model_options_clone(model_options)
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, self._wrap, options, is_model_options=True
        )
        return options

    def _wrap(self, executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, options = args[0], read_options(args, kwargs)
        if self._branches != (None,):
            self._called = tuple(options["uuids"])
        if self._expected is not None:
            check_call(x, len(self._called) * self._expected.rows, self._expected.size)
        self._differentiated = x.requires_grad
        options = self.network.install(
            options,
            self._record,
            size=(x.shape[-2], x.shape[-1]),
            self_layers=self._self_layers,
            cross_layers=self._cross_layers,
        )
        if self._stop and self._whole_layers:
            options = self.network.end_between_blocks(options, self._complete)
        args, kwargs = replace_options(args, kwargs, options)
        try:
            return executor(*args, **kwargs)
        except ForwardEnded:
            return torch.zeros_like(x)

    def _complete(self) -> bool:
        """Whether the present call has no layer left to record."""
        return not any(self._pending[branch] for branch in self._called)

    def _record(self, at: Attention) -> None:
        key = at.layer.key
        if (at.kind, key) not in self._pending[self._called[0]]:
            project(at)  # a checkpointed layer that is computed again must do the same again
            return
        if at.inputs is not None:
            normed = at.inputs.normed
            for now in (at.inputs.hidden, at.inputs.context):
                if now is not normed and now.shape == normed.shape:
                    self.moved.append((key, moved_tokens(normed, now)))
        if self._expected is not None:
            self._check(self._expected, at)
        for branch, found in zip(self._called, project(at).chunk(len(self._called)), strict=True):
            getattr(self._found[branch], at.kind)[key] = found
            self._pending[branch].discard((at.kind, key))
        if self._stop and not self._whole_layers and self._complete():
            raise ForwardEnded

    def _check(self, expected: Expected, at: Attention) -> None:
        name, grid, within = (
            layer_name(at.kind, at.layer.key),
            at.layer.grid(*expected.size),
            at.kind == "attn1",
        )
        rows = len(self._called) * expected.rows
        check_rows(name, len(at.q), rows)
        check_rows(name, len(at.k), rows)
        if within and not expected.own_grid:
            grid = at.grid or grid
        check_grid(name, at.q.shape[1], grid, at.grid, "this node")
        if at.joint is not None:
            check_keys(name, at.joint.k.shape[2], at.joint.q.shape[2])
            check_text(name, at.joint.text, expected.text)
            check_unmasked(name, at.joint.masked)
        elif within:
            check_keys(name, at.k.shape[1], at.q.shape[1])
        else:
            check_text(name, at.k.shape[1], expected.text)
        if self._differentiated:
            check_gradient(name, *((at.q, at.k) if within or at.joint is not None else (at.q,)))


def record(
    model: BaseModel,
    recorder: AttentionRecorder,
    entry: dict[str, Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: dict[str, Any],
    own_grid: bool = False,
) -> torch.Tensor:
    """One recorded model call for one conditioning entry; returns the denoised latents.

    entry: of a processed conditioning.
    x: [rows, ...].
    sigma: [rows].
    options: the call's model options.
    own_grid: as in `Expected`.

    A compiled model runs uncompiled, because the compiled code has no hooks.

    Raises ValueError if the network or a layer did not run, or if another node changes the call or a layer.
    """
    (denoised,) = run_entries(model, recorder, [entry], x, sigma, options, own_grid)
    return denoised


def run_entries(
    model: BaseModel,
    recorder: AttentionRecorder,
    entries: list[dict[str, Any]],
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: dict[str, Any],
    own_grid: bool,
) -> list[torch.Tensor]:
    """`record` of several entries with texts of one length; returns what the host makes of all."""
    text, (height, width) = entries[0]["model_conds"]["c_crossattn"].cond.shape[1], x.shape[-2:]
    expected = Expected(len(x), (height, width), text, own_grid)
    check_entries(recorder.network, entries)
    with _uncompiled():
        denoised = comfy.samplers.calc_cond_batch(
            model, [entries], x, sigma, recorder.attach(options, expected)
        )
    if recorder.missing and recorder.ran:
        raise ValueError(
            f"{', '.join(recorder.missing)} did not run: another node leaves the layer out or "
            f"replaces it. {TAKE_OUT}"
        )
    if recorder.missing:
        raise ValueError(
            "another node keeps the network from running at every step (EasyCache, or with a torch "
            "before 2.6 TorchCompileModel): take it out of the model's chain"
        )
    return denoised


def _uncompiled() -> AbstractContextManager:
    """A context in which torch 2.6 and newer run compiled models uncompiled."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()


def whole_image(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a processed conditioning without an area or a mask."""
    return [entry for entry in entries if "area" not in entry and "mask" not in entry]


def active_entry(entries: Sequence[dict[str, Any]], sigma: float) -> dict[str, Any] | None:
    """The first entry for the whole image whose range of noise levels holds `sigma`."""
    for entry in whole_image(entries):
        if entry.get("timestep_end", 0.0) <= sigma <= entry.get("timestep_start", math.inf):
            return entry
    return None
