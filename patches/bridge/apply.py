"""Putting an attention bridge into a model: what the node sets up, and the host's doors it uses.

The patched model holds no tensors beyond its inputs and no patches in the attention slots. One wrapper around
the sampling reads the reference once and frees it at the end; one around each model call puts the bridge into
the slots for the length of that call, around whatever other nodes have put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...models.bridge import BridgeSettings, widths_of
from ...models.sites import Site, find_sites
from ..host.inputs import read_mask, read_samples
from ..host.options import read_options, replace_options
from ..host.out_of_memory import memory_advice
from .run import KEY, BridgeRun, BridgeSetup

ADVICE = "sample a smaller image or fewer at a time, or give fewer references"


def apply_bridge(model: Any, setup: BridgeSetup, door: AbstractContextManager[Any] | None = None) -> Any:
    """A clone of `model` (a ModelPatcher) that samples with the bridge. door: entered in every run.

    Raises ValueError, for a model that is not a UNet, that has a bridge already or that the
    bridge was not made for, and for a reference, strength, range or mask that cannot be used.
    """
    check_base(model, setup.bridge)
    if has_bridge(model):
        raise ValueError(
            "this MODEL has a bridge already. Two bridges do not add up: apply one, or wire the "
            "references to one node as a batch and choose to join them"
        )
    setup = _checked(model, setup)
    patched = model.clone()
    if setup.strength == 0 or (setup.mask is not None and not bool(setup.mask.any())):
        return patched
    patched.set_additional_models(KEY, [setup.bridge.clone()])
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, _Prepare(setup)),
        (WrappersMP.SAMPLER_SAMPLE, _Sample(setup, door or nullcontext())),
        (WrappersMP.CALC_COND_BATCH, _note_areas),
        (WrappersMP.APPLY_MODEL, _ApplyModel(door or nullcontext())),
    ):
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def has_bridge(model: Any) -> bool:
    """Whether a bridge is on this ModelPatcher."""
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, KEY))


def check_base(model: Any, bridge: Any) -> None:
    """Raise ValueError, unless the ATTENTION_BRIDGE was made for this MODEL's family and
    shape.
    """
    sites = find_sites(model.model.diffusion_model)
    settings, family = bridge.model.settings, type(model.model.model_config)
    found = BridgeSettings(family.__name__, widths_of(sites))
    names = {base.__name__ for base in family.__mro__}
    if dict(settings.widths) != dict(found.widths) or settings.base not in names:
        raise ValueError(
            f"the bridge is for {settings.shape()}, but the MODEL is {found.shape()}: load the "
            "model that the bridge was trained for"
        )


def _checked(model: Any, setup: BridgeSetup) -> BridgeSetup:
    """`setup` with its reference and mask in the form that a run takes."""
    setup = replace(
        setup,
        reference=read_samples("reference", setup.reference, model),
        mask=None if setup.mask is None else read_mask("mask", setup.mask),
    )
    if torch.count_nonzero(setup.reference) == 0:
        raise ValueError("reference is an empty latent: encode the source image with VAEEncode")
    if not math.isfinite(setup.strength):
        raise ValueError(f"strength is {setup.strength} but must be a finite number")
    if not 0 <= setup.start < setup.end <= 1:
        raise ValueError(
            f"start_percent is {setup.start} and end_percent {setup.end}, but they must rise within 0 to 1"
        )
    if setup.source is not None and (
        len(setup.source) != 1 or not {"area", "mask"}.isdisjoint(setup.source[0][1])
    ):
        raise ValueError(
            f"source must be one description of the whole reference, but it has {len(setup.source)} "
            "entries or an area or mask: wire a plain CLIPTextEncode"
        )
    if setup.joined and setup.settings.direction != "edit_queries":
        raise ValueError(
            f"several references can be joined only for a bridge with the direction edit_queries; "
            f"this one has {setup.settings.direction}"
        )
    return setup


@dataclass(frozen=True, eq=False)
class _Prepare:
    """PREPARE_SAMPLING: asks the host for the memory of the bank, in rows of the latent, its unit."""

    setup: BridgeSetup

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        model, noise_shape, *rest = args
        row = model.model.memory_required([1, *noise_shape[1:]])
        size = torch.empty((), dtype=model.model.get_dtype_inference()).element_size()
        sites = find_sites(model.model.diffusion_model)
        rows = math.ceil(bank_elements(self.setup, sites) * size / row)
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], *rest, **kwargs)


def bank_elements(setup: BridgeSetup, sites: tuple[Site, ...]) -> int:
    """How many numbers a run keeps: K and V, or Q, of the reference, and the merged output matrices."""
    images, _, height, width = setup.reference.shape
    kept = 2 if setup.settings.direction == "edit_queries" else 1
    merged = 1 if setup.settings.fusion == "linear" else 0
    return sum(
        site.width * (kept * images * math.prod(site.grid(height, width)) + merged * site.width)
        for site in sites
    )


@dataclass(frozen=True, eq=False)
class _Sample:
    """SAMPLER_SAMPLE: reads the reference when the models are loaded, and frees it whatever happens."""

    setup: BridgeSetup
    door: AbstractContextManager[Any]

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        with self.door:
            return self._sample(executor, *args, **kwargs)

    def _sample(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        if comfy.model_management.in_training:
            raise ValueError(
                "another node trains this MODEL (Train LoRA, for one), and the reference, read once "
                "before, would not follow what is learned: wire the MODEL from before this node into the "
                "training, and apply the bridge to the trained MODEL"
            )
        guider, sigmas, extra_args, _, noise, *_ = args
        if "multigpu_clones" in extra_args["model_options"]:
            raise ValueError(
                "the sampling is spread over several GPUs (MultiGPU CFG Split), but what a bridge "
                "keeps of the reference is on one: take that node out of the model's chain"
            )
        run = BridgeRun(self.setup, guider, noise, sigmas)
        extra_args["model_options"]["transformer_options"][KEY] = run
        try:
            with memory_advice(ADVICE):
                run.read_reference()
                result = executor(*args, **kwargs)
            run.finish()
            return result
        finally:
            run.close()


def _note_areas(executor: Callable, *args: Any, **kwargs: Any) -> Any:
    """CALC_COND_BATCH: tells the run which part of the latent each conditioning's model call will see."""
    _, conds, _, _, model_options = args
    if run := model_options["transformer_options"].get(KEY):
        run.note_areas(conds)
    return executor(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _ApplyModel:
    """APPLY_MODEL: the bridge in the attention slots of one model call."""

    door: AbstractContextManager[Any]

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        options = read_options(args, kwargs)
        run = options.get(KEY)
        if run is None:
            with self.door:
                raise ValueError(
                    "another node calls the model outside of a sampling, where no reference was read (one "
                    "that trains it, for one): wire the MODEL from before this node into it, and apply the "
                    "bridge after it"
                )
        with self.door:
            feeding = run.feeding(options, args[0])
            args, kwargs = replace_options(args, kwargs, feeding.install(options))
        output = executor(*args, **kwargs)
        with self.door:
            run.check_fired(feeding, options)
        return output
