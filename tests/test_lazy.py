"""Networks of the pack where the host makes layers without weights: they have theirs, as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import memory_modes
import pytest
import small_models
import torch
from host import Host


@memory_modes.only("lazy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_are_whole(host: Host, memory_mode: str, dtype: torch.dtype) -> None:
    """Protects: a bridge has all its weights when it is made, of the dtype and on the device asked for, and
    start values; so have the Tiny Studio's networks. The host's own layers have none here.
    """
    bridges = host.pack_module("models.bridge")
    settings = bridges.BridgeSettings("SD15", {"middle.0.0": 32}, rank=4)
    bridge = bridges.AttentionBridge(settings, dtype, torch.device("meta"))
    shapes = sorted(tuple(weight.shape) for weight in bridge.parameters())
    assert shapes == [(4, 32)] * 4 + [(32, 4)] * 4 + [(32, 32)]
    assert {(weight.dtype, weight.device.type) for weight in bridge.parameters()} == {(dtype, "meta")}
    fresh = bridges.new_bridge(settings).model.state_dict()
    assert abs(float(fresh["middle.0.0.q.down.weight"].std()) - 1 / 4) < 0.1
    assert not fresh["middle.0.0.q.up.weight"].any()
    assert not fresh["middle.0.0.fuse.weight"].any()
    assert comfy.ops.manual_cast.Linear(4, 32).weight is None
    networks, flux = (host.pack_module(f"models.tiny_studio.{name}") for name in ("networks", "flux"))
    for make in (networks.new_unet, networks.new_text_model, flux.new_network):
        assert all(weight.isfinite().all() for weight in make().parameters())


def test_managed_weights_have_no_gradient(host: Host) -> None:
    """Protects: what the host copies into buffers that it uses again cannot become part of a graph."""
    bridges = host.pack_module("models.bridge")
    bridge = bridges.new_bridge(bridges.BridgeSettings("SD15", {"middle.0.0": 32}, rank=4))
    assert not any(weight.requires_grad for weight in bridge.model.parameters())


@memory_modes.only("lazy")
def test_a_backbone_of_other_shapes(host: Host, memory_mode: str) -> None:
    """Protects: a DINO file with a misshapen layer is refused, as where the host checks shapes itself."""
    room = host.pack_module("metrics.backbones")
    with memory_modes.resident():
        network = room.Dino(64, 16, depth=1, positions=4)
    weights = {name: torch.zeros_like(weight) for name, weight in network.state_dict().items()}
    room.dino_from(weights, "small", 64, 16, keys=False)
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(256, 32)
    with pytest.raises(ValueError, match=r"(?s)small is not a whole DINO backbone: .*fc1"):
        room.dino_from(weights, "small", 64, 16, keys=False)


def test_one_file_is_one_model(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: with dynamic VRAM weights keep their file's dtype until they are used; a MODEL loaded so and
    one of the same file that was cast when it was loaded are the same to an inversion, another file is not.
    """
    identity = host.pack_module("patches.inversion").ModelIdentity
    family, weights = small_models._SmallSD15, small_models.unet_state_dict()
    monkeypatch.setattr(comfy.supported_models, "models", [family, *comfy.supported_models.models])

    def load(state: dict[str, torch.Tensor], as_stored: bool) -> Any:
        options = {"dtype": torch.float16}
        model = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)
        if as_stored:
            model.model.load_model_weights(dict(state), assign=True)
        return model

    cast, stored = load(weights, False), load(weights, True)
    name = "diffusion_model.out.2.weight"
    assert cast.model.get_parameter(name).dtype != stored.model.get_parameter(name).dtype
    assert identity.of(stored) == identity.of(cast)
    assert identity.of(load(small_models.unet_state_dict(1), True)) != identity.of(cast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@memory_modes.only("resident", "lazy")
def test_a_bridge_is_a_copy_of_its_file(
    host: Host, memory_mode: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Protects: the file's dtype is kept, and a file that is written over does not change a loaded bridge."""
    bridges, files_ = host.pack_module("models.bridge"), host.pack_module("models.bridge_file")
    settings = bridges.BridgeSettings("SD15", {"middle.0.0": 32}, rank=4)
    path = tmp_path / "bridge.safetensors"
    files_.save_bridge(bridges.AttentionBridge(settings, dtype).reset(), path)
    loaded = files_.load_bridge(path).model.state_dict()
    before = {name: weight.clone() for name, weight in loaded.items()}
    assert {weight.dtype for weight in loaded.values()} == {dtype}
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(range(64)))
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.items())


def test_the_text_encoder_is_loaded_again(host: Host) -> None:
    """Protects: where the host wants a text encoder with weights of its own, as for hooks with dynamic VRAM,
    it gets the Tiny Studio's anew, as an ordinary patcher with the same weights in other memory.
    """
    clip = host.pack_module("models.tiny_studio.studio").load_clip()
    load, arguments = clip.patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher
    own, others = again.model.state_dict(), clip.patcher.model.state_dict()
    assert own.keys() == others.keys()
    for name, weight in own.items():
        assert torch.equal(weight, others[name])
        assert weight.data_ptr() != others[name].data_ptr()
