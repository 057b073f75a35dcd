"""The methods of the studies: bridges, UnifyEdit, and the baselines that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.samplers
import torch

from ...models.bridge_file import load_bridge
from ...patches import inversion
from ...patches.bridge.apply import apply_bridge
from ...patches.bridge.guidance import DualGuidance, DualGuider
from ...patches.bridge.run import BridgeSetup
from ...patches.unify.balance import Balance
from ...patches.unify.sampler import UnifySampler
from ...patches.unify.settings import UnifyOptions, UnifySettings
from ...patches.unify.tokens import EditTokens, find_tokens
from .studio import Batch, Studio, StudioMethod, cfg_guider, conditioning, sample, schedule

TEXT_CFG = 3.0  # chosen on the tuning cases


def text_only(cfg: float = TEXT_CFG) -> StudioMethod:
    """The edit description alone, from each case's own noise."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        guider = cfg_guider(tiny.model, batch.edit_text, batch.no_text, cfg)
        return sample(guider, batch.noise, torch.zeros_like(batch.latent), schedule(tiny))

    return StudioMethod("text only", edit, f"text only {cfg}")


def image_to_image(denoise: float) -> StudioMethod:
    """The source with noise of strength `denoise`, sampled with the edit description."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        guider = cfg_guider(tiny.model, batch.edit_text, batch.no_text, TEXT_CFG)
        return sample(guider, batch.noise, batch.latent, schedule(tiny, denoise))

    return StudioMethod("image to image", edit, f"image to image {denoise} {TEXT_CFG}")


def inverted(cfg: float) -> StudioMethod:
    """The DDIM inversion of the source, sampled with the edit description."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        sigmas = schedule(tiny)
        path = inversion.invert(tiny.model, batch.latent, conditioning(batch.source_text), sigmas, refine=1)
        start = tiny.model.model.process_latent_out(path.trajectory[0].clone())
        guider = cfg_guider(tiny.model, batch.edit_text, batch.no_text, cfg)
        return sample(guider, torch.zeros_like(start), start, sigmas)

    return StudioMethod("DDIM inversion", edit, f"inverted {cfg}")


