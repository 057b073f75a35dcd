"""The training loop: steps that depend on nothing but the settings, their number and the weights before.

Which pairs a step sees and what is drawn for each follows from the seed and the step's number alone, so a run
that was stopped and goes on from its checkpoint takes the same steps as one that was not.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..models.bridge import AttentionBridge
from ..patches.bridge_core import Bank
from .cache import EncodedPairs
from .objective import Objective, draw, losses
from .pairs import batches

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMISERS = {
    "adamw": torch.optim.AdamW,
    # Its steps then have the size of AdamW's, and so has the rate that suits it.
    "muon": partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
}
FORWARDS = "forwards a step"


@dataclass(frozen=True)
class TrainSettings:
    """How a bridge is trained; the defaults are the paper's, where it says.

    batch: pairs a forward. accumulate: forwards a step. optimiser: `adamw` or `muon`. learning_rate,
    weight_decay: the optimiser's. decay: the number of steps over which the rate falls to zero along half a
    cosine, to start again from its peak (SGDR, arXiv 1608.03983); 0 for a constant rate. clip: largest norm
    of the gradient. precision: `fp32`, or `bf16` or `fp16` by autocast. ema: decay of the weights' moving
    average, 0 for none. seed: of order and noise. objective: what is learned. checkpointing: compute layers
    again for their gradient instead of keeping what they need for it, which takes much less memory.

    Raises ValueError for settings that cannot be.
    """

    batch: int = 4
    accumulate: int = 1
    optimiser: str = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    decay: int = 0
    clip: float = 1.0
    precision: str = "fp32"
    ema: float = 0.0
    seed: int = 42
    objective: Objective = field(default_factory=Objective)
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("precision", PRECISIONS), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {', '.join(allowed)}")
        positive = {name: getattr(self, name) for name in ("batch", "accumulate", "learning_rate", "clip")}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} is {value} but must be above 0")
        if not 0 <= self.ema < 1 or self.weight_decay < 0 or self.decay < 0:
            raise ValueError(
                f"ema is {self.ema}, weight_decay {self.weight_decay} and decay {self.decay}, but ema must "
                "be 0 or more and below 1, and the others 0 or more"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if not self.decay:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step % self.decay) / self.decay)) / 2


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
        self._optimiser = OPTIMISERS[settings.optimiser](
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
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
                "Lower the learning rate, or use bf16 or fp32"
            )

    def loss(self, place: int) -> torch.Tensor:
        """Each pair's loss in the `place`-th forward of the run, [batch]."""
        settings = self.settings
        numbers = self._batch(place)
        batch = self.pairs.batch(numbers, self.device, self.model.process_latent_in)
        seeds = [_seed(settings.seed, place, row) for row in range(len(numbers))]
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
            "step": self.step,
            "losses": self.losses,
        }
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"the checkpoint {path.name} cannot be written ({error}): is the disk full? Checkpoints from "
                "before are still there"
            ) from error
        finally:
            part.unlink(missing_ok=True)

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
        self.bridge.load_state_dict(state["bridge"])
        self._optimiser.load_state_dict(state["optimiser"])
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


def _seed(seed: int, place: int, row: int) -> int:
    """A seed for one pair in one forward: the same wherever it is computed."""
    return (seed * 1_000_003 + place) * 65_537 + row
