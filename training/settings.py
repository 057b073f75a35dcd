"""How a bridge is trained, in values: what the node's inputs and a configuration's `train` part say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from .objective import Objective

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMISERS = ("adamw", "muon")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class TrainSettings:
    """How a bridge is trained; the defaults are the paper's, where it says.

    batch: pairs a forward. accumulate: forwards a step. optimiser: `adamw` or `muon`. learning_rate,
    weight_decay: the optimiser's. decay: the number of steps over which the rate falls to zero along half a
    cosine, to start again from its peak (SGDR, arXiv 1608.03983); 0 for a constant rate. clip: largest norm
    of the gradient. precision: `fp32`, or `bf16` or `fp16` by autocast. ema: decay of the weights' moving
    average, 0 for none. seed: of order and noise, 0 to 2**64 - 1. objective: what is learned. checkpointing:
    compute layers again for their gradient instead of keeping what they need for it, which takes much less
    memory.

    Raises ValueError for settings that cannot be, and for an optimiser that this torch does not have.
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
        optimiser_class(self.optimiser)
        positive = {name: getattr(self, name) for name in ("batch", "accumulate", "learning_rate", "clip")}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} is {value} but must be above 0")
        if not 0 <= self.ema < 1 or self.weight_decay < 0 or self.decay < 0:
            raise ValueError(
                f"ema is {self.ema}, weight_decay {self.weight_decay} and decay {self.decay}, but ema must "
                "be 0 or more and below 1, and the others 0 or more"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed is {self.seed} but must be 0 to {LARGEST_SEED}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if not self.decay:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step % self.decay) / self.decay)) / 2


def optimiser_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimiser of a name from its weights, `lr` and `weight_decay`. Raises ValueError if this
    torch does not have it.
    """
    if name == "adamw":
        return torch.optim.AdamW
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ValueError(
            f"optimiser is 'muon', which needs torch 2.9 or newer, but this is {torch.__version__}: update "
            "torch, or take adamw"
        )
    # Its steps then have the size of AdamW's, and so has the rate that suits it.
    return partial(muon, adjust_lr_fn="match_rms_adamw")
