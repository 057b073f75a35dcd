"""Speed and memory: on a card by the card's own counters, else by the process."""

from __future__ import annotations

import os
from typing import Any

import psutil
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


def test_a_step_and_its_memory(measuring: Any, host: Host) -> None:
    """Protects: `bench bridge` and `bench unify` measure on the host's device, here with a narrow UNet."""
    bridge, unify, unet = (
        host.pack_module(f"lab.bench.{name}") for name in ("bridge", "unify", "random_sd15")
    )
    with torch.inference_mode():
        model = unet.random_sd15(dtype=measuring.dtype(), width=unet.NARROW)
        measuring.choose_attention(model)
        (seconds,) = unify.unify(model, 8).seconds(8)
        backward = {stop: unify.gradient_only(model, stop) for stop in (True, False)}
        assert min(min(steps) for steps in unify.timed(backward, 8, 1).values()) > 0
        clock = bridge.timed({"dual": bridge.dual(bridge.bridged(model, 8))}, 8, 1)["dual"]
        assert min(seconds, *clock.step, *clock.before) > 0
        assert unify.peak(unify.stock(model), 8, 2) > 2**20


def test_operations(host: Host) -> None:
    """Protects: computing operations are told apart from views, casts, memory and waits, forwards and in a
    backward pass, and what does nothing counts as a view.
    """
    counter = host.pack_module("lab.bench.operations").Operations()
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with torch.inference_mode(), counter:
        y = torch.nn.functional.linear(x, weight).relu()
        y.view(-1)[:2].to(torch.float64)
        torch.dropout(y.to(torch.float32), 0.5, train=False).reshape(8)
        y.t().reshape(8)
        y.copy_(torch.empty(2, 4).zero_())
        y[0, 0].item()
    assert counter.names == {"linear": 1, "relu": 1, "zero_": 1}
    assert counter.kinds == {"computed": 3, "casts": 3, "views": 8, "memory": 1, "waits": 1}
    leaf = torch.ones(3, requires_grad=True)
    with counter:
        torch.autograd.grad(leaf.sin().sum(), leaf)
    assert counter.names["cos"] == counter.names["sin"] == 1


def test_narrow(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the narrow regime measures SD1.5's whole depth with the layers that 64x64 latents choose, and
    counts the operations of one step: a bridge adds one attention in each of the 16 layers.
    """
    bridge, unify, unet, layers, networks = (
        host.pack_module(name)
        for name in (
            "lab.bench.bridge",
            "lab.bench.unify",
            "lab.bench.random_sd15",
            "patches.attention.layers",
            "patches.attention.networks",
        )
    )
    with torch.inference_mode():
        model = unet.random_sd15(width=unet.NARROW)
        found = networks.network_of(model.model.diffusion_model).layers.values()
        for choose in (layers.structure_layers, layers.word_layers):
            expected = choose(found, 64, 64, unify.SIDE)
            assert choose(found, unet.NARROW_SIDE, unet.NARROW_SIDE, unify.NARROW_TOKENS) == expected
        lab = host.pack_module("lab.bench.measuring")
        lab.choose_attention(model)
        counts = [
            bridge.operations(guider, 8).names["scaled_dot_product_attention"]
            for guider in (bridge.stock_dual(model), bridge.dual(bridge.bridged(model, 8)))
        ]
    assert counts == [32, 48]
    for module in (bridge, unify):
        monkeypatch.setattr(module, "NARROW_ROUNDS", 1)
    assert bridge.narrow(1).keys() == {
        "overhead_dual_ratio",
        "overhead_reference_pass_forwards",
        "ops_dual_extra",
    }
    monkeypatch.setattr(unify, "EDIT_STEPS", 2)
    measured = unify.narrow(1)
    assert measured["overhead_edit_ratio"] > 1
    with torch.inference_mode():
        near, far = (unify.whole_edit.reconstruction_db(model, 8, 10, refine) for refine in (3, 0))
    assert near > far + 10
    assert measured["overhead_unify_ratio_checkpointed"] > measured["overhead_unify_ratio"] > 1
    assert measured["ops_unify_ratio"] > 1


def test_slowest_imports(host: Host) -> None:
    """Protects: of a report of Python's import times the pack's own modules are shown, the slowest first."""
    start = host.pack_module("lab.bench.start")
    folder = f"/base/custom_nodes/{start.PACK_FOLDER}"
    lines = (
        "self [us] | cumulative | imported package",
        f"  10 |   2500 |   {folder}.models.bridge",
        "  10 | 900000 | torch",
        f"  10 | 300000 | {folder}",
    )
    report = "\n".join(("starting", *(f"import time: {line}" for line in lines)))
    assert start.slowest(report) == [(0.3, ""), (0.0025, "models.bridge")]


def test_a_template(host: Host, live_server: Any) -> None:
    """Protects: `bench templates` takes the templates that can run without a download, and counts what the
    server spends on one; its waiting threads sleep, unless the user wants something else.
    """
    bench = host.pack_module("lab.bench.templates")
    prompts = bench.without_download()
    assert all(
        "DescEditTinyStudio" in {node["class_type"] for node in graph.values()} for graph in prompts.values()
    )
    assert {name[:2] for name in prompts} >= {"01", "02", "07", "12"}
    (prompt,) = [graph for name, graph in prompts.items() if name.startswith("01")]
    (unify,) = [node for node in prompt.values() if node["class_type"] == "DescEditUnify"]
    unify["inputs"]["steps"] = 2
    spent = bench.run(live_server, prompt)
    assert 0 < spent.processor < 2 * 60
    assert spent.seconds > 0.1
    (child,) = psutil.Process(live_server.process_id).children()
    assert 0.5 < spent.memory * 2**20 / child.memory_info().rss < 2
    assert child.environ()["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "passive")
