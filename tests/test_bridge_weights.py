"""How a run reads a bridge's weights and the output projections: once, right for every kind of layer, merged
where that pays, and with few operations a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import comfy.samplers
import comfy.sd
import pytest
import small_models
import torch
from bridge_edit import LAYERS, apply_bridge, random_bridge, sample
from closeness import same
from comfy.model_patcher import LowVramPatch
from host import Host, device
from test_bridge_formula import attention_lora
from torch.utils._pytree import tree_leaves

REFERENCE = small_models.latent(9)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


def _linear(operations: Any = comfy.ops.disable_weight_init) -> Any:
    layer = operations.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
    return layer


def _with(change: Callable[[Any], Any]) -> Any:
    layer = _linear()
    change(layer)
    return layer


class _OtherWeight(torch.nn.Parameter):
    """As of a quantised layer, whose values are not those of the tensor."""


PLAIN: dict[str, Callable[[], Any]] = {
    "linear": _linear,
    "cast": lambda: _linear(comfy.ops.manual_cast),
    "partly loaded LoRA": lambda: _with(
        lambda layer: setattr(layer, "weight_function", [LowVramPatch("key", {})])
    ),
}
OTHER: dict[str, Callable[[], Any]] = {
    "fp8": lambda: _linear(comfy.ops.fp8_ops),
    "mixed precision": lambda: comfy.ops.mixed_precision_ops({}).Linear(4, 4),
    "torch's own": lambda: torch.nn.Linear(4, 4),
    "not loaded": lambda: _with(lambda layer: setattr(layer, "weight", None)),
    "a weight of its own kind": lambda: _with(
        lambda layer: setattr(layer, "weight", _OtherWeight(torch.ones(4, 4)))
    ),
    "bypass": lambda: _with(lambda layer: setattr(layer, "forward", lambda x: 2 * x)),
    "a hook": lambda: _with(lambda layer: layer.register_forward_hook(lambda *_: None)),
    "a function on the weight": lambda: _with(
        lambda layer: setattr(layer, "weight_function", [lambda weight: 2 * weight])
    ),
    "a function on the bias": lambda: _with(
        lambda layer: setattr(layer, "bias_function", [lambda bias: 2 * bias])
    ),
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_only_plain_layers_are_read(host: Host, name: str) -> None:
    """Protects: a layer is merged only if its weight and bias are all that it computes with; one that is
    quantised, changed by a node, or not a Linear of the host is called as it is.
    """
    plain_linear = host.pack_module("patches.host.weights").plain_linear
    layer = (PLAIN | OTHER)[name]()
    for module in (layer, torch.nn.Sequential(layer, torch.nn.Dropout(0.0))):
        assert plain_linear(module) is (layer if name in PLAIN else None)
    assert plain_linear(torch.nn.Sequential(layer, torch.nn.SiLU())) is None
    assert plain_linear(torch.nn.Identity()) is None


@pytest.mark.parametrize("kind", ["bypass", "wrapper"])
def test_changed_layers_keep_their_change(host: Host, kind: str) -> None:
    """Protects: a LoRA in bypass mode, and a function on a weight, act on Z' as on Z, in a run long enough to
    merge: the latents are those of the same LoRA on the weights, or of the weight as the function makes it.
    """
    model = small_models.small_unet()
    bridge = random_bridge(host, model)
    if kind == "bypass":
        lora = attention_lora(host, model)
        expected, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
        changed, _ = comfy.sd.load_bypass_lora_for_models(model, None, lora, 0.8, 0.0)
    else:
        expected, changed = model.clone(), model.clone()
        for layer in host.network(model).layers.values():
            key = f"diffusion_model.{layer.path}.attn1.to_out.0.weight"
            expected.add_patches({key: ("diff", (torch.eye(layer.width) / 2,))})
            changed.add_weight_wrapper(key, lambda weight: weight + torch.eye(len(weight)).to(weight) / 2)
    found = [
        sample(host, apply_bridge(host, which, bridge, REFERENCE), steps=8) for which in (expected, changed)
    ]
    assert same(found[1], found[0])
    assert not same(found[0], sample(host, apply_bridge(host, model, bridge, REFERENCE), steps=8))


@pytest.mark.parametrize("fusion", ["linear", "add"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_rounds_once(host: Host, dtype: torch.dtype, fusion: str) -> None:
    """Protects: a merged matrix and bias in half precision are the exact ones, rounded once, also beside a
    large bias; and they share no memory with the model or the bridge.
    """
    model = small_models.loaded(small_models.small_unet(dtype=dtype))
    bridge, network = random_bridge(host, model, fusion=fusion).model.to(device()), host.network(model)
    key, project = next(iter(network.outputs.items()))
    with torch.inference_mode():
        project[0].bias.fill_(100.0)
        prepared = host.pack_module("patches.bridge.weights").prepare(
            bridge, network, lambda _: True, dtype, device()
        )
    output, learned = prepared[key].output, bridge.layer(key)
    expected = (
        project[0].weight.double() + 2 * learned.out.up.weight.double() @ learned.out.down.weight.double()
    )
    bias = project[0].bias.double()
    if fusion == "linear":
        expected, bias = learned.fuse.weight.double() @ expected, learned.fuse.weight.double() @ bias
    for found, exact in ((output.matrix, expected), (output.bias, bias)):
        rounding = torch.finfo(dtype).eps * exact.abs() + 1e-5 * float(exact.abs().max())
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= rounding).all()
    owners = {
        weight.untyped_storage().data_ptr() for weight in [*model.model.parameters(), *bridge.parameters()]
    }
    kept = tree_leaves(prepared)
    tensors = [leaf for leaf in kept if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > 4 * LAYERS
    assert owners.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in tensors)


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
def test_operations_of_a_step(host: Host, model: Any, direction: str, steps: int) -> None:
    """Protects: at each layer a step adds low-rank products onto the host's own projections (two for Q, three
    for K and V), an attention, one output matrix and one sum; three more where a run is too short to merge.
    """
    bench = host.pack_module("lab.bench.operations")
    measuring = host.pack_module("lab.bench.measuring")
    bridge = random_bridge(host, model, direction=direction)
    counts = []
    for which in (model.clone(), apply_bridge(host, model, bridge, REFERENCE)):
        measuring.choose_attention(which)
        if device().type != "cpu":
            which.model_options["transformer_options"]["optimized_attention_override"] = (
                measuring.torch_attention
            )
        found = bench.Operations()

        def run(
            call: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, found: Any = found, **_: Any
        ) -> Any:
            sigma = sigmas[0] * x.new_ones([len(x)])
            call(x, sigma, **extra_args)
            with found:
                call(x, sigma, **extra_args)
            return x

        guider = comfy.samplers.CFGGuider(which)
        guider.set_conds(small_models.conditioning(2), small_models.conditioning(4))
        guider.set_cfg(3.0)
        sigmas = torch.linspace(10.0, 0.0, steps + 1)
        with torch.inference_mode():
            guider.sample(REFERENCE, torch.zeros(1, 4, 16, 16), comfy.samplers.KSAMPLER(run), sigmas)
        counts.append(found.computed)
    each = (5 if direction == "edit_queries" else 6) + (3 if steps == 1 else 0)
    assert counts[1] - counts[0] == each * LAYERS