def bridged(file: Path, guidance: DualGuidance, instruction: bool = False) -> StudioMethod:
    """Dual guidance with a bridge, from each case's own noise.

    instruction: use the instruction instead of the description.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        setup = BridgeSetup(load_bridge(file), batch.latent, conditioning(batch.source_text))
        guider = DualGuider(apply_bridge(tiny.model, setup), guidance)
        text = batch.instruction if instruction else batch.edit_text
        guider.set_conds(conditioning(text), conditioning(batch.no_text))
        return sample(guider, batch.noise, torch.zeros_like(batch.latent), schedule(tiny))

    return StudioMethod("bridge", edit, f"bridge {guidance} {instruction}", (file,))


@dataclass(frozen=True)
class Edit:
    """Settings of UnifyEdit.

    cfg: of the stock guider.
    denoise: the part of the noise levels that is inverted and sampled, 0 to 1.
    masked: whether the case's mask is used.
    mode: of the inversion.

    All others as in UnifyOptions.
    """

    balance: Balance = field(default_factory=Balance)
    cfg: float = 3.0
    denoise: float = 1.0
    steps: int = 10
    masked: bool = False
    mode: str = "ddim"
    structure_region: str = "everywhere"
    update_target: str = UnifyOptions.update_target


def unify(edits: Mapping[str, Edit]) -> StudioMethod:
    """UnifyEdit with settings for each edit type."""
    return StudioMethod("UnifyEdit", partial(unify_by_type, edits=edits), f"unify {sorted(edits.items())}")


def unify_by_type(tiny: Studio, batch: Batch, edits: Mapping[str, Edit]) -> torch.Tensor:
    """Latents in the order of the cases."""
    made = torch.empty_like(batch.latent)
    types = [pair.edit_type for pair in batch.pairs]
    for edit_type in dict.fromkeys(types):
        numbers = [number for number, kind in enumerate(types) if kind == edit_type]
        edit = edits[edit_type]
        if bool((batch.mask[numbers] >= 1).all()):  # a style has no outside
            edit = replace(edit, masked=False, structure_region="everywhere")
        made[numbers] = unify_latents(tiny, batch.chosen(numbers), edit)
    return made


def unify_latents(tiny: Studio, batch: Batch, edit: Edit) -> torch.Tensor:
    """UnifyEdit with one setting for all cases."""
    sigmas = schedule(tiny, edit.denoise, edit.steps)
    source = conditioning(batch.source_text)
    if edit.mode == "virtual":
        path = inversion.invert_virtually(tiny.model, batch.latent, source, sigmas, seed=0)
    else:
        path = inversion.invert(tiny.model, batch.latent, source, sigmas, refine=1)
    settings = UnifySettings(
        inversion=path,
        edit_tokens=edit_tokens(tiny, batch),
        balance=edit.balance,
        mask=batch.mask if edit.masked else None,
        options=UnifyOptions(structure_region=edit.structure_region, update_target=edit.update_target),
    )
    guider = cfg_guider(tiny.model, batch.edit_text, batch.no_text, edit.cfg)
    start = torch.zeros_like(batch.latent)
    return sample(guider, start, start, sigmas, UnifySampler(settings))


def edit_tokens(tiny: Studio, batch: Batch) -> tuple[EditTokens, ...]:
    return tuple(_find_tokens(tiny.clip, pair.source_text, pair.edit_text) for pair in batch.pairs)


@cache
def _find_tokens(clip: Any, source: str, edit: str) -> EditTokens:
    return find_tokens(clip, source, edit)


def injected(cfg: float, self_fraction: float, cross_fraction: float) -> StudioMethod:
    """Attention injection in the manner of prompt-to-prompt (arXiv 2208.01626).

    The source runs beside the target along its DDIM inversion. For a fraction of the steps, 0 to 1, the
    target's self-attention gets the queries and keys of the source. Its cross-attention gets the queries of
    the source, and its keys for the words that both descriptions have or that replace one another.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        sigmas, size = schedule(tiny), len(batch)
        source = conditioning(batch.source_text)
        path = inversion.invert(tiny.model, batch.latent, source, sigmas, refine=1)
        partners = _partners(edit_tokens(tiny, batch), batch.edit_text.shape[1])[..., None]
        step = 0

        def targets(options: Mapping[str, Any]) -> list[slice]:
            """The target's rows in each part with the positive text; the source's rows are before them."""
            starts = [
                2 * size * part + size for part, kind in enumerate(options["cond_or_uncond"]) if not kind
            ]
            return [slice(start, start + size) for start in starts]

        def sources(rows: slice) -> slice:
            return slice(rows.start - size, rows.start)

        def inject_self(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
            if step < self_fraction * (len(sigmas) - 1):
                query, key = query.clone(), key.clone()
                for rows in targets(options):
                    query[rows], key[rows] = query[sources(rows)], key[sources(rows)]
            return query, key, value

        def inject_cross(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
            if step < cross_fraction * (len(sigmas) - 1):
                query, key = query.clone(), key.clone()
                for rows in targets(options):
                    query[rows] = query[sources(rows)]
                    both = torch.cat([key[rows], key[sources(rows)]], dim=1)
                    key[rows] = both.gather(1, partners.to(key.device).expand_as(batch.edit_text))
            return query, key, value

        def inject(model: Callable, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> Any:
            nonlocal step
            for step in range(len(sigmas) - 1):
                x = torch.cat([path.latent(step, x[:size]), x[size:]])
                denoised = model(x, sigmas[step].expand(len(x)), **extra_args)
                x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
            return x

        model = tiny.model.clone()
        model.set_model_attn1_patch(inject_self)
        model.set_model_attn2_patch(inject_cross)
        positive = torch.cat([batch.source_text, batch.edit_text])
        guider = cfg_guider(model, positive, torch.cat([batch.no_text] * 2), cfg)
        start = tiny.model.model.process_latent_out(path.trajectory[0].clone()).repeat(2, 1, 1, 1)
        sampler = comfy.samplers.KSAMPLER(inject)
        return sample(guider, torch.zeros_like(start), start, sigmas, sampler)[size:]

    return StudioMethod("attention injection", edit, f"injected {cfg:g} {self_fraction} {cross_fraction}")


def _partners(found: tuple[EditTokens, ...], context: int) -> torch.Tensor:
    """[rows, context]: for each token of the edit description its index in edit and source tokens joined."""
    indices = torch.arange(context).repeat(len(found), 1)
    for row, tokens in enumerate(found):
        replaced = [
            pair
            for word in tokens.words
            if len(word.tokens) == len(word.source_tokens)
            for pair in zip(word.tokens, word.source_tokens, strict=True)
        ]
        for new, old in [*tokens.alignment, *replaced]:
            indices[row, new] = context + old
    return indices
