"""The methods of the studies: bridges, UnifyEdit, and the baselines that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

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

    def options(self) -> UnifyOptions:
        return UnifyOptions(structure_region=self.structure_region, update_target=self.update_target)


def unify(edits: Mapping[str, Edit]) -> StudioMethod:
    """UnifyEdit with settings by edit type."""
    edit, settings = partial(unify_by_type, edits=edits), f"unify {sorted(edits.items())}"
    return StudioMethod("UnifyEdit", edit, settings, types=tuple(edits))


def unify_by_type(tiny: Studio, batch: Batch, edits: Mapping[str, Edit]) -> torch.Tensor:
    """Latents in the order of the cases."""

    def make(edit_type: str, some: Batch) -> torch.Tensor:
        edit = edits[edit_type]
        if bool((some.mask >= 1).all()):  # a style has no outside
            edit = replace(edit, masked=False, structure_region="everywhere")
        return unify_latents(tiny, some, edit)

    return _each_type(batch, make)


def by_type(methods: Mapping[str, StudioMethod]) -> StudioMethod:
    """A method with settings by edit type."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        return _each_type(batch, lambda edit_type, some: methods[edit_type].edit(tiny, some))

    (name, *_) = {method.name for method in methods.values()}
    settings = {edit_type: method.settings for edit_type, method in sorted(methods.items())}
    return StudioMethod(name, edit, f"by type {settings}", types=tuple(methods))


def _each_type(batch: Batch, make: Callable[[str, Batch], torch.Tensor]) -> torch.Tensor:
    """Latents in the order of the cases. make: of an edit type and its cases."""
    made = torch.empty_like(batch.latent)
    types = [pair.edit_type for pair in batch.pairs]
    for edit_type in dict.fromkeys(types):
        numbers = [number for number, kind in enumerate(types) if kind == edit_type]
        made[numbers] = make(edit_type, batch.chosen(numbers))
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
        options=edit.options(),
    )
    guider = cfg_guider(tiny.model, batch.edit_text, batch.no_text, edit.cfg)
    start = torch.zeros_like(batch.latent)
    return sample(guider, start, start, sigmas, UnifySampler(settings))


def edit_tokens(tiny: Studio, batch: Batch) -> tuple[EditTokens, ...]:
    return tuple(_find_tokens(tiny.clip, pair.source_text, pair.edit_text) for pair in batch.pairs)


@cache
def _find_tokens(clip: Any, source: str, edit: str) -> EditTokens:
    return find_tokens(clip, source, edit)
