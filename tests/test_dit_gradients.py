"""Gradients through the host's DiTs, whose kernels have none and whose blocks write in place, also with their
blocks computed again.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import memory_modes
import pytest
import small_dits
import small_models
import torch
from host import Host, device
from test_checkpointing import kept_bytes

FAMILIES = tuple(small_dits.FAMILIES)


@pytest.fixture(scope="module")
def pack(host: Host) -> Any:
    """What is tested."""
    return SimpleNamespace(
        checkpointed=host.pack_module("patches.host.checkpointing").checkpointed,
        gradients=host.pack_module("patches.host.autograd").gradients,
        options=host.pack_module("patches.host.autograd").differentiable_options,
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks that were made so far."""
    return {}


def _model(models: dict[str, Any], name: str) -> Any:
    if name not in models:
        models[name] = small_models.loaded(small_dits.small_dit(name))
    return models[name]


def call(model: Any, x: torch.Tensor, options: dict[str, Any], **more: Any) -> torch.Tensor:
    """One call of the network, in the latent's dtype."""
    rows = len(x)
    text = small_models.conditioning(2, batch=rows)[0][0].to(x)
    one = torch.full((rows,), 3.5, device=x.device, dtype=x.dtype)
    if type(model.model.model_config).__name__ in ("Flux", "FluxSchnell"):
        more["y"] = text.mean(1)
    network = model.model.diffusion_model
    return network(x, 0.2 * one, text, guidance=one, transformer_options=options, **more)


