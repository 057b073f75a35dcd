"""The predictions of dual guidance in one batch, with each row as in a stock run for other packs.

The host numbers the rows of a call by their index in a list of conditionings, and packs read that number: 0
is the edit description, 1 the unconditional one. A row without the reference is a third entry in that list.
So its number is corrected before any pack reads it, at the two points that the host calls first:
`get_control` of a conditioning's ControlNet and `model_function_wrapper`. That the row does not see the
reference, which only a bridge needs to know, is passed along by the row's own uuid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import comfy.samplers
import torch
from comfy.model_base import BaseModel

from ..host.options import NAME, read_options
from .run import BLIND

_NAMESPACE = UUID("6f0c7c8e-5d0b-4e0e-9a2b-2d6c1f3b7a55")
Entries = list[dict[str, Any]]


class Row(NamedTuple):
    """One prediction: with or without the reference, with the edit description or the unconditional one."""

    image: bool
    text: bool


EDIT, UNCONDITIONAL = Row(True, True), Row(True, False)


def predict_rows(
    model: BaseModel,
    rows: list[Row],
    texts: dict[bool, Entries | None],
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: dict[str, Any],
) -> dict[Row, torch.Tensor]:
    """The denoised prediction of each of `rows`, in one batch if memory allows.

    rows: at most one of them without the reference.
    texts: the run's processed conditioning, by `Row.text`; None where no row needs it.
    x: [images, ...].
    sigma: [images].
    options: the call's model options, unchanged.

    A `sampler_calc_cond_batch_function` of another node gets pairs of both descriptions, as in a stock run. A
    row without the reference is a second call, with that row in its partner's position.
    """
    pair: list[Entries | None] = [texts[row.text] if row in rows else None for row in (EDIT, UNCONDITIONAL)]
    order = {EDIT: 0, UNCONDITIONAL: 1}
    own = options.get("sampler_calc_cond_batch_function")

    def run(conds: list[Any], options: dict[str, Any]) -> list[torch.Tensor]:
        if own is None:
            return comfy.samplers.calc_cond_batch(model, conds, x, sigma, options)
        return own({"conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": options})

    blind = next((row for row in rows if not row.image), None)
    if blind is None:
        found = run(pair, options)
    else:
        index = 0 if blind.text else 1
        known = texts[blind.text] or ()
        entries = [{**entry, "uuid": uuid5(_NAMESPACE, str(entry["uuid"]))} for entry in known]
        marks = _Marks(frozenset(entry["uuid"] for entry in entries), index)
        options = marks.attach(options)
        if own is not None:
            partner: list[Entries | None] = [texts[True], texts[False]]
            partner[index] = entries
            found = [*run(pair, options), run(marks.controlled(partner), options)[index]]
        else:
            found = run(marks.controlled([*pair, entries]), options)
        order[blind] = 2
    return {row: found[order[row]] for row in rows}


@dataclass(frozen=True, eq=False)
class _Marks:
    """The rows without the reference.

    uuids: of their conditioning entries.
    index: their number, instead of the host's.
    """

    uuids: frozenset[UUID]
    index: int

    def attach(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of model options whose calls carry these marks."""
        previous = options.get("model_function_wrapper")

        def call(apply_model: Callable, args: dict[str, Any]) -> torch.Tensor:
            conditions = args["c"]
            self.correct(conditions[NAME])
            if previous is None:
                return apply_model(args["input"], args["timestep"], **conditions)
            return previous(apply_model, {**args, "cond_or_uncond": conditions[NAME]["cond_or_uncond"][:]})

        return {**options, "model_function_wrapper": call, NAME: {**options.get(NAME, {}), BLIND: self.uuids}}

    def correct(self, options: dict[str, Any]) -> None:
        """Correct the numbers that the host has just written into one call's `transformer_options`."""
        numbered = zip(options["cond_or_uncond"], options["uuids"], strict=True)
        options["cond_or_uncond"] = [self.index if uuid in self.uuids else own for own, uuid in numbered]

    def controlled(self, conds: list[Entries | None]) -> list[Entries | None]:
        """The same conditionings, with ControlNets that read the corrected numbers.

        Rows that share a ControlNet share its wrapper, so that the host still batches them.
        """
        known: dict[int, _Control] = {}

        def stand_in(entry: dict[str, Any]) -> dict[str, Any]:
            if (control := entry.get("control")) is None:
                return entry
            return {**entry, "control": known.setdefault(id(control), _Control(control, self))}

        return [entries and [stand_in(entry) for entry in entries] for entries in conds]


class _Control:
    """Wraps a ControlNet in the conditionings of one call: corrects the numbers in `get_control`."""

    def __init__(self, control: Any, marks: _Marks) -> None:
        vars(self).update(_control=control, _marks=marks)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        self._marks.correct(read_options(args, kwargs))
        return self._control.get_control(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._control, name, value)
