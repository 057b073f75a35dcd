"""Runs the blocks of the host's DiTs through functions of ours, by the slots that the host has for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import Any

# From the block's arguments by name to its results by name.
RunBlock = Callable[[dict[str, Any]], dict[str, Any]]


def around_blocks(
    options: dict[str, Any],
    module: Any,
    run: Callable[[dict[str, Any], RunBlock], dict[str, Any]],
) -> dict[str, Any]:
    """A copy of a call's `transformer_options` in which `run` runs every block.

    module: a DiT of Flux's kind.
    run: gets the block's arguments and the block, another node's function in the slot around it. The block
        may also be called later, as often as needed.
    """
    replace = dict(options.get("patches_replace", {}))
    slots = replace["dit"] = dict(replace.get("dit", {}))
    for kind, blocks in (("double_block", module.double_blocks), ("single_block", module.single_blocks)):
        for slot in ((kind, number) for number in range(len(blocks))):
            slots[slot] = partial(_in_slot, run, slots.get(slot))
    return {**options, "patches_replace": replace}


def _in_slot(
    run: Callable[[dict[str, Any], RunBlock], dict[str, Any]],
    previous: Callable | None,
    args: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    block = _bound(extra["original_block"])
    if previous is None:
        return run(args, block)
    return run(args, lambda args: previous(args, {**extra, "original_block": block}))


def _bound(block: Any) -> Any:
    """The host's function for a block reads its loop's variables; this one keeps their present values."""
    if not isinstance(block, FunctionType):
        return block
    cells = tuple(CellType(cell.cell_contents) for cell in block.__closure__ or ())
    return FunctionType(block.__code__, block.__globals__, block.__name__, block.__defaults__, cells)
