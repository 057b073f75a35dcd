"""Speed and memory: on a card by the card's own counters, else by the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host import Host


@pytest.fixture
def measuring(host: Host) -> Any:
    """The module."""
    return host.pack_module("lab.bench.measuring")


def test_a_card(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: on a card the clock is read after it has finished, memory is its allocator's peak in
    that run, models are float16, attention stays the host's choice, and the results name the card.
    """
    card = torch.device("cuda", 0)
    done: list[str] = []
    monkeypatch.setattr(measuring.comfy.model_management, "get_torch_device", lambda: card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 17 * len(done))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(done.count("wait")))
    assert measuring.now() == 1.0
    assert measuring.peak_memory(lambda: done.append("run")) == 17 * 3
    assert done == ["wait", "reset", "run"]
    assert measuring.dtype() == torch.float16
    assert measuring.on_card() == {"card": "A card"}
    model = type("Model", (), {"model_options": {"transformer_options": {}}})
    measuring.choose_attention(model)
    assert model.model_options == {"transformer_options": {}}


def test_a_step_and_its_memory(measuring: Any, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: `bench bridge` and `bench unify` measure on the host's device, here with a narrow UNet."""
    bridge, unify, unet = (
        host.pack_module(f"lab.bench.{name}") for name in ("bridge", "unify", "random_sd15")
    )
    monkeypatch.setattr(unet, "UNET", {**unet.UNET, "model_channels": 32})
    with torch.inference_mode():
        model = unet.random_sd15(dtype=measuring.dtype())
        measuring.choose_attention(model)
        (seconds,) = unify.unify(model, 8).seconds(8)
        backward = {stop: unify.gradient_only(model, stop) for stop in (True, False)}
        assert min(unify.timed(backward, 8, 1).values()) > 0
        clock = bridge.timed({"dual": bridge.dual(bridge.bridged(model, 8))}, 8, 1)["dual"]
        assert min(seconds, *clock.step, *clock.before) > 0
        assert unify.peak(unify.stock(model), 8, 2) > 2**20
