"""Runs several conditioning entries, each with a latent of its own, in one recorded model call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_base import BaseModel

from .checks import check_call
from .recorder import AttentionRecorder, run_entries

_OWN_PARTS = ("control", "gligen", "hooks")  # of a conditioning entry


def record_together(
    model: BaseModel,
    recorder: AttentionRecorder,
    branches: Sequence[tuple[dict[str, Any], torch.Tensor]],
    sigma: torch.Tensor,
    options: dict[str, Any],
    own_grid: bool = False,
) -> None:
    """`record` of several conditioning entries in one model call, each with a latent of its own.

    The call has the layout of a stock one: a chunk of rows for each entry, with its index and uuid. Which
    entries can run together: `joinable`.

    branches: entries with uuids that differ, and their latents, each [rows, ...].
    """
    entries, x = [entry for entry, _ in branches], branches[0][1]
    if len(branches) > 1:
        x, options = x.detach(), _with_latents(options, {entry["uuid"]: own for entry, own in branches})
    run_entries(model, recorder, entries, x, sigma, options, own_grid)


def joinable(*entries: dict[str, Any]) -> bool:
    """Whether `record_together` can run these conditioning entries.

    Their texts must have one length, since the host repeats the shorter one, which halves its attention. And
    they must have nothing that the host computes from the latent outside of the model call (ControlNet,
    GLIGEN) or that gives them other weights (hooks).
    """
    texts = {entry["model_conds"]["c_crossattn"].cond.shape[1] for entry in entries}
    return len(texts) == 1 and not any(entry.get(name) for entry in entries for name in _OWN_PARTS)


def _with_latents(options: dict[str, Any], latents: Mapping[Hashable, torch.Tensor]) -> dict[str, Any]:
    """Model options whose calls run each entry on its own latent, before all that other nodes do there."""
    previous = options.get("model_function_wrapper")

    def call(apply_model: Callable, given: dict[str, Any]) -> torch.Tensor:
        uuids = given["c"]["transformer_options"]["uuids"]
        whole = torch.cat([latents[uuid] for uuid in uuids])
        check_call(given["input"], len(whole), whole.shape[-2:])
        given = {**given, "input": whole}
        if previous is not None:
            return previous(apply_model, given)
        return apply_model(given["input"], given["timestep"], **given["c"])

    return {**options, "model_function_wrapper": call}
