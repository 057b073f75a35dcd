"""The training loop: steps that depend on nothing but the settings, their number and the weights before.

Which pairs a step sees and what is drawn for each follows from the seed and the step's number alone, so a run
that was stopped and goes on from its checkpoint takes the same steps as one that was not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.bridge import AttentionBridge
from ..patches.bridge_core import Bank
from .cache import EncodedPairs
from .objective import Objective, draw, losses
from .pairs import batches

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainSettings:
    """batch: pairs a forward. accumulate: forwards a step. learning_rate, weight_decay: AdamW's. clip:
    largest norm of the gradient. precision: `fp32`, or `bf16` or `fp16` by autocast. ema: decay of the
    weights' moving average, 0 for none. seed: of order and noise. The defaults are the paper's, where it
    says.

    Raises ValueError for settings that cannot be.
    """

    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "fp32"
    ema: float = 0.0
    seed: int = 42
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r} but must be one of {', '.join(PRECISIONS)}")
        positive = {name: getattr(self, name) for name in ("batch", "accumulate", "learning_rate", "clip")}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} is {value} but must be above 0")
        if not 0 <= self.ema < 1 or self.weight_decay < 0:
            raise ValueError(f"ema is {self.ema} and weight_decay {self.weight_decay}, which cannot be")


class Trainer:
    """Learns `bridge` for the host's BaseModel `model` on `pairs`; only the bridge's weights change.

    Raises ValueError if there are too few pairs for a batch, and FloatingPointError, naming the step, for a
    loss that is not finite: the weights are then those before that step.
    """

    def __init__(
        self, model: Any, bridge: AttentionBridge, pairs: EncodedPairs, settings: TrainSettings, device: Any
    ) -> None:
        self.model, self.bridge, self.pairs, self.settings = model, bridge, pairs, settings
        self.device = torch.device(device)
        self.step = 0
        self.losses: list[float] = []
        self._bank = Bank(bridge, model.diffusion_model)
        self._weights = [weight.requires_grad_() for weight in bridge.parameters()]
        self._optimiser = torch.optim.AdamW(
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self._average = [weight.detach().clone() for weight in self._weights] if settings.ema else []
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run_step(self) -> float:
        """One optimiser step; returns its mean loss."""
        settings = self.settings
        total = 0.0
        for part in range(settings.accumulate):
            place = self.step * settings.accumulate + part
            loss = self.loss(place).mean() / settings.accumulate
            self._scaler.scale(loss).backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            self._optimiser.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the loss of step {self.step + 1} is {total}: the weights of the step before are kept. "
                "Lower the learning rate, or use bf16 or fp32"
            )
        self._scaler.unscale_(self._optimiser)
        torch.nn.utils.clip_grad_norm_(self._weights, settings.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad(set_to_none=True)
        for average, weight in zip(self._average, self._weights, strict=False):
            average.lerp_(weight.detach(), 1 - settings.ema)
        self.step += 1
        self.losses.append(total)
        return total

    def loss(self, place: int) -> torch.Tensor:
        """Each pair's loss in the `place`-th forward of the run, [batch]."""
        settings = self.settings
        numbers = self._batch(place)
        batch = self.pairs.batch(numbers, self.device, self.model.process_latent_in)
        seeds = [_seed(settings.seed, place, row) for row in range(len(numbers))]
        schedule = len(self.model.model_sampling.sigmas)
        draws = draw(settings.objective, seeds, batch.edit.shape[1:], schedule)
        dtype = PRECISIONS[settings.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return losses(self.model, self._bank, batch, draws, settings.objective)

    def _batch(self, place: int) -> list[int]:
        epoch, found = self._epoch
        length = len(found) or len(batches(self.pairs.sizes, self.settings.batch, self.settings.seed, 0))
        if place // length != epoch:
            epoch = place // length
            found = batches(self.pairs.sizes, self.settings.batch, self.settings.seed, epoch)
            self._epoch = epoch, found
        return found[place % length]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The bridge with its averaged weights, if there are any, for as long as this lasts."""
        learned = [weight.detach().clone() for weight in self._weights] if self._average else []
        try:
            self._set(self._average)
            yield
        finally:
            self._set(learned)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=False):
            weight.copy_(value)

    def save(self, path: Path) -> None:
        """Everything that a run needs to go on, beside `path` first and then into place."""
        state = {
            "settings": asdict(self.settings),
            "bridge": self.bridge.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self._average,
            "step": self.step,
            "losses": self.losses,
        }
        part = path.with_name(path.name + ".part")
        try:
            torch.save(state, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError if it was made with other settings, naming them."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine, theirs = asdict(self.settings), state["settings"]
        other = sorted(name for name in mine if mine[name] != theirs.get(name))
        if other:
            differences = "; ".join(f"{name} {theirs.get(name)} there, {mine[name]} here" for name in other)
            raise ValueError(f"{path.name} is a checkpoint of another configuration: {differences}")
        self.bridge.load_state_dict(state["bridge"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        self._average = state["average"]
        self.step, self.losses = state["step"], state["losses"]


def _seed(seed: int, place: int, row: int) -> int:
    """A seed for one pair in one forward: the same wherever it is computed."""
    return (seed * 1_000_003 + place) * 65_537 + row
