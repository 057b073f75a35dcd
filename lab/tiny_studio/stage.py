"""Shared by the Tiny Studio's trainings: a loop that resumes from its checkpoint, and the optimisers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ...training.settings import optimiser_class
from ...training.state import MovingAverage, read_state, write_state

LOG_EVERY = 100  # steps
SAVE_EVERY = 120  # seconds


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def learning_rate(step: int, steps: int, warm: int = 100) -> float:
    """Fraction of the peak rate: linear warm-up, then a cosine down to 2%."""
    if step < warm:
        return (step + 1) / warm
    along = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.02 + 0.49 * (1 + math.cos(math.pi * along))


def muon_and_adamw(
    module: torch.nn.Module, muon_rate: float, adam_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and convolutions, AdamW for the rest.

    With equal time on two cores this is well ahead of AdamW alone.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inner = [
        p for name, p in named if p.ndim in (2, 4) and min(p.shape[:2]) >= 32 and "embedding" not in name
    ]
    views = [torch.nn.Parameter(p.data.view(len(p), -1)) for p in inner]  # Muon takes matrices only
    outer = [p for _, p in named if id(p) not in {id(p) for p in inner}]
    muon = optimiser_class("muon")(views, lr=muon_rate, weight_decay=0.0)

    def take_gradients(*_: object) -> None:
        for view, parameter in zip(views, inner, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)

    muon.register_step_pre_hook(take_gradients)
    return [muon, torch.optim.AdamW(outer, lr=adam_rate, betas=(0.9, 0.99), weight_decay=0.0)]


class Stage:
    """The training of one network, which resumes from its checkpoint.

    path: of the checkpoint.
    optimisers: at their peak rates.
    decay: of the weights' moving average, 0 for none; its memory is short at the start.
    """

    def __init__(
        self,
        path: Path,
        model: torch.nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
        decay: float = 0.0,
    ) -> None:
        self.path, self.model, self.optimisers, self.decay = path, model, optimisers, decay
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
        self.average = MovingAverage(model.state_dict() if decay else {})
        self.step = 0
        if path.exists():
            state = read_state(path)
            model.load_state_dict(state["model"])
            for optimiser, values in zip(optimisers, state["optimiser"], strict=True):
                optimiser.load_state_dict(values)
            self.step = state["step"]
            values = state["average"].items()
            self.average.values = {name: value.to(self.average.values[name].device) for name, value in values}

    def run(
        self,
        steps: int,
        losses: Callable[[], Iterable[torch.Tensor]],
        rate: Callable[[int, int], float] = learning_rate,
    ) -> None:
        """Train until `steps` steps are done in all, and save.

        losses: function that returns the loss of a new batch, and values that are only logged.
        rate: fraction of the peak rates at a step of all steps.
        """
        begin = saved = time.monotonic()
        first, values = self.step, []
        while self.step < steps:
            loss, *more = losses()
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
                optimiser.param_groups[0]["lr"] = peak * rate(self.step, steps)
                optimiser.step()
            self.step += 1
            if self.decay:
                decay = min(self.decay, self.step / (self.step + 10))
                self.average.update(self.model.state_dict(), decay)
            values.append(torch.stack([loss, *more]).detach())
            if self.step % LOG_EVERY == 0:
                means = ", ".join(f"{mean:.4f}" for mean in torch.stack(values).mean(0).tolist())
                values.clear()
                left = (steps - self.step) * (time.monotonic() - begin) / (self.step - first) / 60
                say(f"{self.path.stem} {self.step}/{steps} loss {means}, {left:.0f} min left")
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.values,
            "optimiser": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
        }
        write_state(self.path, state)
