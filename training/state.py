"""Saves and loads a training state, and averages weights."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.files import replacing


class BrokenState(Exception):
    """A file that is not a complete training state."""


def write_state(path: Path, state: Any) -> None:
    """Write tensors and plain values.

    Raises OSError if that fails; the old file at `path` is then unchanged.
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
    """Exponential moving average of weights, by name, initialised with the weights."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    def update(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        """average = decay * average + (1 - decay) * weight."""
        for name, weight in weights.items():
            self.values[name].lerp_(weight.detach(), 1 - decay)
