"""Adds an attention bridge to a model through the host's ModelPatcher.

The patched model holds no tensors beyond its inputs and no patches in the attention slots. One wrapper around
the sampling reads the reference once and frees it at the end. One around each model call puts the bridge into
the slots during that call, around the patches of other nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...models.bridge import BridgeSettings
from ..attention.layers import AttentionLayer
from ..attention.networks import Network, network_of
from ..host.inputs import read_samples
from ..host.options import read_options, replace_options
from ..host.out_of_memory import memory_advice
from .core import Door
from .run import KEY, BridgeRun, BridgeSetup

ADVICE = "sample a smaller image or fewer at a time, or give fewer references"


def apply_bridge(model: ModelPatcher, setup: BridgeSetup, door: Door | None = None) -> ModelPatcher:
    """A clone of `model` that samples with the bridge.

    door: context that is entered around this pack's own code in every run.

    Raises ValueError if the network is not supported, has a bridge already or does not fit this one, and if
    the reference is empty or not a latent of the model.
    """
    network = check_base(model, setup.bridge)
    if has_bridge(model):
        raise ValueError(
            "this MODEL has a bridge already. Two bridges do not add up: apply one, or wire the "
            "references to one node as a batch and choose to join them"
        )
    setup = replace(setup, reference=read_samples("reference", setup.reference, model))
    if torch.count_nonzero(setup.reference) == 0:
        raise ValueError("reference is an empty latent: encode the source image with VAEEncode")
    patched, door = model.clone(), door or nullcontext()
    if setup.strength == 0 or (setup.mask is not None and not bool(setup.mask.any())):
        return patched
    patched.set_additional_models(KEY, [setup.bridge.clone()])
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, _Prepare(setup, tuple(network.layers.values()))),
        (WrappersMP.SAMPLER_SAMPLE, _Sample(setup, door)),
        (WrappersMP.CALC_COND_BATCH, _note_areas),
        (WrappersMP.APPLY_MODEL, _ApplyModel(door)),
    ):
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def has_bridge(model: ModelPatcher) -> bool:
    """Whether a bridge is on this model."""
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, KEY))


def check_base(model: ModelPatcher, bridge: ModelPatcher) -> Network:
    """The model's network. Raises ValueError unless the ATTENTION_BRIDGE was made for its kind and shape."""
    network = network_of(model.model.diffusion_model)
    settings, family = bridge.model.settings, type(model.model.model_config)
    found = BridgeSettings(family.__name__, network.widths)
    if dict(settings.widths) != dict(found.widths) or settings.base not in _relatives(family):
        raise ValueError(
            f"the bridge is for {settings.shape()}, but the MODEL is {found.shape()}: load the "
            "model that the bridge was trained for"
        )
    return network


def _relatives(family: Any) -> set[str]:
    """The names of a model family, and of those that it is derived from and shares its latents with."""
    latents = family.latent_format
    return {base.__name__ for base in family.__mro__ if getattr(base, "latent_format", None) is latents}


def cache_elements(setup: BridgeSetup, layers: Iterable[AttentionLayer], seen: int) -> int:
    """Number of values that a run keeps: K and V, or Q, of the reference, and the bridge's weights.

    seen: how many conditionings see the reference. If each image has its own, features are repeated for all.
    """
    settings, images, (height, width) = setup.settings, len(setup.reference), setup.reference.shape[-2:]
    kept = 2 if settings.direction == "edit_queries" else 1
    rows = images if images == 1 or setup.joined else images * (1 + seen)
    # With the reference's own bridge, updates for it and for the image.
    again = 4 * settings.rank if settings.reference_self_bridge else 0
    total = settings.parameters()
    for layer in layers:
        total += layer.width * (kept * rows * math.prod(layer.grid(height, width)) + again)
        # A merged output in place of less. A full F is as large.
        if not settings.joint and (settings.fusion != "linear" or settings.fuse_rank):
            total += layer.width * layer.width
    return total


@dataclass(frozen=True, eq=False)
class _Prepare:
    """PREPARE_SAMPLING: requests memory for the cache from the host, in rows of the latent, its unit."""

    setup: BridgeSetup
    layers: tuple[AttentionLayer, ...]

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        model, noise_shape, conds, *rest = args
        elements = cache_elements(self.setup, self.layers, sum(map(len, conds.values())))
        row = model.model.memory_required([1, *noise_shape[1:]])
        size = torch.empty((), dtype=model.model.get_dtype_inference()).element_size()
        rows = math.ceil(elements * size / row)
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], conds, *rest, **kwargs)


@dataclass(frozen=True, eq=False)
class _Sample:
    """SAMPLER_SAMPLE: reads the reference when the models are loaded, and always frees it."""

    setup: BridgeSetup
    door: Door

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        with self.door:
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
            run = BridgeRun(self.setup, guider, noise, sigmas, self.door)
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
    """CALC_COND_BATCH: tells the run which part of the latent each conditioning's model call covers."""
    _, conds, _, _, model_options = args
    if run := model_options["transformer_options"].get(KEY):
        run.note_areas(conds)
    return executor(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _ApplyModel:
    """APPLY_MODEL: puts the bridge into the attention slots for one model call."""

    door: Door

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        options = read_options(args, kwargs)
        run = options.get(KEY)
        with self.door:
            if run is None:
                raise ValueError(
                    "another node calls the model outside of a sampling, where no reference was read (one "
                    "that trains it, for one): wire the MODEL from before this node into it, and apply the "
                    "bridge after it"
                )
            run.cache.network.check_conditions(kwargs)
            patches = run.patches(options, args[0])
            args, kwargs = replace_options(args, kwargs, patches.install(options))
        output = executor(*args, **kwargs)
        with self.door:
            run.check_fired(patches, options)
        return output
