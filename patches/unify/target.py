"""UnifyEdit's target branch: the sampled latent, run with the edit description for its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention.layers import AttentionLayer
from ..attention.masks import layer_masks
from ..attention.recorder import AttentionRecorder, LossGradient, Projections, active_entry, record
from ..host.autograd import differentiable_options, gradients, naming_writes, weights_streamed
from ..host.checkpointing import checkpointed
from .balance import row_norm
from .losses import alignment_loss, structure_loss
from .plan import Layers
from .settings import UnifyOptions
from .tokens import EditTokens
from .trace import LOSSES
from .words import Words, edit_words


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of both losses at one latent.

    structure, alignment: [rows, channels, height, width], float32; zero for a loss without a weight.
    values: [4, rows], as in a Trace.
    reordered: to be checked after the run by `check_order`.
    """

    structure: torch.Tensor
    alignment: torch.Tensor
    values: torch.Tensor
    reordered: list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Target:
    """The target branch of one sampling.

    entries: the edit description as the model takes it.
    options: the model options of every call.
    patchers: the models that a call runs.
    words: the edit's words by the number of tokens in the context.
    masks: the edit mask at each layer for words, [rows or 1, tokens].
    regions: where structure is kept at each layer for it, [rows or 1, tokens]; None for everywhere.
    alignment: form of the alignment loss.
    checkpointing: whether layers are computed again in the backward pass.
    """

    model: BaseModel
    entries: list[dict[str, Any]]
    options: dict[str, Any]
    patchers: Sequence[ModelPatcher]
    layers: Layers
    words: Callable[[int], Words]
    masks: Mapping[str, torch.Tensor]
    regions: Mapping[str, torch.Tensor] | None
    alignment: str
    checkpointing: bool

    def gradients(
        self,
        x: torch.Tensor,
        sigma: float,
        reference: Mapping[str, Projections],
        words: bool,
    ) -> Gradients | None:
        """Both losses' gradients at the latent `x`; None if there is nothing to differentiate.

        x: [rows, channels, height, width].
        reference: the source's self-attention, empty if structure has no weight.
        words: whether alignment has a weight.
        """
        entry = active_entry(self.entries, sigma)
        if entry is None or not (words or reference):
            return None
        with naming_writes(), gradients(weights_streamed(self.patchers)):
            leaf = x.clone().requires_grad_()
            options = differentiable_options(self.options)
            if self.checkpointing:
                options["transformer_options"] = checkpointed(options["transformer_options"])
            recorder = AttentionRecorder(
                self.layers.network,
                self.layers.structure if reference else (),
                self.layers.words if words else (),
                stop=True,
                whole_layers=self.checkpointing,
            )
            try:
                levels, own_grid = x.new_full((len(x),), sigma), self.regions is not None
                record(self.model, recorder, entry, leaf, levels, options, own_grid)
                losses = self._losses(recorder, reference, words)
                values, found = {}, {}
                for number, (name, take) in enumerate(losses.items(), start=1):
                    loss = take()
                    values[name] = loss.values
                    found[name] = loss.by_latent(leaf, keep_graph=number < len(losses))
            finally:
                recorder.clear()
        nothing = x.new_full((len(x),), torch.nan)
        norms = {name: row_norm(gradient).flatten() for name, gradient in found.items()}
        return Gradients(
            *(found.get(name, torch.zeros_like(x)) for name in LOSSES),
            torch.stack([part.get(name, nothing).detach() for part in (values, norms) for name in LOSSES]),
            recorder.moved,
        )

    def _losses(
        self, recorder: AttentionRecorder, reference: Mapping[str, Projections], words: bool
    ) -> dict[str, Callable[[], LossGradient]]:
        """The losses that have a weight; each is taken only when the one before it is done with."""
        losses = {}
        if reference:
            losses["structure"] = partial(structure_loss, reference, recorder.self_attention, self.regions)
        if words:
            attention = recorder.cross_attention
            context = next(iter(attention.values())).k.shape[1]
            losses["alignment"] = partial(
                alignment_loss, attention, self.words(context), self.masks, self.alignment
            )
        return losses


def make_target(
    guider: comfy.samplers.CFGGuider,
    options: UnifyOptions,
    tokens: Sequence[EditTokens],
    mask: torch.Tensor | None,
    layers: Layers,
    x: torch.Tensor,
    model_options: dict[str, Any],
    patchers: Sequence[ModelPatcher],
    checkpointing: bool,
) -> Target:
    """The target branch of the sampling of `x`, [rows, channels, height, width].

    guider: the host's, in a run.
    tokens: one for all rows, or one for each.
    mask: 1 in the edit region, [rows or 1, any height, any width], or None for the whole image.
    """
    return Target(
        model=guider.inner_model,
        entries=guider.conds["positive"],
        options=model_options,
        patchers=patchers,
        layers=layers,
        words=cache(lambda context: edit_words(tokens, context).to(x.device)),
        masks=layer_masks(mask, layers.words, *x.shape[-2:], x.device),
        regions=_regions(options.structure_region, mask, layers.structure, x),
        alignment=options.alignment,
        checkpointing=checkpointing,
    )


def _regions(
    region: str, mask: torch.Tensor | None, layers: Sequence[AttentionLayer], x: torch.Tensor
) -> dict[str, torch.Tensor] | None:
    """Where structure is kept; None for everywhere, as without a mask or with a mask of the whole image."""
    if region == "everywhere" or mask is None:
        return None
    whole = (mask >= 1).flatten(1).all(dim=1, keepdim=True)
    if bool(whole.all()):
        return None
    regions = layer_masks(mask, layers, *x.shape[-2:], x.device)
    if region == "inside":
        return regions
    whole = whole.to(x.device)
    return {key: torch.where(whole, 1, 1 - inside) for key, inside in regions.items()}
