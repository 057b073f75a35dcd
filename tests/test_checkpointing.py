"""Gradient checkpointing through the host's own door: the same gradients, less kept, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bridge_edit
import pytest
import small_models
import torch
from host import Host, device
from training_settings import batch_of


@pytest.fixture(scope="module")
def pack(host: Host) -> Any:
    """What is tested, and what it is tested with."""
    return SimpleNamespace(
        checkpointed=host.pack_module("patches.host.checkpointing").checkpointed,
        gradients=host.pack_module("patches.host.autograd").gradients,
        objective=host.pack_module("training.objective"),
        ReferenceCache=host.pack_module("patches.bridge.core").ReferenceCache,
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet whose weights are inference tensors, as the executor's are."""
    return small_models.loaded(small_models.small_unet())


def kept_bytes(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What `compute` gives, and the bytes of all storages that autograd keeps for its gradient."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return result, sum(storages.values())


def call(model: Any, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """One call of the UNet."""
    text = small_models.conditioning(2, batch=len(x))[0][0].to(x)
    times = torch.full((len(x),), 500.0, device=x.device)
    return model.model.diffusion_model(x, times, context=text, transformer_options=options)


def test_alone(model: Any, pack: Any) -> None:
    """Protects: with nothing but the UNet's own layers, the output and the latent's gradient are the same,
    much less is kept, and neither the module nor the given options are changed.
    """
    layers = {name: dict(vars(module)) for name, module in model.model.diffusion_model.named_modules()}
    found = {}
    for name in ("kept", "again"):
        options: dict[str, Any] = {"patches": {}}
        used = pack.checkpointed(options, model.model.diffusion_model) if name == "again" else options
        with pack.gradients():
            x = small_models.latent(3, batch=2).to(device()).requires_grad_()
            out, kept = kept_bytes(lambda x=x, used=used: call(model, x, used))
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found[name] = out.detach(), gradient, kept
        assert options["patches"] == {}
    assert torch.equal(found["kept"][0], found["again"][0])
    torch.testing.assert_close(found["again"][1], found["kept"][1], rtol=1e-6, atol=1e-6)
    assert found["again"][2] < 0.3 * found["kept"][2]
    for name, module in model.model.diffusion_model.named_modules():
        assert vars(module) == layers[name], name


def test_several_gradients_of_one_forward(model: Any, pack: Any) -> None:
    """Protects: a forward can be differentiated more than once, also after the region has been left."""
    with pack.gradients():
        x = small_models.latent(3).to(device()).requires_grad_()
        out = call(model, x, pack.checkpointed({}, model.model.diffusion_model)).square().sum()
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        (second,) = torch.autograd.grad(2 * out, x, retain_graph=True)
    (third,) = torch.autograd.grad(3 * out, x)
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(third, 3 * first)


@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
@pytest.mark.parametrize("self_bridge", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_with_a_bridge(
    host: Host, model: Any, pack: Any, direction: str, self_bridge: bool, mixed: bool
) -> None:
    """Protects: the bridge's patches, which hand values from one to the next inside a layer, are recomputed
    as they were: every weight of the bridge gets the same gradient, in every direction, with and without the
    reference's own bridge, and with rows that have no image.
    """
    bridge = bridge_edit.random_bridge(host, model, direction=direction, reference_self_bridge=self_bridge)
    weights = [weight.requires_grad_() for weight in bridge.model.to(device()).parameters()]
    generator = torch.Generator().manual_seed(0)
    latents, texts = (3, 4, 16, 16), (3, 7, small_models.CONTEXT_WIDTH)
    shapes = latents, latents, texts, texts, (1, *texts[1:]), (1, *latents[1:])
    batch = batch_of(host, *(torch.randn(*shape, generator=generator).to(device()) for shape in shapes))
    plan = pack.objective.Objective(dropout="none")
    sample = pack.objective.sample_noise(plan, [1, 2, 3], latents[1:], 1000)
    sample.no_image[1] = mixed
    found = {}
    for checkpointing in (False, True):
        with pack.gradients():
            cache = pack.ReferenceCache(bridge.model, host.network(model))
            loss, kept = kept_bytes(
                lambda cache=cache, on=checkpointing: pack.objective.losses(
                    model.model, cache, batch, sample, plan, on
                ).sum()
            )
            found[checkpointing] = loss.detach(), torch.autograd.grad(loss, weights), kept
    assert torch.equal(found[False][0], found[True][0])
    for plain, again in zip(found[False][1], found[True][1], strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)
    assert found[True][2] < 0.5 * found[False][2]


def test_others_in_the_slots(model: Any, pack: Any) -> None:
    """Protects: another pack's function in the slot still runs the layers it asked for, an attention patch
    sees the block that it is in, when it runs again as well, and the host keeps counting transformers.
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    seen: list[Any] = []

    def residual(layer: Any, x: torch.Tensor, emb: torch.Tensor, *rest: Any) -> torch.Tensor:
        return 0.5 * layer(x, emb)

    def attended(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        seen.append((extra["block"], extra["block_index"], extra["transformer_index"]))
        return n, context, value

    patches = {"forward_timestep_embed_patch": [(ResBlock, residual)], "attn1_patch": [attended]}
    found = {}
    for name in ("kept", "again"):
        seen.clear()
        with pack.gradients():
            x = small_models.latent(3).to(device()).requires_grad_()
            options: dict[str, Any] = {"patches": patches}
            used = pack.checkpointed(options, model.model.diffusion_model) if name == "again" else options
            out = call(model, x, used)
            first = list(seen)
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found[name] = out.detach(), gradient, first, sorted(seen[len(first) :])
    for plain, again in zip(found["kept"][:2], found["again"][:2], strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)
    assert found["again"][2] == found["kept"][2]
    assert [index for *_, index in found["again"][2]] == list(range(len(found["again"][2])))
    assert found["again"][3] == sorted(found["kept"][2])
    with torch.no_grad(), pack.gradients():
        plain = call(model, small_models.latent(3).to(device()), {"patches": patches})
    torch.testing.assert_close(plain, found["kept"][0], rtol=1e-5, atol=1e-5)


def test_no_gradient_no_recomputation(model: Any, pack: Any) -> None:
    """Protects: without gradients a checkpointed call is the plain one."""
    options: dict[str, Any] = {"patches": {}}
    with torch.inference_mode():
        x = small_models.latent(3).to(device())
        again = pack.checkpointed(options, model.model.diffusion_model)
        assert torch.equal(call(model, x, again), call(model, x, options))
