"""Recording attention: what is recorded, that nothing else changes, and gradients through the recorder."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import pytest
import small_models
import torch
from comfy.ldm.modules.attention import CrossAttention, optimized_attention
from host import Host, device

SIGMA = 2.0


@pytest.fixture(scope="module")
def attention(host: Host) -> Any:
    """patches/attention/recorder.py, with the network's adapter."""
    maps, networks = (host.pack_module(f"patches.attention.{name}") for name in ("recorder", "networks"))
    return SimpleNamespace(**{**vars(maps), "network_of": networks.network_of})


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.loaded(small_models.small_unet())


def noise(*shape: int) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device())


def call(
    model: Any, x: torch.Tensor, options: dict[str, Any] | None = None, conds: int = 1
) -> list[torch.Tensor]:
    """One model call as the host makes it for `conds` conditionings, with `x` on the model's device; returns
    the denoised latents.
    """
    entries = {
        str(seed): comfy.sampler_helpers.convert_cond(small_models.conditioning(seed))
        for seed in range(conds)
    }
    processed = comfy.samplers.process_conds(model.model, x, entries, x.device)
    model.pre_run()
    sigma = torch.full((x.shape[0],), SIGMA, device=x.device)
    options = options or {"transformer_options": {}}
    return comfy.samplers.calc_cond_batch(model.model, list(processed.values()), x, sigma, options)


def recorder(attention: Any, model: Any, stop: bool = False, levels: tuple[int, ...] = (0, 1, 2)) -> Any:
    """A recorder of every layer at the given levels."""
    network = attention.network_of(model.model.diffusion_model)
    layers = [layer for layer in network.layers.values() if layer.level in levels]
    return attention.AttentionRecorder(network, layers, layers, stop=stop)


def test_layers(attention: Any, model: Any) -> None:
    """Protects: layers are named as the host names them while it runs, in the order they run, with their
    grids.
    """
    seen = []

    def note(q: torch.Tensor, context: Any, value: Any, extra_options: dict[str, Any]) -> Any:
        key = "{}.{}.{}".format(*extra_options["block"], extra_options["block_index"])
        seen.append((key, tuple(extra_options["activations_shape"][-2:])))
        return q, context, value

    call(
        model,
        torch.randn(1, 4, 18, 10, device=device()),
        {"transformer_options": {"patches": {"attn1_patch": [note]}}},
    )
    layers = attention.network_of(model.model.diffusion_model).layers.values()
    assert [(layer.key, layer.grid(18, 10)) for layer in layers] == seen
    assert {layer.grid(16, 16) for layer in layers} == {(16, 16), (8, 8), (4, 4)}


def test_other_networks_are_refused(attention: Any) -> None:
    """Protects: a network that is no UNet is named in the error."""
    with pytest.raises(ValueError, match=r"needs a UNet.*got Linear"):
        attention.network_of(torch.nn.Linear(1, 1))


