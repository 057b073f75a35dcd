"""Weights that the host takes back as soon as their layer has run: no gradient keeps a view of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import small_models
import torch
import torch.nn.functional as F
import unify_edit
from bridge_edit import apply_bridge, half_mask, layouts, random_bridge, sample
from host import Host, device
from memory_modes import MODES
from training_settings import batch_of

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
BOTH = ("resident", "streamed")
# How a weight [4, 4] meets an activation [4, 4] in the layers of the host and of other packs.
FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "conv1d": lambda x, w: F.conv1d(x[None], w[:, :, None]),
    "conv2d": lambda x, w: F.conv2d(x[None, :, None], w[:, :, None, None], w[0]),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x[None, :, None], w[:, :, None, None]),
    "group_norm": lambda x, w: F.group_norm(x, 2, w[0], w[1]),
    "layer_norm": lambda x, w: F.layer_norm(x, [4], w[0], w[1]),
    "rms_norm": lambda x, w: F.rms_norm(x, [4], weight=w[0]),
    "embedding": lambda x, w: x * F.embedding(torch.tensor([3, 1, 0, 2]), w),
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "matmul": lambda x, w: x @ w.T,
    "from the left": lambda x, w: w @ x,
    "mul": lambda x, w: w * x,
    "mul in place": lambda x, w: x.clone().mul_(w),
    "*=": lambda x, w: _times(x.clone(), w),
    "addcmul in place": lambda x, w: x.clone().addcmul_(x, w),
    "einsum": lambda x, w: torch.einsum("ij,kj->ik", x, w),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, x]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None].mT),
    "in a list": lambda x, w: torch.cat([x, w]).square() * torch.cat([w, x]),
    "by keyword": lambda x, w: torch.lerp(x, end=x * 2, weight=w),
    "dispatched": lambda x, w: torch.ops.aten.mm.default(x, w),
    "low rank beside a layer": lambda x, w: F.linear(x, w) + F.linear(F.linear(x, w[:2]), w[:, :2]) * 0.5,
}


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x *= weight
    return x


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet, stored in half precision and cast for each call."""
    return small_models.loaded(small_models.small_unet(dtype=torch.float16))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(host: Host, name: str, inference: bool) -> None:
    """Protects: whatever torch function a streamed weight enters by, the gradient is the one of a weight that
    stays; also of a second gradient, and where the weight is an inference tensor.
    """
    gradients = host.pack_module("patches.host.autograd").gradients
    generator = torch.Generator().manual_seed(0)
    start, values = (torch.randn(4, 4, generator=generator) for _ in range(2))
    found = {}
    for mode in BOTH:
        with torch.inference_mode(inference):
            buffer = torch.cat([torch.ones(3), values.flatten()])
        with gradients(mode == "streamed"):
            x = start.clone().requires_grad_()
            out = FUNCTIONS[name](x, buffer[3:].view(4, 4))
            if mode == "streamed":
                ctypes.memset(buffer.data_ptr(), 255, buffer.nbytes)
            loss = out.square().sum()
            found[mode] = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(found["streamed"], found["resident"], **CLOSE)


