"""Training attention bridges inside ComfyUI (DescriptiveEdit, arXiv 2508.20505)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import Image

from ..models.bridge import manage
from ..patches.bridge.apply import check_base
from ..pictures.plots import draw_curves
from ..training.objective import check_trainable
from ..training.settings import (
    DROPOUTS,
    DROPPED_IMAGES,
    PRECISIONS,
    Dropout,
    DroppedImage,
    Objective,
    Precision,
    TrainSettings,
)
from .bridge import BridgeType, keep_bridge
from .pairs import EditPairsType, inside_input
from .previews import show_images, show_text
from .saving import checked_name

if TYPE_CHECKING:  # what only a training needs is imported when there is one
    from ..training.cache import EncodedPairs
    from ..training.trainer import Trainer

CATEGORY = "descriptive edit/training"
ALIASES = ["2508.20505", "train bridge", "finetune", "edit pairs"]
PREVIEW_EVERY = 10
LEARNING_RATE = 1e-4  # for the short runs of this node; the paper's 1e-5 learns nothing visible in them


class DescEditEditPairs(io.ComfyNode):
    """Node: `training.pairs.read_folder`, encoded by `training.cache.encode_pairs`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditEditPairs",
            display_name="Edit Pairs from Folder",
            category=CATEGORY,
            description=(
                "Reads edit pairs from a folder in ComfyUI's input folder and encodes them once. Each pair "
                'has name_source.png, name_edit.png and name.json with {"source": text, "edit": text}. '
                "Encoded pairs stay in the temp folder until ComfyUI restarts. Pairs that cannot be read are "
                "left out and named; more than 1% of them, and at least two, are an error."
            ),
            search_aliases=[*ALIASES, "dataset"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the base model."),
                io.Clip.Input("clip", tooltip="The text encoder of the base model."),
                io.String.Input(
                    "folder", default="edit_pairs", tooltip="A folder in ComfyUI's input folder."
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Images are scaled and cropped to about resolution x resolution pixels, 64 to "
                    "2048, in the nearest aspect ratio from 1:2 to 2:1.",
                ),
            ],
            outputs=[EditPairsType.Output("pairs")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> list[tuple[str, float]]:
        files = sorted(_folder(folder).iterdir())
        return [(file.name, file.stat().st_mtime) for file in files]

    @classmethod
    def execute(cls, vae: Any, clip: Any, folder: str, resolution: int) -> io.NodeOutput:
        from ..training.cache import encode_pairs
        from ..training.pairs import read_folder

        path = _folder(folder)
        cache = Path(folder_paths.get_temp_directory()) / "edit_pairs"
        reading = read_folder(path, resolution, 64)
        bar = comfy.utils.ProgressBar(reading.total)
        pairs = encode_pairs(reading, vae, clip, cache, bar.update_absolute)
        left_out = [problem for _, problem in reading.bad]
        show_text("\n".join([f"{len(pairs)} pairs, {len(left_out)} left out", *left_out]))
        return io.NodeOutput(pairs)


def _folder(folder: str) -> Path:
    path = inside_input(folder)
    if not path.is_dir():
        raise ValueError(f"folder is {folder!r}, which is not in ComfyUI's input folder: make it there")
    return path


class DescEditTrainBridge(io.ComfyNode):
    """Node: `training.session.train_bridge`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = TrainSettings()
        return io.Schema(
            node_id="DescEditTrainBridge",
            display_name="Train Attention Bridge",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Trains a bridge on edit pairs. The model itself does not change. If the training stops "
                "early, for any reason, what was learned so far is saved in models/attention_bridges."
            ),
            search_aliases=["DescriptiveEdit attention bridge training", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="The base model. LoRAs on it are active during training."),
                BridgeType.Input("bridge", tooltip="The start: a new bridge, or one to train further."),
                EditPairsType.Input("pairs", tooltip="From Edit Pairs from Folder, with this model's VAE."),
                io.Int.Input(
                    "steps",
                    default=2000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps, 1 to 1,000,000. A few hundred pairs take about 2,000. The "
                    "authors train for 100,000.",
                ),
                io.Int.Input(
                    "batch",
                    default=default.batch,
                    min=1,
                    max=256,
                    tooltip="Pairs per forward, 1 to 256. More needs more memory.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=default.accumulate,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Forwards per step, 1 to 1024. Equals a batch that many times larger.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=LEARNING_RATE,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Learning rate of AdamW, 1e-8 to 1. 1e-4 for a run of some thousand steps; the "
                    "paper's 1e-5 needs about 100,000.",
                ),
                io.Combo.Input(
                    "dropout",
                    options=list(DROPOUTS),
                    advanced=True,
                    tooltip="paper: text and image are each dropped in 5% of the pairs. release: as in the "
                    "authors' code. none: never, so dual guidance is not trained.",
                ),
                io.Combo.Input(
                    "dropped_image",
                    options=list(DROPPED_IMAGES),
                    advanced=True,
                    tooltip="What a pair without image gets. off: no bridge, as in sampling. white: a white "
                    "reference.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    advanced=True,
                    tooltip="fp32, or bf16 or fp16 by autocast, which need less memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=default.seed,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Seed of the order of pairs and of the noise. The same seed gives the same "
                    "steps.",
                ),
                io.String.Input(
                    "name",
                    default="trained",
                    advanced=True,
                    tooltip="If the training stops early, the bridge is saved under this name and its "
                    "number of steps. A plain file name, without folder and extension.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=default.checkpointing,
                    optional=True,
                    advanced=True,
                    tooltip="Recomputes layers for their gradient instead of storing their activations: "
                    "slower, with much less memory. Same result.",
                ),
            ],
            outputs=[
                BridgeType.Output("bridge", tooltip="The trained bridge. The input bridge is unchanged."),
                io.Image.Output("plot", tooltip="The smoothed loss from the first step to the last."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        bridge: ModelPatcher,
        pairs: EncodedPairs,
        steps: int,
        batch: int,
        accumulate: int,
        learning_rate: float,
        dropout: Dropout,
        dropped_image: DroppedImage,
        precision: Precision,
        seed: int,
        name: str,
        checkpointing: bool = False,
    ) -> io.NodeOutput:
        from ..training.session import train_bridge

        stem = checked_name(name)
        check_base(model, bridge)
        check_trainable(model)
        settings = TrainSettings(
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            precision=precision,
            seed=seed,
            objective=Objective(dropout=dropout, dropped_image=dropped_image),
            checkpointing=checkpointing,
        )
        bar = comfy.utils.ProgressBar(steps)

        def show(trainer: Trainer) -> None:
            bar.update_absolute(trainer.step, steps, _preview(trainer))

        trainer = train_bridge(model, bridge, pairs, settings, steps, show, partial(_keep, stem))
        plot = _plot(trainer)
        return io.NodeOutput(manage(trainer.bridge), plot, ui=show_images(cls, plot))


def _keep(stem: str, trainer: Trainer) -> str:
    """Write what was learned, if anything was. Says where it is."""
    if not trainer.step:
        return "with nothing learned yet"
    try:
        return f"what was learned is kept as {keep_bridge(trainer.bridge, f'{stem}-step{trainer.step}')}"
    except OSError as error:
        return f"what was learned could not be kept ({error})"


def _plot(trainer: Trainer) -> torch.Tensor:
    """The losses, each the mean of a fiftieth of the run."""
    values = np.asarray(trainer.losses)
    window = max(1, len(values) // 50)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    smooth = smooth if len(smooth) > 1 else np.repeat(smooth, 2)
    return draw_curves({"loss": smooth.tolist()}, ends=("first step", f"step {trainer.step}"))


def _preview(trainer: Trainer) -> tuple | None:
    if trainer.step % PREVIEW_EVERY:
        return None
    picture = (_plot(trainer)[0].numpy() * 255).astype(np.uint8)
    return ("JPEG", Image.fromarray(picture), 512)


NODES = [DescEditEditPairs, DescEditTrainBridge]
