"""Deterministic training loop: a step depends only on the settings, its index and the weights before.

Which pairs a step sees and what noise each gets follows from the seed and the step's index, so a run that
continues from its checkpoint takes the same steps as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..models.bridge import AttentionBridge
from ..patches.attention.networks import network_of
from ..patches.bridge.core import ReferenceCache
from ..patches.host.out_of_memory import OutOfMemory
from .cache import EncodedPairs
from .objective import check_objective, is_flow, losses, sample_noise
from .pairs import batches
from .settings import PRECISIONS, TrainSettings, optimiser_class
from .state import MovingAverage, read_state, write_state

FORWARDS = "forwards a step"
FORMAT = 3  # of checkpoints; those of another one are refused


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together.

    rank: of this process, from 0.
    world: number of processes.
    sum: function from a tensor to its sum over all of them, bit-identical in each.
    """

    rank: int = 0
    world: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


class Trainer:
    """Trains a bridge; nothing else changes.

    A step has `settings.accumulate` forwards in each process of the group. The forwards of a run are dealt to
    the processes in turn, so two processes take the steps of one that accumulates twice as much.

    model: the base model, on `device`.
    bridge: the trained bridge, on `device`.
    about: what else a run depends on, plain values by name; stored in its checkpoints.

    Raises ValueError for an objective that does not fit the model.
    """

    def __init__(
        self,
        model: BaseModel,
        bridge: AttentionBridge,
        pairs: EncodedPairs,
        settings: TrainSettings,
        device: torch.device | str,
        group: ProcessGroup | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.bridge, self.pairs, self.settings = model, bridge, pairs, settings
        self.device, self.group, self.about = torch.device(device), group or ProcessGroup(), dict(about or {})
        check_objective(model, settings.objective)
        self._network = network_of(model.diffusion_model)
        self.step = 0
        self.losses: list[float] = []
        self.gradient_norm = 0.0
        self.average = MovingAverage(bridge.state_dict() if settings.ema else {})
        self._weights = [weight.requires_grad_() for weight in bridge.parameters()]
        self._optimiser = optimiser_class(settings.optimiser)(
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        # Small gradients underflow in fp16, by autocast or by the model's own dtype.
        half = torch.float16 in (PRECISIONS[settings.precision], model.get_dtype_inference())
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run(
        self, steps: int, on_step: Callable[[], bool | None], keep: Callable[[], str], advice: str
    ) -> bool:
        """Train until `steps` steps are done in all. Returns whether they are.

        on_step: called after each step; if it returns True the run ends early.
        keep: called when an error or an interrupt stops the run. It saves what was learned so far and returns
        a text that says where. The error is then raised.
        advice: what to do if memory runs out.

        Raises OutOfMemory if memory runs out, else the error that stopped the run.
        """
        while self.step < steps:
            try:
                self.run_step()
                if on_step():
                    break
            except (Exception, comfy.model_management.InterruptProcessingException) as error:
                kept = keep()
                logging.warning("training stopped after step %d: %s", self.step, kept)
                if not comfy.model_management.is_oom(error):
                    raise
                reason = str(error).partition("\n")[0]
                raise OutOfMemory(
                    f"no memory left in step {self.step + 1}, {kept}. {advice} ({reason})"
                ) from None
        return self.step >= steps

    def run_step(self) -> float:
        """One optimiser step. Returns its mean loss over all processes.

        Raises FloatingPointError, naming the step, for a loss or gradient that is not finite, in all
        processes. The weights are then those before that step.
        """
        settings, group = self.settings, self.group
        forwards = settings.accumulate * group.world
        total = torch.zeros((), device=self.device)
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        for part in range(group.rank, forwards, group.world):
            loss = self.loss(self.step * forwards + part).mean() / forwards
            if loss.requires_grad:  # the bridge is not involved if every image is dropped
                self._scaler.scale(loss).backward()
            total += loss.detach()
        mean = float(self._over_all_processes(total))
        self._check_finite("loss", mean)
        self._scaler.unscale_(self._optimiser)
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self._weights, settings.clip))
        if not self._scaler.is_enabled():  # which skips such a step and lowers the scale
            self._check_finite("gradient", self.gradient_norm)
        for group_of_weights in self._optimiser.param_groups:
            group_of_weights["lr"] = settings.rate(self.step)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            self._check_finite("gradient", math.inf)
        self._optimiser.zero_grad(set_to_none=True)
        if settings.ema:
            self.average.update(self.bridge.state_dict(), settings.ema)
        self.step += 1
        self.losses.append(mean)
        return mean

    def _over_all_processes(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum of the loss over all processes; the gradients are replaced by their sums."""
        if self.group.world == 1:
            return loss
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        summed = self.group.sum(torch.cat([loss[None], parameters_to_vector(gradients)]))
        vector_to_parameters(summed[1:], gradients)
        return summed[0]

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._optimiser.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the {what} of step {self.step + 1} is {value}: the weights of the step before are kept. "
                "Lower the learning rate, or compute in bf16 or fp32, the model as well"
            )

    def loss(self, forward: int) -> torch.Tensor:
        """Each pair's loss in the run's forward of this index, [batch]."""
        settings = self.settings
        numbers = self._batch(forward)
        batch = self.pairs.batch(numbers, self.device, self.model.process_latent_in)
        seeds = [_seed(settings.seed, forward, row) for row in range(len(numbers))]
        schedule = None if is_flow(self.model) else len(self.model.model_sampling.sigmas)
        sample = sample_noise(settings.objective, seeds, batch.edit.shape[1:], schedule)
        dtype = PRECISIONS[settings.precision]
        # A cache of its own: a checkpointed forward reads it until its gradient is computed.
        cache = ReferenceCache(self.bridge, self._network)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return losses(self.model, cache, batch, sample, settings.objective, settings.checkpointing)

    def _batch(self, forward: int) -> list[int]:
        epoch, found = self._epoch
        length = len(found) or len(batches(self.pairs.sizes, self.settings.batch, self.settings.seed, 0))
        if forward // length != epoch:
            epoch = forward // length
            found = batches(self.pairs.sizes, self.settings.batch, self.settings.seed, epoch)
            self._epoch = epoch, found
        return found[forward % length]

    def learned(self, dtype: torch.dtype = torch.float32) -> AttentionBridge:
        """A copy of the bridge on the CPU, with its averaged weights if there are any."""
        copy = AttentionBridge(self.bridge.settings, dtype)
        copy.load_state_dict(self.average.values or self.bridge.state_dict())
        return copy

    def save(self, path: Path) -> None:
        """Save everything that a run needs to continue. Raises OSError, see `write_state`."""
        state = {
            "format": FORMAT,
            "identity": self._identity(),
            "bridge": self.bridge.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "losses": self.losses,
        }
        write_state(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises ValueError if it was made with other settings, naming them, or by another version of the pack,
        and BrokenState if it cannot be read.
        """
        state = read_state(path)
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{path.name} is a checkpoint of another version of the pack: continue with that version, or "
                "move the checkpoints away to start again"
            )
        mine, theirs = self._identity(), state["identity"]
        other = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
        if other:
            differences = "; ".join(
                f"{name} {theirs.get(name)} there, {mine.get(name)} here" for name in other
            )
            raise ValueError(f"{path.name} is a checkpoint of another configuration: {differences}")
        self.bridge.load_state_dict(state["bridge"])
        self._optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty if nothing was scaled
            self._scaler.load_state_dict(state["scaler"])
        self.average.values = {name: value.to(self.device) for name, value in state["average"].items()}
        self.step, self.losses = state["step"], state["losses"]

    def _identity(self) -> dict[str, Any]:
        """What makes a run what it is, by dotted names."""
        settings = asdict(self.settings)
        del settings["checkpointing"]
        settings[FORWARDS] = settings.pop("accumulate") * self.group.world
        return _flat(settings | self.about)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _seed(seed: int, forward: int, row: int) -> int:
    """A seed for one pair in one forward: the same wherever it is computed."""
    digest = hashlib.sha256(f"{seed} {forward} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
