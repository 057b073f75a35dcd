"""UnifyEdit's target branch: the sampled latent, run with the edit description for its gradients."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention.layers import AttentionLayer
from ..attention.masks import layer_masks
from ..attention.projections import Projections
from ..attention.recorder import (
    AttentionRecorder,
    LossGradient,
    active_entry,
    loss_gradients,
    whole_image,
)
from ..attention.together import joinable, record_together
from ..host.autograd import Aliases, differentiable_options, gradients, naming_writes, weights_streamed
from ..host.checkpointing import checkpointed
from .balance import row_norm
from .losses import LEAST, alignment_loss, structure_loss
from .memory import MemoryPlan
from .plan import Layers
from .settings import UnifyOptions
from .source import Reading, Source
from .tokens import EditTokens
from .trace import LOSSES
from .words import Words, edit_words


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of both losses at one latent.

    structure, alignment: [rows, channels, height, width], float32; zero for a loss without a weight.
    values: [4, rows], as in a Trace.
    least: the least value of the alignment loss.
    reordered: to be checked after the run by `check_order`.
    mixed: the same by `check_apart`.
    """

    structure: torch.Tensor
    alignment: torch.Tensor
    values: torch.Tensor
    least: float
    reordered: list[tuple[str, torch.Tensor]]
    mixed: list[torch.Tensor]

    def excess(self, name: str) -> torch.Tensor:
        """How far a loss is above its least value, [rows]; 0 for one without a weight."""
        value = self.values[LOSSES.index(name)]
        return torch.where(value.isnan(), 0.0, value - (self.least if name == "alignment" else 0.0))


@dataclass(frozen=True, eq=False)
class Target:
    """The target branch of one sampling.

    source: the source branch.
    entries: the edit description as the model takes it.
    twins: the same with uuids of their own, for a second row of the target.
    options: the model options of every call.
    patchers: the models that a call runs.
    words: the edit's words by the number of tokens in the context, and how far they are moved in it.
    masks: the edit mask at each layer for words, [rows or 1, places].
    regions: where structure is kept at each layer for it, [rows or 1, places]; None for everywhere.
    alignment: form of the alignment loss.
    checkpointing: whether layers are computed again in the backward pass.
    joined: whether all rows of a step run together.
    aliases: of the model's weights.
    """

    model: BaseModel
    source: Source
    entries: list[dict[str, Any]]
    twins: list[dict[str, Any]]
    options: dict[str, Any]
    patchers: Sequence[ModelPatcher]
    layers: Layers
    words: Callable[[int, int], Words]
    masks: Mapping[str, torch.Tensor]
    regions: Mapping[str, torch.Tensor] | None
    alignment: str
    checkpointing: bool
    joined: bool
    aliases: Aliases = field(default_factory=Aliases)

    def gradients(self, x: torch.Tensor, sigma: float, reading: Reading, words: bool) -> Gradients | None:
        """Both losses' gradients at the latent `x`; None if there is nothing to differentiate.

        x: [rows, channels, height, width].
        reading: the source at this step, with layers if structure has a weight. It is read here.
        words: whether alignment has a weight.

        Joined, the source and a copy of the target for each loss run in one forward, and one backward pass
        gives both gradients. Else the source runs by itself, and the target's forward has a backward pass for
        each loss.
        """
        wanted = [name for name, weight in zip(LOSSES, (reading.layers, words), strict=True) if weight]
        entry = active_entry(self.entries, sigma)
        if entry is None or not wanted:
            return None
        levels, source = x.new_full((len(x),), sigma), reading.entry if reading.unread else None
        joined = self.joined and joinable(*(found for found in (entry, source) if found is not None))
        if source is not None and not joined:
            self.source.read(reading, levels)
        with naming_writes(), gradients(weights_streamed(self.patchers), self.aliases):
            targets = [entry, active_entry(self.twins, sigma)][: len(wanted) if joined else 1]
            branches = [(target, x.clone().requires_grad_()) for target in targets if target is not None]
            if source is not None and joined:
                branches.append((source, reading.latent.clone().requires_grad_()))
            recorder = self._record(branches, levels, bool(reading.layers), words)
            try:
                if source is not None and joined:
                    attention, _ = recorder.branch(source["uuid"])
                    reading.attention = {key: found.detach() for key, found in attention.items()}
                losses = self._losses(recorder, branches, reading.attention, wanted)
                values, found, rest = _differentiate(losses, [latent for _, latent in branches], joined)
            finally:
                recorder.clear()
        self.aliases.drop_unused()
        nothing = x.new_full((len(x),), torch.nan)
        norms = {name: row_norm(gradient).flatten() for name, gradient in found.items()}
        return Gradients(
            *(found.get(name, torch.zeros_like(x)) for name in LOSSES),
            torch.stack([part.get(name, nothing).detach() for part in (values, norms) for name in LOSSES]),
            LEAST[self.alignment],
            recorder.moved,
            [(gradient.abs() > 0).any() for gradient in rest if gradient is not None],
        )

    def _record(
        self,
        branches: Sequence[tuple[dict[str, Any], torch.Tensor]],
        sigma: torch.Tensor,
        structure: bool,
        words: bool,
    ) -> AttentionRecorder:
        """One forward of these entries, up to the last layer that is read."""
        options = differentiable_options(self.options)
        if self.checkpointing:
            options["transformer_options"] = checkpointed(
                options["transformer_options"], self.layers.network.module
            )
        recorder = AttentionRecorder(
            self.layers.network,
            self.layers.structure if structure else (),
            self.layers.words if words else (),
            stop=True,
            whole_layers=self.checkpointing,
            branches=[entry["uuid"] for entry, _ in branches],
        )
        record_together(self.model, recorder, branches, sigma, options, self.regions is not None)
        return recorder

    def _losses(
        self,
        recorder: AttentionRecorder,
        branches: Sequence[tuple[dict[str, Any], torch.Tensor]],
        reference: Mapping[str, Projections],
        wanted: Sequence[str],
    ) -> dict[str, Callable[[], LossGradient]]:
        """The wanted losses, each of its own branch if there are enough; none is taken yet."""
        targets = [recorder.branch(entry["uuid"]) for entry, _ in branches]
        losses = {}
        for number, name in enumerate(wanted):
            own, across = targets[min(number, len(targets) - 1)]
            if name == "structure":
                losses[name] = partial(structure_loss, reference, own, self.regions)
            else:
                context = next(iter(across.values())).columns
                words = self.words(context, self.layers.network.text_offset(branches[0][0]))
                losses[name] = partial(alignment_loss, across, words, self.masks, self.alignment)
        return losses


