"""The bridge's numbers against a plain float64 computation of the design's formulas, layer by layer."""

from __future__ import annotations

from typing import Any

import bridge_edit
import pytest
import small_models
import torch
from host import Host

HEADS = 4
LATENT = small_models.latent(3) * 0


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


class Blocks:
    """What each transformer block of a UNet got and gave around its self-attention, call by call.

    `normed[layer]`: h, or r in the reference pass. `output[layer]`: what the block added to its input.
    """

    def __init__(self, host: Host, model: Any) -> None:
        unet = model.model.diffusion_model
        self.layers = tuple(host.network(model).layers.values())
        self.normed: dict[str, list[torch.Tensor]] = {layer.key: [] for layer in self.layers}
        self.output: dict[str, list[torch.Tensor]] = {layer.key: [] for layer in self.layers}
        self._handles = []
        for layer in self.layers:
            block, entered = unet.get_submodule(layer.path), {}

            def before(
                _: Any, args: Any, result: torch.Tensor, name: str = layer.key, x: Any = entered
            ) -> None:
                x["x"] = args[0].double().cpu()
                self.normed[name].append(result.double().cpu())

            def after(_: Any, args: Any, name: str = layer.key, x: Any = entered) -> None:
                self.output[name].append(args[0].double().cpu() - x["x"])

            self._handles += [
                block.norm1.register_forward_hook(before),
                block.norm2.register_forward_pre_hook(after),
            ]

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head."""
    heads = []
    for a, b, c in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        heads.append((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c)
    return torch.cat(heads, -1)


class Layer:
    """One layer's weights in float64, and the formulas."""

    def __init__(self, model: Any, bridge: Any, layer: Any) -> None:
        base = {
            name: weight.double().cpu()
            for name, weight in model.model.diffusion_model.get_submodule(layer.path)
            .attn1.state_dict()
            .items()
        }
        learned = {
            name.removeprefix(f"{layer.key}.").removesuffix(".weight"): weight.double().cpu()
            for name, weight in bridge.model.state_dict().items()
            if name.startswith(f"{layer.key}.")
        }
        self.bias = base["to_out.0.bias"]
        self.base = {name: base[f"to_{name}.weight"] for name in "qkv"} | {"out": base["to_out.0.weight"]}
        scale = bridge.model.settings.alpha / bridge.model.settings.rank
        self.changed = {
            name: weight + scale * learned[f"{name}.up"] @ learned[f"{name}.down"]
            for name, weight in self.base.items()
        }
        self.fuse: Any = learned.get("fuse")

    def plain(self, h: torch.Tensor) -> torch.Tensor:
        """Z."""
        weights = self.base
        return (
            attention(h @ weights["q"].T, h @ weights["k"].T, h @ weights["v"].T) @ weights["out"].T
            + self.bias
        )

    def bridged(self, asking: torch.Tensor, answering: torch.Tensor) -> torch.Tensor:
        """Z', with Q from `asking` and K, V from `answering`."""
        weights = self.changed
        q, k, v = asking @ weights["q"].T, answering @ weights["k"].T, answering @ weights["v"].T
        return attention(q, k, v) @ weights["out"].T + self.bias

    def output(self, fusion: str, z: torch.Tensor, answer: torch.Tensor, strength: Any) -> torch.Tensor:
        """Z_out."""
        if fusion == "linear":
            return z + strength * (answer @ self.fuse.T)
        return z + strength * (answer if fusion == "add" else answer - z)


CASES = [
    ("edit_queries", "linear", False),
    ("edit_queries", "linear", True),
    ("edit_queries", "add", False),
    ("edit_queries", "replace", True),
    ("reference_queries", "linear", False),
    ("reference_queries", "replace", False),
    ("reference_queries", "add", True),
]


