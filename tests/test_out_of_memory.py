"""No memory left in the middle of a run: what it says, what it lets go of, and that the next run is right."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import bridge_edit
import comfy.model_management
import pytest
import small_models
import torch
import unify_edit
from closeness import same
from host import Host


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@contextmanager
def no_memory(model: Any, call: int, phase: str) -> Generator[list[weakref.ref]]:
    """The UNet's `call`-th forward runs out of memory, or the `call`-th gradient from its middle; gives what
    was alive then.
    """
    alive: list[weakref.ref] = []
    calls = 0

    def fail(held: Any) -> None:
        nonlocal calls
        calls += 1
        alive.append(weakref.ref(held))
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.21 GiB.\nMore of it.")

    def watch(_: Any, __: Any, output: torch.Tensor) -> None:
        if phase == "forward":
            fail(output)
        elif output.requires_grad:
            output.register_hook(fail)

    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(watch)
    try:
        yield alive
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("node", "phase", "call"),
    [
        ("DescEditUnifySampler", "forward", 2),
        ("DescEditUnifySampler", "backward", 2),
        ("DescEditInvert", "forward", 3),
        ("DescEditApplyBridge", "forward", 1),
        ("DescEditApplyBridge", "forward", 3),
    ],
)
def test_a_run_without_memory(host: Host, model: Any, node: str, phase: str, call: int) -> None:
    """Protects: the message names the node and what to do, the host knows the error as one of memory, nothing
    that was computed is held by it, and the next run gives the same as if it had not been.
    """
    run: dict[str, Callable[[], torch.Tensor]] = {
        "DescEditInvert": lambda: unify_edit.Edit(host, model, steps=2).inversion.trajectory,
        "DescEditApplyBridge": lambda: bridge_edit.sample(host, patched),
        "DescEditUnifySampler": lambda: edit.run(),
    }
    edit = unify_edit.Edit(host, model, steps=2)
    bridge = bridge_edit.random_bridge(host, model)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9))
    expected = run[node]()
    state = small_models.fingerprint(model)
    with no_memory(model, call, phase) as alive, pytest.raises(torch.OutOfMemoryError) as raised:
        run[node]()
    assert comfy.model_management.is_oom(raised.value)
    title = host.node(node).GET_SCHEMA().display_name
    assert str(raised.value).startswith(f"{title}: no memory left: ")
    assert str(raised.value).endswith("(CUDA out of memory. Tried to allocate 1.21 GiB.)")
    assert len(alive) == call
    gc.collect()
    assert [held() for held in alive] == [None] * call
    assert small_models.fingerprint(model) == state
    comfy.model_management.unload_all_models()  # as the executor does
    assert same(run[node](), expected)  # where weights lie anew, a card's kernels may differ


def test_one_name(host: Host, model: Any) -> None:
    """Protects: with UnifyEdit on a model with a bridge, the error names what ran out of memory, once; and
    another error stays what it is.
    """
    module = host.pack_module("patches.host.out_of_memory")
    with (
        pytest.raises(module.OutOfMemory, match=r"^no memory left: less \(full\)$"),
        module.memory_advice("more"),
        module.memory_advice("less"),
    ):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(ValueError, match=r"^full$"), module.memory_advice("less"):
        raise ValueError("full")
