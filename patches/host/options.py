"""Reads and replaces the options of model calls."""

from __future__ import annotations

from typing import Any

NAME = "transformer_options"


def read_options(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's `transformer_options`: by name, or else the last positional argument, as in the host's
    APPLY_MODEL and DIFFUSION_MODEL wrappers.
    """
    return kwargs[NAME] if NAME in kwargs else args[-1]


def replace_options(
    args: tuple, kwargs: dict[str, Any], options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The same call with other `transformer_options`."""
    if NAME in kwargs:
        return args, {**kwargs, NAME: options}
    return (*args[:-1], options), kwargs


def one_device(model_options: dict[str, Any]) -> dict[str, Any]:
    """The same model options for calls that stay on the sampling's own device, even if it uses several."""
    return {name: value for name, value in model_options.items() if name != "multigpu_clones"}
