"""Training inside a running ComfyUI, on a MODEL and with memory that the host manages."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..models.bridge import AttentionBridge
from ..patches.host.autograd import gradients, weights_streamed
from .cache import EncodedPairs
from .memory import training_bytes
from .settings import TrainSettings
from .trainer import Trainer

ADVICE = (
    "Lower batch and raise accumulate, switch checkpointing on, or encode the pairs at a lower resolution"
)


def train_bridge(
    model: ModelPatcher,
    bridge: ModelPatcher,
    pairs: EncodedPairs,
    settings: TrainSettings,
    steps: int,
    on_step: Callable[[Trainer], None],
    keep: Callable[[Trainer], str],
) -> Trainer:
    """Train a copy of `bridge` on `model`. Returns the trainer with it, the copy moved off the GPU.

    bridge: an ATTENTION_BRIDGE for this model.
    on_step, keep: as in `Trainer.run`.

    Raises what `Trainer.run` raises.
    """
    streamed = model.is_dynamic()
    _load(model, training_bytes(model.model, bridge.model, settings, pairs.sizes, streamed))
    if not streamed and weights_streamed([model]):  # known of such a model from what did not fit
        streamed = True
        _load(model, training_bytes(model.model, bridge.model, settings, pairs.sizes, streamed))
    with gradients(streamed):
        learned = AttentionBridge(bridge.model.settings, torch.float32, model.load_device)
        learned.load_state_dict(bridge.model.state_dict())
        trainer = Trainer(model.model, learned, pairs, settings, model.load_device)
        trainer.run(steps, lambda: on_step(trainer), lambda: keep(trainer), ADVICE)
        learned.to(comfy.model_management.unet_offload_device())
    return trainer


def _load(model: ModelPatcher, needed: int) -> None:
    comfy.model_management.load_models_gpu([model], memory_required=needed)
