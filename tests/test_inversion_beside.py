"""Inversion and UnifyEdit beside other packs: what guides does not act, what skips steps is named, and the
same MODEL made again is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bridge_edit
import comfy.model_sampling
import comfy.sd
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, random_bridge, sample
from comfy.patcher_extension import WrappersMP
from host import Host, device
from test_bridge_formula import attention_lora
from unify_edit import Edit, euler

SIGMAS = torch.tensor([2.0, 1.2, 0.6, 0.0])


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


def invert(host: Host, model: Any, **inputs: Any) -> torch.Tensor:
    """The path, from noise to image."""
    inversion, *_ = host.execute(
        "DescEditInvert",
        model=model,
        latent={"samples": small_models.latent(3)},
        source=small_models.conditioning(1),
        sigmas=SIGMAS,
        refine=1,
        **inputs,
    )
    return inversion.trajectory


def with_function(kind: str, model: Any) -> Any:
    """The MODEL with something that guides, of each kind that the host knows."""
    patched = model.clone()

    def wrapper(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 3.0 * executor(*args, **kwargs)

    if kind == "cfg":
        patched.set_model_sampler_cfg_function(lambda args: 3.0 * args["cond"])
    elif kind == "pre":
        patched.set_model_sampler_pre_cfg_function(lambda args: [3.0 * out for out in args["conds_out"]])
    elif kind == "post":
        patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + args["uncond"][0]["x"])
    elif kind == "batch":
        patched.set_model_sampler_calc_cond_batch_function(lambda args: [args["input"]] * 2)
    else:
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "guide", wrapper)
    return patched


@pytest.mark.parametrize("kind", ["cfg", "pre", "post", "batch", "predict"])
def test_what_guides_does_not_act(host: Host, model: Any, kind: str) -> None:
    """Protects: the path is the description's alone, bit for bit, whatever guides on the MODEL; functions
    that need a second description do not crash.
    """
    assert torch.equal(invert(host, with_function(kind, model)), invert(host, model))


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("APG", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0}),
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
        ("PerturbedAttentionGuidance", {"scale": 3.0}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("DescEditDualGuidance", {"image_guidance": 2.0, "text_guidance": 5.0}),
    ],
)
def test_guidance_nodes_do_not_act(host: Host, model: Any, node: str, inputs: dict) -> None:
    """Protects: the same for nodes of the host and for our own."""
    (patched,) = host.execute(node, model=model, **inputs)
    assert torch.equal(invert(host, patched), invert(host, model))


@pytest.mark.parametrize("kind", ["attention", "function", "apply", "unet", "batch wrapper"])
def test_what_changes_the_network_acts(host: Host, model: Any, kind: str) -> None:
    """Protects: what changes the network is called in every evaluation of the path, at every door, and what
    an attention patch does is in the path.
    """
    patched, seen = model.clone(), []

    def wrap(executor: Callable, *args: Any, **kwargs: Any) -> Any:
        seen.append(kind)
        return executor(*args, **kwargs)

    def function(apply_model: Callable, args: dict[str, Any]) -> torch.Tensor:
        seen.append(kind)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def attention(q: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        seen.append(kind)
        return 1.5 * q, context, value

    if kind == "attention":
        patched.set_model_attn2_patch(attention)
    elif kind == "function":
        patched.set_model_unet_function_wrapper(function)
    else:
        doors = {
            "apply": WrappersMP.APPLY_MODEL,
            "unet": WrappersMP.DIFFUSION_MODEL,
            "batch wrapper": WrappersMP.CALC_COND_BATCH,
        }
        patched.add_wrapper_with_key(doors[kind], "network", wrap)
    path = invert(host, patched)
    assert len(seen) >= 2 * (len(SIGMAS) - 1)
    assert torch.equal(path, invert(host, model)) == (kind != "attention")


def test_a_path_that_is_not_finite_is_refused(host: Host, model: Any) -> None:
    """Protects: a network that overflows is an error that says from where on and what does that."""
    patched, calls = model.clone(), []

    def overflow(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return executor(*args, **kwargs) * (float("inf") if len(calls) > 2 else 1.0)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "overflow", overflow)
    with pytest.raises(ValueError, match=r"Invert Image .DDIM.: the path is not finite from step 2 of 3 on"):
        invert(host, patched)


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_the_hosts_caches_are_refused(host: Host, model: Any, node: str) -> None:
    """Protects: Invert and UnifyEdit Sampler name the host's node that skips steps, before they run."""
    (cached,) = host.execute(node, model=model)
    with pytest.raises(ValueError, match=f"Invert Image .DDIM.: the MODEL has {node}"):
        invert(host, cached)
    edit = Edit(host, model)
    edit.model = cached
    with pytest.raises(ValueError, match=f"UnifyEdit Sampler: the MODEL has {node}"):
        edit.run()


