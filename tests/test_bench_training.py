"""The counted memory of training, against what autograd keeps on real tensors."""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import pytest
import small_dits
import small_models
import torch
from host import Host


@pytest.fixture
def bench(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench on a small UNet."""
    module = host.pack_module("lab.bench.training")
    monkeypatch.setattr(module, "UNET", small_models.UNET)
    monkeypatch.setattr(module, "TEXT_WIDTH", small_models.CONTEXT_WIDTH)
    module.kept.cache_clear()
    yield module
    module.kept.cache_clear()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_is_kept(bench: Any, checkpointing: bool) -> None:
    """Protects: the bytes that are counted on tensors without content are those that autograd keeps on real
    ones.
    """
    counted, *_ = bench.kept(2, 128, "fp32", checkpointing)
    model, bridge = bench.parts(torch.float32)
    for weight in [*model.diffusion_model.parameters(), *bridge.parameters()]:
        torch.nn.init.normal_(weight, std=0.02)
    weights = [*model.diffusion_model.parameters(), *bridge.parameters()]
    fixed = {weight.data_ptr() for weight in weights}
    found: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = bench.row_loss(model, bridge, 2, 128, "fp32", checkpointing)
    kept = sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in fixed)
    assert counted == pytest.approx(kept, rel=0.01)
    loss.backward()


def test_figures(bench: Any) -> None:
    """Protects: the sum is what is always there and the rows; checkpointing lowers it; and the table has a
    line for each resolution.
    """
    figures = bench.memory("fp32")
    learned = 4 * figures["parameters"] / 1e9
    assert figures["adamw_gb"] == pytest.approx(2 * learned)
    always = sum(figures[f"{name}_gb"] for name in ("unet", "bridge", "gradient", "adamw", "average"))
    row = figures["row_gb_512"]
    assert figures["total_gb_512_batch_32"] - figures["total_gb_512_batch_8"] == pytest.approx(24 * row)
    assert figures["total_gb_512_batch_1"] == pytest.approx(always + row, rel=0.05)
    assert figures["row_gb_512_checkpointed"] < 0.5 * row
    assert figures["total_gb_512_checkpointed_batch_32"] < figures["total_gb_512_batch_32"]
    lines = bench.table(figures | {"step_seconds": 0.36, "hours_100k_steps": 10.0}, "fp32").splitlines()
    assert len(lines) == 2 + 6 + 1
    assert "10.0 hours" in lines[-1]


def test_sizes_of_other_bases(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the base's size is that of its weights, a step takes less with a base in fp8 and more at a
    higher resolution, and a forward's operations are those of its matrices and its attention.
    """
    module = host.pack_module("lab.bench.training_sizes")
    config = {**small_dits.FAMILIES["Flux.1 dev"][1]}
    base = module.Base(comfy.supported_models.Flux, config, 8, (10, 32), 32)
    monkeypatch.setattr(module, "BASES", {"small": base})
    found, model = module.sizes(base), base.model(torch.bfloat16)
    weights = sum(weight.numel() for weight in model.diffusion_model.parameters())
    assert found["base_gb_bf16"] * 1e9 == 2 * weights
    assert found["base_gb_fp8"] * 1e9 == weights
    assert found["total_gb_fp8_512"] < found["total_gb_bf16_512"] < found["total_gb_bf16_1024"]
    text, image = 10, 32 * 32
    expected = 0
    for name, layer in model.diffusion_model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            once = name.endswith(("lin", "in_layer", "out_layer", "adaLN_modulation.1"))
            tokens = text if "txt" in name else image if "img" in name or "final" in name else text + image
            expected += 2 * layer.weight.numel() * (1 if once else tokens)
    blocks = config["depth"] + config["depth_single_blocks"]
    expected += blocks * 4 * (text + image) ** 2 * config["hidden_size"]
    assert found["pair_tflop_512"] * 1e12 / 4 == pytest.approx(expected, rel=0.01)
    assert len(module.table().splitlines()) == 4