def _differentiate(
    losses: Mapping[str, Callable[[], LossGradient]], latents: Sequence[torch.Tensor], joined: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Values of the losses, their gradients, and what they make of the other latents, which must be 0.

    joined: each loss has its own of `latents`, in their order; else all have the first, and each is taken
    only when the one before it is done with.
    """
    values, found = {}, {}
    if joined:
        taken = [take() for take in losses.values()]
        values = {name: loss.values for name, loss in zip(losses, taken, strict=True)}
        gradients = loss_gradients(taken, latents)
        return values, dict(zip(losses, gradients, strict=False)), gradients[len(losses) :]
    for number, (name, take) in enumerate(losses.items(), start=1):
        loss = take()
        values[name] = loss.values
        (found[name],) = loss_gradients([loss], latents[:1], keep_graph=number < len(losses))
    return values, found, []


def make_target(
    guider: comfy.samplers.CFGGuider,
    source: Source,
    options: UnifyOptions,
    tokens: Sequence[EditTokens],
    mask: torch.Tensor | None,
    layers: Layers,
    x: torch.Tensor,
    model_options: dict[str, Any],
    patchers: Sequence[ModelPatcher],
    memory: MemoryPlan,
) -> Target:
    """The target branch of the sampling of `x`, [rows, channels, height, width].

    guider: the host's, in a run.
    tokens: one for all rows, or one for each.
    mask: 1 in the edit region, [rows or 1, any height, any width], or None for the whole image.
    """
    entries = guider.conds["positive"]
    words = cache(lambda context, offset: edit_words(tokens, context, offset).to(x.device))
    if layers.words:
        for entry in whole_image(entries):  # now, so that no step waits for them
            context = entry["model_conds"]["c_crossattn"].cond.shape[1]
            words(context, layers.network.text_offset(entry))
    return Target(
        model=guider.inner_model,
        source=source,
        entries=entries,
        twins=[{**entry, "uuid": uuid.uuid4()} for entry in entries],
        options=model_options,
        patchers=patchers,
        layers=layers,
        words=words,
        masks=layer_masks(mask, layers.words, *x.shape[-2:], x.device),
        regions=_regions(options.structure_region, mask, layers.structure, x),
        alignment=options.alignment,
        checkpointing=memory.checkpointing,
        joined=memory.joined,
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
    outside = {id(inside): torch.where(whole, 1, 1 - inside) for inside in regions.values()}
    return {key: outside[id(inside)] for key, inside in regions.items()}