def latent(model: Any, rows: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random latent in the model's space, on its device."""
    samples = model.model.process_latent_in(small_models.latent(3, rows, model=model))
    return samples.to(device(), dtype)


def gradient(
    pack: Any, model: Any, options: dict[str, Any], rows: int = 1, dtype: Any = torch.float32, **more: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The output, the latent's gradient of its square sum, and the bytes that autograd kept for it."""
    with pack.gradients():
        x = latent(model, rows).requires_grad_()
        out, kept = kept_bytes(lambda: call(model, x.to(dtype), options, **more))
        (found,) = torch.autograd.grad(out.float().square().sum(), x)
    return out.detach(), found, kept


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_finite_differences(pack: Any, family: str, again: bool) -> None:
    """Protects: in float64 the gradient in a random direction is what two calls of the network say, with the
    blocks' insides kept and computed again, and the host's switch for training is left alone.
    """
    model = small_models.loaded(small_dits.small_dit(family, dtype=torch.float64))
    generator = torch.Generator().manual_seed(5)
    x = latent(model, dtype=torch.float64)
    along = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    to = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    with pack.gradients(), torch.no_grad():  # the host's own rotation knows no float64
        high, low = ((call(model, x + step * along, {}) * to).sum() for step in (1e-3, -1e-3))
    expected = float(high - low) / 2e-3
    options = pack.checkpointed({}, model.model.diffusion_model) if again else {}
    with pack.gradients():
        leaf = x.clone().requires_grad_()
        out = call(model, leaf, options)
        assert not comfy.model_management.in_training
        (found,) = torch.autograd.grad((out * to).sum(), leaf)
    assert float((found * along).sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_again(pack: Any, models: dict[str, Any], family: str) -> None:
    """Protects: with blocks computed again the output and the gradient have the same bits, for several rows
    too, much less is kept, and neither the module nor the given options are changed; several gradients of one
    forward, also after the region has been left, are right.
    """
    model = _model(models, family)
    module, options = model.model.diffusion_model, {"patches": {}, "patches_replace": {"dit": {}}}
    layers = {name: dict(vars(part)) for name, part in module.named_modules()}
    for rows in (1, 2):
        plain = gradient(pack, model, options, rows)
        again = gradient(pack, model, pack.checkpointed(options, module), rows)
        assert torch.equal(plain[0], again[0])
        assert torch.equal(plain[1], again[1])
        assert again[2] < 0.4 * plain[2]
        with torch.inference_mode():
            stock = call(model, latent(model, rows), {})
        torch.testing.assert_close(again[0], stock, rtol=1e-4, atol=1e-5)
    assert options == {"patches": {}, "patches_replace": {"dit": {}}}
    for name, part in module.named_modules():
        assert vars(part) == layers[name], name
    with pack.gradients():
        x = latent(model, 2).requires_grad_()
        out = call(model, x, pack.checkpointed({}, module)).square().sum()
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        (second,) = torch.autograd.grad(2 * out, x, retain_graph=True)
    (third,) = torch.autograd.grad(3 * out, x)
    assert torch.equal(first, plain[1])
    for times, found in ((2, second), (3, third)):
        assert float((found - times * first).norm() / found.norm()) < 1e-4


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_around_others(pack: Any, models: dict[str, Any], family: str) -> None:
    """Protects: another node's function around a block runs when the block runs again, and sees the block
    that it is in; a ControlNet's additions, which the host makes in place, and reference latents take part.
    """
    model = _model(models, family)
    seen: list[Any] = []

    def halved(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        found = extra["original_block"](args)
        return {**found, "img": 0.5 * found["img"]}

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Any, **_: Any) -> dict:
        seen.append((extra_options["block_type"], extra_options["block_index"]))
        return {"q": 1.5 * q}

    slots = {("double_block", 0): halved, ("single_block", 1): halved}
    options = {"patches": {"attn1_patch": [noted]}, "patches_replace": {"dit": slots}}
    tokens = 64 if family != "Flux.2" else 256
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(1, tokens, 64, generator=generator).to(device())
    more: dict[str, Any] = {"control": {"input": [residual, residual], "output": [None, residual]}}
    if family != "Chroma":
        more["ref_latents"] = [latent(model)]
    if family == "Flux.2":
        more["ref_latents_method"] = "index_timestep_zero"
    plain = gradient(pack, model, options, **more)
    first = list(seen)
    seen.clear()
    module = model.model.diffusion_model
    again = gradient(pack, model, pack.checkpointed(options, module), **more)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    assert seen[: len(first)] == first
    assert sorted(seen[len(first) :]) == sorted(first)
    without = gradient(pack, model, {})
    assert not torch.allclose(without[0], plain[0], rtol=0.1)
    with torch.inference_mode():
        inference = call(model, latent(model), pack.checkpointed(options, module), **more)
        assert torch.equal(inference, call(model, latent(model), options, **more))
    torch.testing.assert_close(inference, plain[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Chroma"])
@pytest.mark.parametrize("again", [False, True])
def test_weights_that_the_host_takes_back(pack: Any, family: str, again: bool) -> None:
    """Protects: where the host streams weights and spoils them after each layer, the gradient has the bits of
    resident ones.
    """
    found = {}
    for mode in ("resident", "streamed"):
        with memory_modes.MODES[mode]():
            model = small_models.loaded(small_dits.small_dit(family))
            with pack.gradients(mode == "streamed"):
                x = latent(model).requires_grad_()
                options = pack.checkpointed({}, model.model.diffusion_model) if again else {}
                (found[mode],) = torch.autograd.grad(call(model, x, options).square().sum(), x)
    assert torch.equal(found["streamed"], found["resident"])


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2"])
def test_half_precision(pack: Any, family: str) -> None:
    """Protects: gradients in bf16 have the same bits with blocks computed again, and the direction of those
    in float32.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = small_models.loaded(small_dits.small_dit(family, dtype=dtype))
        module = model.model.diffusion_model
        plain = gradient(pack, model, {}, dtype=dtype)
        again = gradient(pack, model, pack.checkpointed({}, module), dtype=dtype)
        assert torch.equal(plain[1], again[1])
        found[dtype] = plain[1]
    assert 0.9 < torch.cosine_similarity(*(part.flatten() for part in found.values()), dim=0) < 1


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["Flux.1 dev", "Chroma"])
def test_of_what_a_hook_adds(host: Host, pack: Any, models: dict[str, Any], family: str, again: bool) -> None:
    """Protects: what a hook joins to an attention's result, as a bridge does, gets the gradient that finite
    differences say, though the result is written to in place.
    """
    model = _model(models, family)
    module, network = model.model.diffusion_model, host.network(model)
    stock = pack.options({})["transformer_options"]

    def run(scale: torch.Tensor) -> torch.Tensor:
        options = network.install(
            pack.checkpointed(stock, module) if again else stock,
            lambda at: scale * at.rotated(at.q.flatten(2), slice(None)),
            lambda layer, attended, own: own + attended,
            size=(16, 16),
            self_layers=network.layers.values(),
        )
        return call(model, latent(model), options).double().square().sum()

    with pack.gradients():
        scale = torch.full((), 0.5, device=device(), requires_grad=True)
        (found,) = torch.autograd.grad(run(scale), scale)
        with torch.no_grad():
            high, low = (float(run(scale + step)) for step in (0.02, -0.02))
    assert float(found) == pytest.approx((high - low) / 0.04, rel=2e-2)