def test_probabilities(attention: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: what is recorded is the softmax that the host's own attention layers compute, head by
    head.
    """
    unet = model.model.diffusion_model
    inputs: dict[str, list[torch.Tensor]] = {"attn1": [], "attn2": []}
    for name, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            kind = name.rsplit(".", 1)[1]
            for projection in (module.to_q, module.to_k):
                forward = projection.forward
                monkeypatch.setattr(projection, "forward", _spy(forward, inputs[kind]))
    made = recorder(attention, model)
    call(model, torch.randn(2, 4, 16, 16, device=device()), made.attach({"transformer_options": {}}))
    for kind, maps in (("attn1", made.self_attention), ("attn2", made.cross_attention)):
        layers = attention.network_of(unet).layers.values()
        assert set(maps) == {layer.key for layer in layers}
        for layer, q, k in zip(layers, inputs[kind][0::2], inputs[kind][1::2], strict=True):
            q, k = (tensor.double().unflatten(-1, (4, -1)).transpose(1, 2) for tensor in (q, k))
            expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
            found = maps[layer.key].probabilities()
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def _spy(forward: Callable, seen: list[torch.Tensor]) -> Callable:
    def spied(x: torch.Tensor) -> torch.Tensor:
        seen.append(forward(x))
        return seen[-1]

    return spied


@pytest.mark.parametrize("conds", [1, 2])
def test_output_is_unchanged(attention: Any, model: Any, conds: int) -> None:
    """Protects: recording changes no bit of the output and leaves nothing in the options."""
    x = torch.randn(2, 4, 16, 16, device=device())
    options: dict[str, Any] = {"transformer_options": {"wrappers": {}}}
    plain = call(model, x, options, conds)
    made = recorder(attention, model)
    recorded = call(model, x, made.attach(options), conds)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert options == {"transformer_options": {"wrappers": {}}}
    assert all(len(layer.q) == 2 * conds for layer in made.self_attention.values())
    assert torch.equal(call(model, x, options, conds)[0], plain[0])


@pytest.mark.parametrize("key", [("output", 2), ("output", 2, 0)])
@pytest.mark.parametrize("name", ["attn1", "attn2"])
def test_chaining(attention: Any, model: Any, name: str, key: tuple) -> None:
    """Protects: a patch that sits in a slot, under either form of its key, still decides what the layer
    returns.
    """
    x = torch.randn(1, 4, 16, 16, device=device())
    calls = []

    def halve(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
        calls.append(extra_options["block"])
        return 0.5 * optimized_attention(q, k, v, extra_options["n_heads"])

    options = {"transformer_options": {"patches_replace": {name: {key: halve}}}}
    patched = call(model, x, options)[0]
    made = recorder(attention, model)
    recorded = call(model, x, made.attach(options))[0]
    assert torch.equal(patched, recorded)
    assert not torch.equal(patched, call(model, x)[0])
    assert calls == [("output", 2), ("output", 2)]
    assert options["transformer_options"]["patches_replace"][name] == {key: halve}


def test_early_stop(attention: Any, model: Any) -> None:
    """Protects: after the last layer that is wanted no layer of the UNet runs, and what was recorded is the
    same.
    """
    x = torch.randn(1, 4, 16, 16, device=device())
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.model.diffusion_model.named_modules()
        if not list(module.children())
    ]
    try:
        whole = recorder(attention, model, levels=(2,))
        call(model, x, whole.attach({"transformer_options": {}}))
        all_layers = len(ran)
        ran.clear()
        stopped = recorder(attention, model, stop=True, levels=(2,))
        (output,) = call(model, x, stopped.attach({"transformer_options": {}}))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(ran) < 0.75 * all_layers
    assert ran[-1] == "output_blocks.1.1.transformer_blocks.0.attn2.to_v"
    for once, again in (
        (whole.self_attention, stopped.self_attention),
        (whole.cross_attention, stopped.cross_attention),
    ):
        assert once.keys() == again.keys()
        for key, layer in again.items():
            assert torch.equal(once[key].q, layer.q)
            assert torch.equal(once[key].k, layer.k)
    assert torch.equal(output, x)


def test_nothing_stays_behind(attention: Any, model: Any) -> None:
    """Protects: after a call that stopped early the model runs whole again, with its own output."""
    x = torch.randn(1, 4, 16, 16, device=device())
    before = call(model, x)[0]
    call(model, x, recorder(attention, model, stop=True).attach({"transformer_options": {}}))
    assert torch.equal(call(model, x)[0], before)
    assert model.model_options == {"transformer_options": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient(host: Host, attention: Any, dtype: torch.dtype) -> None:
    """Protects: gradients through inference-tensor weights agree with finite differences, under inference
    mode.
    """
    model = small_models.loaded(small_models.small_unet(dtype=dtype))
    assert next(model.model.diffusion_model.parameters()).is_inference()
    gradients = host.pack_module("patches.host.autograd").gradients
    losses = host.pack_module("patches.unify.losses")
    network = attention.network_of(model.model.diffusion_model)
    layers = [layer for layer in network.layers.values() if layer.level > 0]
    masks = host.pack_module("patches.attention.masks").layer_masks(None, layers, 16, 16, device())
    tokens = torch.zeros(1, 1, small_models.TEXT_TOKENS)
    tokens[..., 2:4] = 1
    description = torch.zeros(1, small_models.TEXT_TOKENS)
    description[:, 1:11] = 1
    words = host.pack_module("patches.unify.words").Words(tokens, description, torch.ones(1, 1)).to(device())
    # On a CPU the host computes in float32 with half's weights, on a card in half: differences are coarse.
    tolerance = 0.02 if torch.float32 in (dtype, model.model.manual_cast_dtype) else 0.1
    with torch.inference_mode():
        x, source_x = SIGMA * noise(2, 2, 4, 16, 16)
        source = attention.AttentionRecorder(network, layers, ())
        call(model, source_x, source.attach({"transformer_options": {}}))

        def both(at: torch.Tensor) -> tuple[Any, Any]:
            made = attention.AttentionRecorder(network, layers, layers, stop=True)
            call(model, at, made.attach({"transformer_options": {}}))
            structure = losses.structure_loss(source.self_attention, made.self_attention)
            return structure, losses.alignment_loss(made.cross_attention, words, masks)

        with gradients():
            leaf = x.clone().requires_grad_()
            structure, alignment = both(leaf)
            found = [
                *attention.loss_gradients([structure], [leaf], keep_graph=True),
                *attention.loss_gradients([alignment], [leaf]),
            ]
        for index, gradient in enumerate(found):
            for row in range(2):
                step = torch.zeros_like(x)
                step[row] = 0.05 * gradient[row] / gradient[row].norm()
                upper, lower = both(x + step)[index].values, both(x - step)[index].values
                slope = (upper - lower)[row] / (2 * 0.05)
                torch.testing.assert_close(slope, gradient[row].norm(), rtol=tolerance, atol=0)
                assert (upper - lower)[1 - row] == 0


@pytest.mark.parametrize("piece", [2**24, 300, 1])
def test_gradient_of_whole_maps(
    host: Host, attention: Any, model: Any, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Protects: however small the pieces that maps are taken in, both losses and their gradients are those
    of whole maps of all layers at once, differentiated through the UNet in one graph.
    """
    monkeypatch.setattr(host.pack_module("patches.attention.projections"), "PIECE", piece)
    gradients, losses = (
        host.pack_module("patches.host.autograd").gradients,
        host.pack_module("patches.unify.losses"),
    )
    network = attention.network_of(model.model.diffusion_model)
    layers = [layer for layer in network.layers.values() if layer.level > 0]
    shape = {layer.key: (2, math.prod(layer.grid(16, 16))) for layer in layers}
    generator = torch.Generator().manual_seed(3)
    regions = {key: torch.rand(size, generator=generator).to(device()) for key, size in shape.items()}
    tokens = torch.zeros(1, 1, small_models.TEXT_TOKENS)
    tokens[..., 2:4] = 1
    description = torch.zeros(1, small_models.TEXT_TOKENS)
    description[:, 1:11] = 1
    words = host.pack_module("patches.unify.words").Words(tokens, description, torch.ones(1, 1)).to(device())
    x, source_x = SIGMA * noise(2, 2, 4, 16, 16)
    source = attention.AttentionRecorder(network, layers, ())
    call(model, source_x, source.attach({"transformer_options": {}}))
    with gradients():
        leaf = x.clone().requires_grad_()
        made = attention.AttentionRecorder(network, layers, layers, stop=True)
        call(model, leaf, made.attach({"transformer_options": {}}))
        structure = words_loss = torch.zeros((), device=x.device)
        for layer in layers:
            key = layer.key
            change = whole_map(made.self_attention[key]) - whole_map(source.self_attention[key])
            change = regions[key][:, None, :, None] * regions[key][:, None, None, :] * change
            structure = structure + change.square().sum(dim=(2, 3)).mean(dim=1) / len(layers)
            looks = whole_map(made.cross_attention[key])
            share = looks[..., 2:4].sum(dim=-1) / looks[..., 1:11].sum(dim=-1)
            inside = (share * regions[key][:, None]).sum(dim=-1) / regions[key].sum(dim=-1, keepdim=True)
            words_loss = words_loss + (1 - inside).square().mean(dim=1) / len(layers)
        for value, take in (
            (structure, lambda: losses.structure_loss(source.self_attention, made.self_attention, regions)),
            (words_loss, lambda: losses.alignment_loss(made.cross_attention, words, regions)),
        ):
            (expected,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
            loss = take()
            torch.testing.assert_close(loss.values.double(), value.detach(), rtol=1e-5, atol=0)
            (found,) = attention.loss_gradients([loss], [leaf], keep_graph=True)
            assert float((found - expected).norm() / expected.norm()) < 1e-5
            assert loss.parts == []


def whole_map(layer: Any) -> torch.Tensor:
    """All of a layer's probabilities in float64, in the graph that its queries and keys are in."""
    q, k = (part.double().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (layer.q, layer.k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)


def test_gradient_in_half_precision(attention: Any, host: Host) -> None:
    """Protects: where the model computes in half precision, a loss that is far too small for it keeps its
    gradient.
    """
    gradients = host.pack_module("patches.host.autograd").gradients
    loss_gradient = host.pack_module("patches.attention.recorder").LossGradient
    x = SIGMA * noise(2, 4, 16, 16)
    found = []
    for dtype in (torch.float32, torch.float16):
        model = small_models.loaded(small_models.small_unet(dtype=dtype))
        model.model.manual_cast_dtype = None
        with gradients():
            leaf = x.clone().requires_grad_()
            made = recorder(attention, model, stop=True)
            call(model, leaf, made.attach({"transformer_options": {}}))
            ends = [layer.q for layer in made.self_attention.values()]
            assert ends[0].dtype == dtype
            parts = [(end, 1e-9 * end.detach().float()) for end in ends]
            (gradient,) = attention.loss_gradients([loss_gradient(torch.zeros(2), parts)], [leaf])
            found.append(gradient * 1e9)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_checkpointed(attention: Any, model: Any, host: Host) -> None:
    """Protects: with checkpointing the recorder stops between blocks, records the same bits once although
    layers are computed again, and its gradients are the same.
    """
    checkpointed = host.pack_module("patches.host.checkpointing").checkpointed
    gradients = host.pack_module("patches.host.autograd").gradients
    loss_gradient = host.pack_module("patches.attention.recorder").LossGradient
    x = SIGMA * noise(1, 4, 16, 16)
    network = attention.network_of(model.model.diffusion_model)
    layers = [layer for layer in network.layers.values() if layer.level > 0]
    found, ran = [], []
    hooks = [
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, block in model.model.diffusion_model.named_modules()
        if name in ("output_blocks.3", "output_blocks.4")
    ]
    try:
        for checkpoint in (False, True):
            ran.clear()
            with gradients():
                leaf = x.clone().requires_grad_()
                made = attention.AttentionRecorder(
                    network, layers, layers, stop=True, whole_layers=checkpoint
                )
                options = {"transformer_options": checkpointed({}, network.module) if checkpoint else {}}
                call(model, leaf, made.attach(options))
                seen = {key: layer.q.detach().clone() for key, layer in made.self_attention.items()}
                grads = []
                for maps in (made.self_attention, made.cross_attention):
                    parts = [(layer.q, layer.q.detach().clone()) for layer in maps.values()]
                    loss = loss_gradient(torch.zeros(1), parts)
                    grads += attention.loss_gradients([loss], [leaf], keep_graph=not grads)
                found.append((seen, *grads))
                assert all(torch.equal(seen[key], made.self_attention[key].q) for key in seen)
    finally:
        for hook in hooks:
            hook.remove()
    assert "output_blocks.4" not in ran
    (plain, *expected), (again, *gradient) = found
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    for one, two in zip(expected, gradient, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)
