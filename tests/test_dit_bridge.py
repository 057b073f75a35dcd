"""The attention bridge on DiTs of Flux's kind: its numbers at every layer, and what is read when."""

from __future__ import annotations

from typing import Any

import bridge_edit
import pytest
import small_dits
import small_models
import torch
from dit_formula import Blocks, Formula
from host import Host

FAMILIES = tuple(small_dits.FAMILIES)
CASES = [
    ("edit_queries", "linear", 0, False),
    ("edit_queries", "linear", 6, False),
    ("edit_queries", "linear", 6, True),
    ("edit_queries", "replace", 0, False),
    ("reference_queries", "linear", 0, False),
    ("reference_queries", "linear", 6, False),
    ("reference_queries", "add", 0, True),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks, by family."""
    return {name: small_dits.small_dit(name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("direction", "fusion", "fuse_rank", "self_bridge"), CASES)
def test_every_layer(
    host: Host,
    models: dict[str, Any],
    family: str,
    direction: str,
    fusion: str,
    fuse_rank: int,
    self_bridge: bool,
) -> None:
    """Protects: at every block, the image's tokens get Z + strength F(Z') before the output projection, in
    both rows of a step, with the direction's q, k and v, both sides rotated by the same positions; the
    reference's get what the network gives them, or pass the bridge where it was trained so.
    """
    model = models[family]
    bridge = bridge_edit.random_bridge(
        host,
        model,
        direction=direction,
        fusion=fusion,
        fuse_rank=fuse_rank,
        reference_self_bridge=self_bridge,
    )
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model), strength=0.7)
    with Blocks(model) as seen:
        bridge_edit.sample(host, patched, steps=1)
    side = 16 // model.model.diffusion_model.patch_size
    assert len(seen.calls) == 5
    for key, (reference, call) in seen.calls.items():
        formula = Formula(model, bridge, key)
        grid = formula.grid(side, side)
        pair = (call, reference) if direction == "edit_queries" else (reference, call)
        answer = formula.bridged(pair[0], grid, pair[1], grid)
        own = formula.own(call, grid)
        _close(call.result, own + 0.7 * formula.change(own, answer))
        if self_bridge:
            own, answer = formula.own(reference, grid), formula.bridged(reference, grid, reference, grid)
            _close(reference.result, own + formula.change(own, answer))
        elif reference.result is not None:
            _close(reference.result, formula.own(reference, grid))


def _close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal to what float32 can hold."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
