"""What UnifyEdit takes of memory: what is estimated, what is there, and what the host is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import small_models
import torch
from host import Host
from live_bytes import LiveBytes
from unify_edit import Edit

# The module trees of SD1.5 and SDXL at a fifth of their width, SDXL's with four blocks where it has ten.
COMMON = {"model_channels": 64, "context_dim": small_models.CONTEXT_WIDTH, "use_temporal_attention": False}
SDXL_DEPTH = {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 4, 4, 4],
    "transformer_depth_middle": 4,
    "num_head_channels": 32,
    "adm_in_channels": small_models.CONTEXT_WIDTH + 6 * 256,
}


@pytest.fixture(scope="module")
def pack(host: Host) -> Any:
    """What is tested, and the trees of the two families."""
    memory = host.pack_module("lab.bench.sdxl_memory")
    return SimpleNamespace(
        estimate=host.pack_module("patches.unify.memory").backward_bytes,
        network_of=host.pack_module("patches.attention.networks").network_of,
        choose=host.pack_module("patches.attention.layers"),
        sdxl=memory,
        torch_attention=host.pack_module("lab.bench.measuring").torch_attention,
        trees={
            "sd15": {**host.pack_module("lab.bench.random_sd15").UNET, **COMMON},
            "sdxl": {**memory.UNET, **COMMON, **SDXL_DEPTH},
        },
    )


@torch.inference_mode()
def narrow(pack: Any, family: str) -> Any:
    """A model of random weights, whose attention takes no memory for its maps."""
    kind = comfy.supported_models.SDXL if family == "sdxl" else comfy.supported_models.SD15
    config = kind(dict(pack.trees[family]))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    torch.manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    patcher.model_options["transformer_options"]["optimized_attention_override"] = pack.torch_attention
    return patcher


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_estimate(host: Host, pack: Any, family: str) -> None:
    """Protects: the estimate is what a step takes at its most, to a fifth, kept or computed again, and a step
    leaves nothing to the next.
    """
    model, size = narrow(pack, family), 24
    network = host.network(model)
    layers = [layer for layer in network.layers.values() if layer.grid(size, size) == (6, 6)]
    for checkpointing, steps in ((False, 1), (True, 2)):
        edit = Edit(host, model, steps=steps, size=(size, size), mode="virtual")
        edit.sampler_inputs.update(checkpointing=checkpointing, max_self_attn_res=6, cross_attn_res=6)
        with LiveBytes() as found:
            edited = edit.run()
        expected = pack.estimate(network, layers, layers, (1, 4, size, size), 4, checkpointing)
        assert 0.8 < expected / found.peak < 1.2, checkpointing
        assert found.now < 2 * edited.nbytes


def test_maps_are_made_in_pieces(host: Host, pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: where a layer's maps are larger than a piece, as at 64x64 tokens, only a piece is there of
    them.
    """
    maps = host.pack_module("patches.attention.projections")
    losses = host.pack_module("patches.unify.losses")
    q, k, other = torch.randn(3, 1, 1024, 4 * 8, generator=torch.Generator().manual_seed(0))
    source = {"middle.0.0": maps.Projections(other, k, 4)}
    target = {"middle.0.0": maps.Projections(q.requires_grad_(), k, 4)}
    whole = 4 * 1024 * 1024 * 4
    monkeypatch.setattr(maps, "PIECE", 1024 * 100)
    with LiveBytes() as loss:
        losses.structure_loss(source, target)
    with LiveBytes() as mean:
        source["middle.0.0"].mean()
    assert loss.peak < 0.2 * whole
    assert mean.peak < 0.4 * whole


@pytest.mark.parametrize(("checkpoint", "aim"), [(False, 6.0), (True, 4.0)])
def test_sdxl_at_1024(pack: Any, checkpoint: bool, aim: float) -> None:
    """Protects: on SDXL's own tree an edit of 1024x1024 in half precision takes less than 6 GiB, and less
    than 4 with checkpointing, by the estimate.
    """
    assert pack.sdxl.gradient_gib(checkpoint) < aim


@pytest.mark.parametrize("side", [1, 16, 32])
def test_sdxl_has_a_coarsest_grid(pack: Any, side: int) -> None:
    """Protects: below SDXL's coarsest grid that grid is chosen: 32x32 tokens at 1024x1024, ten blocks in
    each of six transformers.
    """
    layers = pack.network_of(pack.sdxl.unet()).layers.values()
    chosen = pack.choose.structure_layers(layers, 128, 128, side)
    assert len(chosen) == 60
    assert {layer.grid(128, 128) for layer in chosen} == {(32, 32)}
    assert chosen == pack.choose.word_layers(layers, 128, 128, 16)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def test_the_host_is_asked_for_memory(host: Host, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: before the first step the host is asked for the backward's memory on top of a stock run's."""
    module = host.pack_module("patches.unify.memory")
    monkeypatch.setattr(module, "backward_bytes", lambda *_: 3 * 2**30)
    asked = []
    load = comfy.model_management.load_models_gpu

    def note(models: Any, memory_required: float = 0, **others: Any) -> None:
        asked.append((memory_required, others.get("minimum_memory_required")))
        load(models, memory_required=memory_required, **others)

    edit = Edit(host, model, steps=1)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    edit.run()
    stock, own = asked[0], asked[-1]
    assert len(asked) == 2
    assert own[0] - stock[0] == 3 * 2**30
    assert own[1] - stock[1] == 3 * 2**30
