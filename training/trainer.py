"""The training loop: steps that depend on nothing but the settings, their number and the weights before.

Which pairs a step sees and what is drawn for each follows from the seed and the step's number alone, so a run
that was stopped and goes on from its checkpoint takes the same steps as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..models.bridge import AttentionBridge
from ..models.files import replacing
from ..patches.bridge.core import Bank
from .cache import EncodedPairs
from .objective import draw, losses
from .pairs import batches
from .settings import PRECISIONS, TrainSettings, optimiser_class

FORWARDS = "forwards a step"
# How a pair's random numbers follow from the seed; a checkpoint goes on with the rule that it was made with.
FIRST_DRAWS, DRAWS = 1, 2


@dataclass(frozen=True)
class Team:
    """The processes that learn together. rank: this one's number of `world`. total: from a tensor to its sum
    over all of them, the same to the last bit in each.
    """

    rank: int = 0
    world: int = 1
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


class BrokenCheckpoint(Exception):
    """A file that is not, or not wholly, a checkpoint."""


class Trainer:
    """Learns `bridge` for the host's BaseModel `model` on `pairs`; only the bridge's weights change.

    A step has `accumulate` forwards in each process of `team`, and the forwards of a run are dealt to the
    processes in turn: two of them take the steps of one that accumulates twice as much. about: what else a
    run depends on, plain values by name, kept in its checkpoints.

    Raises ValueError if there are too few pairs for a batch, and FloatingPointError, naming the step, for a
    loss or gradient that is not finite, in every process alike: the weights are then those before that step.
    """

    def __init__(
        self,
        model: Any,
        bridge: AttentionBridge,
        pairs: EncodedPairs,
        settings: TrainSettings,
        device: Any,
        team: Team | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.bridge, self.pairs, self.settings = model, bridge, pairs, settings
        self.device, self.team, self.about = torch.device(device), team or Team(), dict(about or {})
        self.step = 0
        self.losses: list[float] = []
        self.gradient_norm = 0.0
        self._weights = [weight.requires_grad_() for weight in bridge.parameters()]
        self._optimiser = optimiser_class(settings.optimiser)(
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        # Small gradients are zero in fp16, whether autocast or the model's own type brings it in.
        half = torch.float16 in (PRECISIONS[settings.precision], model.get_dtype_inference())
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self._draws = DRAWS
        self._average = [weight.detach().clone() for weight in self._weights] if settings.ema else []
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run_step(self) -> float:
        """One optimiser step; returns its mean loss over all processes."""
        settings, team = self.settings, self.team
        forwards = settings.accumulate * team.world
        total = torch.zeros((), device=self.device)
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        for part in range(team.rank, forwards, team.world):
            loss = self.loss(self.step * forwards + part).mean() / forwards
            if loss.requires_grad:  # the bridge has no part in it where every image is dropped
                self._scaler.scale(loss).backward()
            total += loss.detach()
        mean = float(self._over_all_processes(total))
        self._check_finite("loss", mean)
        self._scaler.unscale_(self._optimiser)
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self._weights, settings.clip))
        if not self._scaler.is_enabled():  # which leaves such a step out and scales less
            self._check_finite("gradient", self.gradient_norm)
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            self._check_finite("gradient", math.inf)
        self._optimiser.zero_grad(set_to_none=True)
        for average, weight in zip(self._average, self._weights, strict=False):
            average.lerp_(weight.detach(), 1 - settings.ema)
        self.step += 1
        self.losses.append(mean)
        return mean

    def _over_all_processes(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum of the loss; the gradients become their sums."""
        if self.team.world == 1:
            return loss
        gradients = [weight.grad for weight in self._weights]
        summed = self.team.total(torch.cat([loss[None], parameters_to_vector(gradients)]))
        vector_to_parameters(summed[1:], gradients)
        return summed[0]

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._optimiser.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the {what} of step {self.step + 1} is {value}: the weights of the step before are kept. "
                "Lower the learning rate, or compute in bf16 or fp32, the model as well"
            )

    def loss(self, place: int) -> torch.Tensor:
        """Each pair's loss in the `place`-th forward of the run, [batch]."""
        settings = self.settings
        numbers = self._batch(place)
        batch = self.pairs.batch(numbers, self.device, self.model.process_latent_in)
        seeds = [_seed(self._draws, settings.seed, place, row) for row in range(len(numbers))]
        schedule = len(self.model.model_sampling.sigmas)
        draws = draw(settings.objective, seeds, batch.edit.shape[1:], schedule)
        dtype = PRECISIONS[settings.precision]
        # A bank of its own: a checkpointed forward reads it until its gradient is computed.
        bank = Bank(self.bridge, self.model.diffusion_model)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return losses(self.model, bank, batch, draws, settings.objective, settings.checkpointing)

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
        """Everything that a run needs to go on, beside `path` first and then into place. Raises OSError if
        it cannot be written; what was at `path` before is then still there.
        """
        state = {
            "settings": self._identity(),
            "about": self.about,
            "bridge": self.bridge.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self._average,
            "draws": self._draws,
            "step": self.step,
            "losses": self.losses,
        }
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

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError if it was made with other settings, naming them, and
        BrokenCheckpoint if it cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise BrokenCheckpoint(f"{path.name} cannot be read as a checkpoint ({error})") from None
        mine = _flat(self._identity() | self.about)
        theirs = _flat(asdict(TrainSettings())) | _flat(state["settings"]) | _flat(state.get("about", {}))
        theirs.setdefault(FORWARDS, theirs["accumulate"])
        other = sorted(name for name in mine if mine[name] != theirs.get(name))
        if other:
            differences = "; ".join(f"{name} {theirs.get(name)} there, {mine[name]} here" for name in other)
            raise ValueError(f"{path.name} is a checkpoint of another configuration: {differences}")
        draws = state.get("draws", FIRST_DRAWS)
        if draws > DRAWS:
            raise ValueError(f"{path.name} is a checkpoint of a newer version of the pack: update the pack")
        self._draws = draws
        self.bridge.load_state_dict(state["bridge"])
        self._optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty where nothing was scaled
            self._scaler.load_state_dict(state["scaler"])
        self._average = [average.to(self.device) for average in state["average"]]
        self.step, self.losses = state["step"], state["losses"]

    def _identity(self) -> dict[str, Any]:
        """The settings that make a run what it is."""
        settings = asdict(self.settings)
        del settings["checkpointing"]
        settings[FORWARDS] = settings.pop("accumulate") * self.team.world
        return settings


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _seed(draws: int, seed: int, place: int, row: int) -> int:
    """A seed for one pair in one forward: the same wherever it is computed. draws: the rule."""
    if draws == FIRST_DRAWS:  # which knew no seed that led beyond 64 bits
        return ((seed * 1_000_003 + place) * 65_537 + row) % 2**64
    digest = hashlib.sha256(f"{seed} {place} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
