"""UnifyEdit and what it is compared with, as methods of the Tiny Studio's benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import comfy.samplers
import torch

from ...patches import inversion
from ...patches.unify.balance import Balance
from ...patches.unify.sampler import UnifySampler
from ...patches.unify.settings import UnifySettings
from ...patches.unify.tokens import EditTokens, find_tokens
from .tiny_benchmark import Cases, Studio, cfg_guider, conditioning, sample, sigmas


@dataclass(frozen=True)
class Edit:
    """How UnifyEdit is run. cfg: of the stock guider. denoise: the part of the noise levels that is inverted
    and sampled, 0 to 1, in `steps`. masked: whether the case's mask is given. mode: of the inversion.
    Everything else as in UnifySettings.
    """

    balance: Balance = field(default_factory=Balance)
    cfg: float = 3.0
    denoise: float = 1.0
    steps: int = 10
    masked: bool = False
    mode: str = "ddim"
    keep: str = UnifySettings.keep
    method: str = UnifySettings.method


_SHARED = {field.name for field in fields(UnifySettings)} & {field.name for field in fields(Edit)}


def unified(tiny: Studio, cases: Cases, edit: Edit) -> torch.Tensor:
    """UnifyEdit with one setting for all cases."""
    levels = sigmas(tiny, edit.denoise, edit.steps)
    source = conditioning(cases.source_text)
    if edit.mode == "virtual":
        path = inversion.invert_virtually(tiny.model, cases.latent, source, levels, seed=0)
    else:
        path = inversion.invert(tiny.model, cases.latent, source, levels, refine=1)
    settings = UnifySettings(
        path,
        tokens(tiny, cases),
        mask=cases.mask if edit.masked else None,
        **{name: getattr(edit, name) for name in _SHARED},
    )
    guider = cfg_guider(tiny.model, cases.edit_text, cases.no_text, edit.cfg)
    start = torch.zeros_like(cases.latent)
    return sample(guider, start, start, UnifySampler(settings), levels)


def unified_by_type(tiny: Studio, cases: Cases, edits: Mapping[str, Edit]) -> torch.Tensor:
    """UnifyEdit with settings for each edit type."""
    made = torch.empty_like(cases.latent)
    types = [pair.edit_type for pair in cases.pairs]
    for edit_type in dict.fromkeys(types):
        numbers = [number for number, kind in enumerate(types) if kind == edit_type]
        edit = edits[edit_type]
        if bool((cases.mask[numbers] >= 1).all()):  # a style has no outside
            edit = replace(edit, masked=False, keep="everywhere")
        # A guider leaves what it sampled on its own device.
        made[numbers] = unified(tiny, cases.chosen(numbers), edit)
    return made


def tokens(tiny: Studio, cases: Cases) -> tuple[EditTokens, ...]:
    return tuple(_tokens(tiny.clip, pair.source_text, pair.edit_text) for pair in cases.pairs)


@cache
def _tokens(clip: Any, source: str, edit: str) -> EditTokens:
    return find_tokens(clip, source, edit)


def injected(tiny: Studio, cases: Cases, cfg: float, self_share: float, cross_share: float) -> torch.Tensor:
    """Attention injection in the manner of prompt-to-prompt (arXiv 2208.01626): beside the target runs the
    source along its DDIM inversion, and for a share of the steps, 0 to 1, the target's self-attention has the
    source's queries and keys, and its cross-attention the source's queries, and the source's keys for the
    words that both descriptions have or that replace one another. For the study only.
    """
    levels, size = sigmas(tiny), len(cases)
    source = conditioning(cases.source_text)
    path = inversion.invert(tiny.model, cases.latent, source, levels, refine=1)
    partners = _partners(tokens(tiny, cases), cases.edit_text.shape[1])
    step = 0

    def targets(hidden: torch.Tensor, options: dict[str, Any]) -> list[int]:
        """Where the target's rows begin, in the parts of the batch that belong to the positive text."""
        return [2 * size * part + size for part, kind in enumerate(options["cond_or_uncond"]) if kind == 0]

    def inject_self(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
        if step < self_share * (len(levels) - 1):
            query, key = query.clone(), key.clone()
            for start in targets(query, options):
                query[start : start + size] = query[start - size : start]
                key[start : start + size] = key[start - size : start]
        return query, key, value

    def inject_cross(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
        if step < cross_share * (len(levels) - 1):
            query, key = query.clone(), key.clone()
            for start in targets(query, options):
                query[start : start + size] = query[start - size : start]
                both = torch.cat([key[start : start + size], key[start - size : start]], dim=1)
                key[start : start + size] = both.gather(
                    1, partners.to(key.device)[..., None].expand_as(cases.edit_text)
                )
        return query, key, value

    def inject(model: Callable, x: torch.Tensor, levels: torch.Tensor, extra_args: Any, **_: Any) -> Any:
        nonlocal step
        for step in range(len(levels) - 1):
            x = torch.cat([path.latent(step, x[:size]), x[size:]])
            denoised = model(x, levels[step].expand(len(x)), **extra_args)
            x = x + (x - denoised) / levels[step] * (levels[step + 1] - levels[step])
        return x

    model = tiny.model.clone()
    model.set_model_attn1_patch(inject_self)
    model.set_model_attn2_patch(inject_cross)
    guider = cfg_guider(
        model, torch.cat([cases.source_text, cases.edit_text]), torch.cat([cases.no_text] * 2), cfg
    )
    start = tiny.model.model.process_latent_out(path.trajectory[0].clone()).repeat(2, 1, 1, 1)
    made = sample(guider, torch.zeros_like(start), start, comfy.samplers.KSAMPLER(inject), levels)
    return made[size:]


def _partners(rows: tuple[EditTokens, ...], context: int) -> torch.Tensor:
    """[rows, context]: for each token of the edit description its place in (edit, source) laid end to end."""
    places = torch.arange(context).repeat(len(rows), 1)
    for row, found in enumerate(rows):
        replaced = [
            pair
            for word in found.words
            if len(word.tokens) == len(word.source_tokens)
            for pair in zip(word.tokens, word.source_tokens, strict=True)
        ]
        for new, old in [*found.alignment, *replaced]:
            places[row, new] = context + old
    return places
