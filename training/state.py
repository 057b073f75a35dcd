"""A training's state: on disk, and the average of its weights."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.files import replacing


class BrokenState(Exception):
    """A file that is not, or not wholly, a training's state."""


def write_state(path: Path, state: Any) -> None:
    """Write tensors and plain values. Raises OSError if that fails: what was at `path` is then still
    there.
    """
    try:
        with replacing(path) as part, part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the checkpoint {path.name} cannot be written ({error}): is the disk full? Checkpoints from "
            "before are still there"
        ) from error


def read_state(path: Path) -> Any:
    """What `write_state` wrote, on the CPU. Raises BrokenState for a file that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise BrokenState(f"{path.name} cannot be read as a checkpoint ({error})") from None


class MovingAverage:
    """Exponential moving average of weights, by name. It starts at the weights."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    def update(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        """average = decay * average + (1 - decay) * weight."""
        for name, weight in weights.items():
            self.values[name].lerp_(weight.detach(), 1 - decay)