def skipping(model: Any, kind: str) -> Any:
    """The MODEL with a cache of a pack, which answers every second call from what it kept."""
    patched, kept = model.clone(), []

    def skip(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        if kept:
            return kept.pop()
        kept.append(run())
        return kept[0]

    def function(apply_model: Callable, args: dict[str, Any]) -> torch.Tensor:
        return skip(lambda: apply_model(args["input"], args["timestep"], **args["c"]))

    def wrapper(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return skip(lambda: executor(*args, **kwargs))

    if kind == "function":
        patched.set_model_unet_function_wrapper(function)
    else:
        patched.add_wrapper_with_key(kind, "cache", wrapper)
    return patched


@pytest.mark.parametrize("kind", ["function", WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL])
def test_other_caches_are_found_in_an_inversion(host: Host, model: Any, kind: str) -> None:
    """Protects: a node that keeps the network from running at a step is found, at whatever door it does."""
    with pytest.raises(ValueError, match=r"Invert Image .DDIM.: the network did not run at a step"):
        invert(host, skipping(model, kind))


@pytest.mark.parametrize(
    "kind", ["function", WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL, WrappersMP.PREDICT_NOISE]
)
def test_other_caches_are_found_in_an_edit(host: Host, model: Any, kind: str) -> None:
    """Protects: the same in UnifyEdit's sampler, where a node can skip the guider too, and also in steps that
    are not optimised.
    """
    edit = Edit(host, model)
    edit.model = skipping(model, kind)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    with pytest.raises(ValueError, match=r"UnifyEdit Sampler: the network did not run at a step"):
        edit.run()


def test_zero_balance_is_stock_euler(host: Host, model: Any) -> None:
    """Protects: with both losses off the edit is the stock Euler sampler's, to rounding: the latent's way
    through the VAE's scale and back, 1e-6 of its deviation, which this steep random model makes larger.
    """
    edit = Edit(host, model)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    found, stock = edit.run(), edit.run(sampler=euler(host))
    assert float((found - stock).abs().max() / stock.std()) < 5e-5


@pytest.mark.parametrize("load", [comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models])
@pytest.mark.parametrize("mode", ["ddim", "virtual"])
def test_an_inversion_knows_its_lora_by_content(host: Host, model: Any, load: Callable, mode: str) -> None:
    """Protects: an INVERSION fits the MODEL whose LoRA was loaded again, before and after a run, and no
    MODEL with another LoRA, another strength or none.
    """

    def lora(gain: float = 1.0, strength: float = 0.8) -> Any:
        tensors = {name: gain * tensor for name, tensor in attention_lora(host, model).items()}
        return load(model, None, tensors, strength, 0.0)[0]

    edit = Edit(host, lora(), mode=mode)
    edit.run()
    edit.model = lora()
    edit.run()
    for other in (lora(gain=1.01), lora(strength=0.81), model):
        edit.model = other
        with pytest.raises(ValueError, match=r"has other LoRAs or weight patches"):
            edit.run()


def spread(model: Any) -> Any:
    """The MODEL as the host runs it on two GPUs; two names of the CPU stand for them."""
    patched = model.clone()

    def devices(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        guider.model_options["multigpu_clones"] = dict.fromkeys(
            [torch.device(device().type), torch.device(device().type, 0)], guider.model_patcher
        )
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "devices", devices)
    return patched


@pytest.mark.skipif(device().type != "cpu", reason="torch refuses a card by two names")
def test_two_devices(host: Host, model: Any) -> None:
    """Protects: on two GPUs an inversion and an edit are what they are on one, and a bridge is refused."""
    two = spread(model)
    torch.testing.assert_close(invert(host, two), invert(host, model), rtol=0, atol=1e-5)
    edit = Edit(host, model)
    expected = edit.run()
    edit.model = two
    torch.testing.assert_close(edit.run(), expected, rtol=0, atol=1e-4 * float(expected.std()))
    bridged = apply_bridge(host, two, random_bridge(host, model), small_models.latent(9))
    with pytest.raises(ValueError, match=r"Apply Attention Bridge: the sampling is spread over several GPUs"):
        sample(host, bridged)


@pytest.mark.parametrize(
    ("node", "inputs", "timestep"),
    [
        (None, {}, 0.0),
        ("ModelSamplingDiscrete", {"sampling": "lcm"}, 0.0),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}, 0.0),
        ("ModelSamplingContinuousEDM", {"sampling": "eps", "sigma_min": 0.002}, -1.5537),
        ("ModelSamplingContinuousV", {"sampling": "v_prediction", "sigma_min": 0.03}, 0.0191),
    ],
)
def test_the_reference_is_clean(
    host: Host, model: Any, node: str | None, inputs: dict, timestep: float
) -> None:
    """Protects: the reference's timestep says "no noise" in the model sampling at hand: 0 of a discrete
    schedule, else what the lowest noise level is called (log(sigma)/4, or 2 atan(sigma)/pi).
    """
    which = host.execute(node, model=model, **inputs)[0] if node else model
    bridged = apply_bridge(host, which, random_bridge(host, model), small_models.latent(9))
    seen: list[float] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args: seen.append(float(args[1].max()))
    )
    try:
        found = sample(host, bridged, steps=bridge_edit.STEPS)
    finally:
        handle.remove()
    assert seen[0] == pytest.approx(timestep, abs=1e-3)
    assert found.isfinite().all()