def test_what_is_written_to_stays_itself(host: Host) -> None:
    """Protects: where weights are streamed, a tensor without a gradient can still be written to, by every
    way to do so, and the result has the gradient.
    """
    gradients = host.pack_module("patches.host.autograd").gradients
    with gradients(True):
        x = torch.ones(2, 2, requires_grad=True)
        target = torch.zeros(5, 2)
        rows = torch.tensor([1])
        target[0].add_(x[0])
        target.index_add_(0, rows, x[:1], alpha=2.0)
        target[2] = x[0] * 3
        target[3:] += x[:1] * 4
        torch.ops.aten.mul_.Tensor(target[4:], x[:1] * 2)
        assert target[:, 0].tolist() == [1, 2, 3, 4, 8]
        (gradient,) = torch.autograd.grad(target.sum(), x)
    assert gradient.tolist() == [[26, 26], [0, 0]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unify(host: Host, model: Any, checkpointing: bool) -> None:
    """Protects: a whole edit with streamed weights is the one with resident weights, and so are its losses
    and the norms of its gradients.
    """
    found = {}
    for mode in BOTH:
        with MODES[mode]():
            edit = unify_edit.Edit(host, model, steps=2)
            edit.sampler_inputs = {"checkpointing": checkpointing}
            found[mode] = edit.run(), edit.trace().values
    torch.testing.assert_close(found["streamed"][0], found["resident"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["streamed"][1], found["resident"][1], **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
@pytest.mark.parametrize("self_bridge", [False, True])
def test_training_gradient(
    host: Host, model: Any, checkpointing: bool, direction: str, self_bridge: bool
) -> None:
    """Protects: loss and gradient of a training step with streamed weights are those with resident ones."""
    gradient, objective = host.pack_module("patches.host.autograd"), host.pack_module("training.objective")
    bridges, core = host.pack_module("models.bridge"), host.pack_module("patches.bridge.core")
    source, edit = (small_models.latent(seed, 2).to(device()) * 0.18215 for seed in (1, 2))
    texts = [small_models.conditioning(seed, batch=2)[0][0].to(device()) for seed in (3, 4)]
    batch = batch_of(host, source, edit, *texts, texts[0][:1] * 0, source[:1] * 0)
    how = objective.Objective(dropout="none")
    sample = objective.sample_noise(how, [1, 2], (4, 16, 16), 1000)
    start = random_bridge(host, model, direction=direction, reference_self_bridge=self_bridge).model
    found = {}
    for mode in BOTH:
        with MODES[mode](), gradient.gradients(mode == "streamed"):
            learned = bridges.AttentionBridge(start.settings, torch.float32, device())
            learned.load_state_dict(start.state_dict())
            weights = [weight.requires_grad_() for weight in learned.parameters()]
            cache = core.ReferenceCache(learned, host.network(model))
            losses = objective.losses(model.model, cache, batch, sample, how, checkpointing)
            found[mode] = losses.detach(), *torch.autograd.grad(losses.mean(), weights)
    torch.testing.assert_close(found["streamed"], found["resident"], **CLOSE)


@pytest.mark.parametrize(("free", "again"), [(2**36, False), (2**16, True)])
def test_short_memory_computes_layers_again(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch, free: int, again: bool
) -> None:
    """Protects: where weights are streamed and their copies do not fit, layers are computed again, and where
    they fit they are not; with resident weights never.
    """
    target = host.pack_module("patches.unify.target")
    checkpointed, seen = target.checkpointed, []

    def note(*args: Any) -> Any:
        seen.append(mode)
        return checkpointed(*args)

    monkeypatch.setattr(target, "checkpointed", note)

    def left(dev: Any = None, torch_free_too: bool = False) -> Any:
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", left)
    for mode in BOTH:
        with MODES[mode]():
            unify_edit.Edit(host, model, steps=1).run()
    # A card without memory has no resident weights either: the host leaves them where they are.
    short = {"streamed"} if device().type == "cpu" else set(BOTH)
    assert set(seen) == (short if again else set())


def test_memory_of_copies(host: Host, model: Any) -> None:
    """Protects: the bytes of copies that the host is asked for are those of the weights on the way to the
    attention that is recorded, counted by hand; of the largest layer where layers are computed again.
    """
    network, unet = host.network(model), model.model.diffusion_model
    copied_bytes = host.pack_module("patches.unify.memory").copied_bytes
    last = network.layers["middle.0.0"]
    on_the_way = [layer for block in unet.input_blocks[1:] for layer in block] + [*unet.middle_block[:2]]
    weights = [sum(weight.numel() for weight in layer.parameters()) for layer in on_the_way]
    assert copied_bytes(network, [last], 2, False) == 2 * sum(weights)
    assert copied_bytes(network, [last], 2, True) == 2 * max(weights)


@pytest.mark.parametrize("layout", ["plain", "two positives"])
@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
def test_bridge(host: Host, model: Any, direction: str, layout: str) -> None:
    """Protects: what a run with a bridge keeps of the reference pass, and the output matrices that it merges,
    are no views of streamed weights, its own or the model's.
    """
    positive, negative, _ = layouts(host)[layout]
    found = {}
    for mode in BOTH:
        with MODES[mode]():
            bridge = random_bridge(host, model, direction=direction, reference_self_bridge=True)
            patched = apply_bridge(host, model, bridge, small_models.latent(9), mask=half_mask())
            found[mode] = sample(host, patched, positive, negative)
    torch.testing.assert_close(found["streamed"], found["resident"], rtol=0, atol=1e-5)
