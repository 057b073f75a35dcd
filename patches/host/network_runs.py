"""Detects nodes that skip the network at some steps, for methods that need it at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

KEY = "descriptive_edit.network_runs"


def refuse_cached_steps(model: Any) -> None:
    """Raise ValueError if the MODEL has the host's EasyCache or LazyCache."""
    holder = model.model_options.get("transformer_options", {}).get("easycache")
    if holder is not None:
        name = getattr(holder, "name", "EasyCache")
        raise ValueError(
            f"the MODEL has {name}, which reuses earlier predictions, but every step here needs "
            "its own: take it out of the model's chain"
        )


class NetworkRuns:
    """Checks that the network runs for each prediction of a run, whatever other nodes do before it.

    If TorchCompileModel compiles the network, only its caller is watched: the graph of an earlier run is
    reused without regard to the wrappers around the network.
    """

    def __init__(self) -> None:
        self._ran = False

    def attach(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of `model_options` whose model calls are watched; the original is unchanged."""
        options = comfy.model_patcher.create_model_options_clone(model_options)
        where = WrappersMP.APPLY_MODEL if TORCH_COMPILE_KWARGS in options else WrappersMP.DIFFUSION_MODEL
        add_wrapper_with_key(where, KEY, self._note, options, is_model_options=True)
        return options

    def _note(self, executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._ran = True
        return executor(*args, **kwargs)

    def check(self) -> None:
        """After a prediction: raise ValueError if the network did not run for it."""
        if not self._ran:
            raise ValueError(
                "the network did not run at a step, but every step here needs its own "
                "prediction: take the node that skips steps (TeaCache, DeepCache, for some) out of the "
                "model's chain, or the time range that leaves no description for a step out of the "
                "conditioning"
            )
        self._ran = False