@pytest.fixture(params=[False, True], ids=["apart", "merged"])
def merged(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the output matrices of all layers are merged, or those of none."""
    run = host.pack_module("patches.bridge.run").BridgeRun
    monkeypatch.setattr(run, "_repaid", lambda *_: request.param)
    return request.param


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize(("direction", "fusion", "self_bridge"), CASES)
def test_every_layer(host: Host, model: Any, direction: str, fusion: str, self_bridge: bool) -> None:
    """Protects: at every layer, Z_out = Z + strength F(Z') with the direction's Q, K and V, in both rows of a
    step, and in the reference pass only where the bridge was trained so.
    """
    bridge = bridge_edit.random_bridge(
        host, model, direction=direction, fusion=fusion, reference_self_bridge=self_bridge
    )
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9), strength=0.7)
    with Blocks(host, model) as blocks:
        bridge_edit.sample(host, patched, steps=1)
    for layer in blocks.layers:
        r, h = blocks.normed[layer.key]
        own = Layer(model, bridge, layer)
        asking, answering = (h, r) if direction == "edit_queries" else (r, h)
        answer = own.bridged(asking.expand(len(h), -1, -1), answering.expand(len(h), -1, -1))
        expected = own.output(fusion, own.plain(h), answer, 0.7)
        close(blocks.output[layer.key][-1], expected)
        if self_bridge:
            close(blocks.output[layer.key][0], own.output(fusion, own.plain(r), own.bridged(r, r), 1.0))
        elif len(blocks.output[layer.key]) == 2:
            close(blocks.output[layer.key][0], own.plain(r))


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_sdxl_layout(host: Host, prediction: str) -> None:
    """Protects: SDXL's layout, with several blocks at a place and pooled text, and v-prediction: every layer
    is found and follows the formula, and the reference is read at timestep 0.
    """
    model = small_models.small_unet(layout=small_models.SDXL_LAYOUT)
    (model,) = host.execute("ModelSamplingDiscrete", model=model, sampling=prediction, zsnr=False)
    bridge = bridge_edit.random_bridge(host, model)
    assert list(bridge.model.settings.widths) == [
        *("input.3.0", "input.3.1"),
        *("middle.0.0", "middle.0.1", "middle.0.2"),
        *("output.0.0", "output.0.1", "output.1.0", "output.1.1"),
    ]
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9))
    with Blocks(host, model) as blocks, bridge_edit.counted(model) as calls:
        bridge_edit.sample(host, patched, steps=1)
    assert (calls.rows, calls.timesteps[0]) == ([1, 2], 0)
    for layer in blocks.layers:
        r, h = blocks.normed[layer.key]
        own = Layer(model, bridge, layer)
        expected = own.output("linear", own.plain(h), own.bridged(h, r.expand(len(h), -1, -1)), 1.0)
        close(blocks.output[layer.key][-1], expected)


@pytest.mark.usefixtures("merged")
def test_lora_reaches_both_readings(host: Host, model: Any) -> None:
    """Protects: the projections are the host's own after LoRA, for the picture, for the reference and in the
    merged output matrix; and it does not matter whether the LoRA comes before or after the bridge.
    """
    import comfy.sd

    bridge = bridge_edit.random_bridge(host, model)
    lora = attention_lora(host, model)
    before, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
    before = bridge_edit.apply_bridge(host, before, bridge, small_models.latent(9))
    after, _ = comfy.sd.load_lora_for_models(
        bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9)), None, lora, 0.8, 0.0
    )
    first = bridge_edit.sample(host, before, steps=1)
    with Blocks(host, model) as blocks:
        second = bridge_edit.sample(host, after, steps=1)
        weights = [Layer(model, bridge, layer) for layer in blocks.layers]  # the LoRA is on the weights now
    assert torch.equal(first, second)
    assert not torch.equal(weights[0].base["v"], small_models_weight(model, blocks.layers[0]))
    for layer, own in zip(blocks.layers, weights, strict=True):
        r, h = blocks.normed[layer.key]
        expected = own.output("linear", own.plain(h), own.bridged(h, r.expand(len(h), -1, -1)), 1.0)
        close(blocks.output[layer.key][-1], expected)


def test_joined_references(host: Host, model: Any) -> None:
    """Protects: references that are joined answer together, as one long sequence of tokens, and a reference
    may have another size than the picture.
    """
    bridge = bridge_edit.random_bridge(host, model)
    references = small_models.latent(9, batch=2, size=(12, 20))
    patched = bridge_edit.apply_bridge(host, model, bridge, references, references="all for every image")
    with Blocks(host, model) as blocks:
        bridge_edit.sample(host, patched, steps=1)
    for layer in blocks.layers:
        r, h = blocks.normed[layer.key]
        own = Layer(model, bridge, layer)
        together = torch.cat(list(r))[None].expand(len(h), -1, -1)
        expected = own.output("linear", own.plain(h), own.bridged(h, together), 1.0)
        close(blocks.output[layer.key][-1], expected)


def test_mask_acts_place_by_place(host: Host, model: Any) -> None:
    """Protects: a soft mask weighs the bridge at each place of each layer, by the share of the place's area
    that it covers, also where a conditioning with an area shows the UNet only a part of the latent.
    """
    bridge = bridge_edit.random_bridge(host, model)
    mask = torch.zeros(1, 128, 128)
    mask[:, 16:80, 24:] = 0.5
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9), mask=mask)
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(2),
        width=64,
        height=96,
        x=32,
        y=16,
        strength=1.0,
    )
    for positive, window in ((None, mask), (area, mask[:, 16:112, 32:96])):
        with Blocks(host, model) as blocks:
            bridge_edit.sample(host, patched, positive, steps=1, cfg=1.0)
        for layer in blocks.layers:
            r, h = blocks.normed[layer.key][0], blocks.normed[layer.key][-1]
            side = window.shape[1] // 8 >> layer.level, window.shape[2] // 8 >> layer.level
            # Every place's mean over its pixels, by hand.
            places = window[0].reshape(side[0], window.shape[1] // side[0], side[1], -1).mean((1, 3))
            own = Layer(model, bridge, layer)
            answer = own.bridged(h, r.expand(len(h), -1, -1))
            expected = own.output("linear", own.plain(h), answer, places.double().reshape(1, -1, 1))
            close(blocks.output[layer.key][-1], expected)


def attention_lora(host: Host, model: Any) -> dict[str, torch.Tensor]:
    """A LoRA on every self-attention projection, in a format that the host's loaders read."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for layer in host.network(model).layers.values():
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            key = f"diffusion_model.{layer.path}.attn1.{name}"
            found[f"{key}.lora_down.weight"] = (
                torch.randn(4, layer.width, generator=generator) / layer.width**0.5
            )
            found[f"{key}.lora_up.weight"] = torch.randn(layer.width, 4, generator=generator) / 4
    return found


def small_models_weight(model: Any, layer: Any) -> torch.Tensor:
    """The V projection as it was before any LoRA, in float64."""
    return small_models.unet_state_dict()[f"{layer.path}.attn1.to_v.weight"].double()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to what float32 can hold."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
