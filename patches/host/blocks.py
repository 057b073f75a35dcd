"""Runs the blocks of the host's DiTs through functions of ours, by the slots that the host has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch

# From the block's arguments by name to its results by name.
RunBlock = Callable[[dict[str, Any]], dict[str, Any]]
# A block's slot in the host's `patches_replace["dit"]`: its kind and number.
Slot = tuple[str, int]
# The lists of blocks in the host's DiTs, in the order in which they run, and the kind in their slots.
_LISTS = {
    "double_blocks": "double_block",
    "single_blocks": "single_block",
    "joint_blocks": "double_block",
    "transformer_blocks": "double_block",
}


def blocks_of(module: Any) -> Iterator[tuple[Slot, str, torch.nn.Module]]:
    """The blocks of a DiT in the order in which they run: slot, path in the module tree, and module."""
    for name, kind in _LISTS.items():
        for number, block in enumerate(getattr(module, name, ())):
            yield (kind, number), f"{name}.{number}", block


def around_blocks(
    options: dict[str, Any],
    module: Any,
    run: Callable[[dict[str, Any], RunBlock], dict[str, Any]],
) -> dict[str, Any]:
    """A copy of a call's `transformer_options` in which `run` runs every block.

    module: the host's DiT.
    run: gets the block's arguments and the block, another node's function in the slot around it. The block
        may also be called later, as often as needed.
    """
    return _in_slots(options, module, lambda slot, previous: partial(_around, run, previous))


def inside_blocks(
    options: dict[str, Any],
    module: Any,
    run: Callable[[Slot, dict[str, Any], RunBlock], dict[str, Any]],
) -> dict[str, Any]:
    """The same, with `run` inside of another node's function in the slot. It also gets the slot."""
    return _in_slots(options, module, lambda slot, previous: partial(_inside, partial(run, slot), previous))


def _in_slots(
    options: dict[str, Any], module: Any, make: Callable[[Slot, Callable | None], Callable]
) -> dict[str, Any]:
    replace = dict(options.get("patches_replace", {}))
    slots = replace["dit"] = dict(replace.get("dit", {}))
    for slot, *_ in blocks_of(module):
        slots[slot] = make(slot, slots.get(slot))
    return {**options, "patches_replace": replace}


def _around(
    run: Callable[[dict[str, Any], RunBlock], dict[str, Any]],
    previous: Callable | None,
    args: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    block = _bound(extra["original_block"])
    if previous is None:
        return run(args, block)
    return run(args, lambda args: previous(args, {**extra, "original_block": block}))


@torch.compiler.disable(recursive=False)
def _inside(
    run: Callable[[dict[str, Any], RunBlock], dict[str, Any]],
    previous: Callable | None,
    args: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    block = _bound(extra["original_block"])

    def own(args: dict[str, Any]) -> dict[str, Any]:
        return run(args, block)

    return own(args) if previous is None else previous(args, {**extra, "original_block": own})


def _bound(block: Any) -> Any:
    """The host's function for a block reads its loop's variables; this one keeps their present values."""
    if not isinstance(block, FunctionType):
        return block
    cells = tuple(CellType(cell.cell_contents) for cell in block.__closure__ or ())
    return FunctionType(block.__code__, block.__globals__, block.__name__, block.__defaults__, cells)
