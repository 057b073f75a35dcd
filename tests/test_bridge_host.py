"""A bridge beside what else people put on a model: ControlNet, LoRA hooks, other packs' patches, compilation,
UnifyEdit; and the tree of SD1.5.
"""

from __future__ import annotations

from typing import Any

import bridge_edit
import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_patcher
import comfy.ops
import memory_modes
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, counted, guided, random_bridge, sample
from closeness import same, tolerance
from host import Host, device
from test_bridge_formula import Blocks, Layer, attention_lora, close
from unify_edit import Edit

REFERENCE = small_models.latent(9)


pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture(scope="module")
def model(memory_mode: str) -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridged(host: Host, model: Any) -> Any:
    """It, with a random bridge."""
    return apply_bridge(host, model, random_bridge(host, model), REFERENCE)


def control_net() -> Any:
    """CONTROL_NET of the stock cldm kind for the small model, with random weights."""
    names = ("num_heads", "num_head_channels", "use_spatial_transformer", "legacy", "context_dim")
    shared = {name: small_models.UNET[name] for name in names}
    with memory_modes.resident():
        net = comfy.cldm.cldm.ControlNet(
            image_size=32,
            in_channels=4,
            model_channels=32,
            hint_channels=3,
            num_res_blocks=[1, 1, 1],
            channel_mult=(1, 2, 2),
            transformer_depth=[1, 1, 1],
            transformer_depth_middle=1,
            operations=comfy.ops.manual_cast,
            **shared,
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.parameters():
            fan = weight[0].numel() if weight.ndim > 1 else 100
            weight.copy_(torch.randn(weight.shape, generator=generator) / fan**0.5)
    return comfy.controlnet.ControlNet(net.eval(), load_device=device())


def test_control_net(host: Host, model: Any, bridged: Any) -> None:
    """Protects: a stock cldm ControlNet steers the picture and not the reference pass, in the stock sampler
    and under dual guidance, and its residuals are not used up by the reference pass.
    """
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = host.execute(
        "ControlNetApplyAdvanced",
        positive=small_models.conditioning(2),
        negative=small_models.conditioning(4),
        control_net=control_net(),
        image=hint,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    with counted(model) as calls:
        found = sample(host, bridged, positive, negative)
    assert calls.controlled == [False, True, True, True]
    assert not same(found, sample(host, bridged))
    assert not same(found, sample(host, model, positive, negative))
    (guider,) = host.execute(
        "DescEditDualGuider",
        model=bridged,
        edit=positive,
        unconditional=negative,
        image_guidance=3.0,
        text_guidance=3.0,
    )
    assert guided(host, guider).isfinite().all()


def test_control_net_as_the_source(host: Host, model: Any, bridged: Any) -> None:
    """Protects: a ControlNet on the source description is left out of the reference pass, as all are."""
    source, _ = host.execute(
        "ControlNetApplyAdvanced",
        positive=small_models.conditioning(1),
        negative=small_models.conditioning(4),
        control_net=control_net(),
        image=torch.rand(1, 128, 128, 3),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    found = sample(host, apply_bridge(host, model, random_bridge(host, model), REFERENCE, source=source))
    assert torch.equal(found, sample(host, bridged))


def test_other_packs_patches_are_chained(host: Host, model: Any) -> None:
    """Protects: attn1_replace, attn1_patch, attn1_output_patch and attn2 patches of other packs, set before
    or after the bridge as IP-Adapter does, keep working: at their layer Z is theirs and Z' is added to it.
    """

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
        return 2 * v

    def shifted(n: torch.Tensor, context: Any, value: Any, extra_options: dict) -> tuple:
        return n + 0.1, context + 0.1, value + 0.1

    def halved(out: torch.Tensor, extra_options: dict) -> torch.Tensor:
        return out / 2

    bridge, images = random_bridge(host, model), []

    def adapter(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
        images.append(len(q))
        return q

    def patched(which: Any) -> Any:
        other = which.clone()
        other.set_model_attn1_replace(doubled, "output", 3)
        other.set_model_attn1_patch(shifted)
        other.set_model_attn1_output_patch(halved)
        other.set_model_attn2_patch(shifted)
        other.set_model_attn2_replace(adapter, "middle", 0)
        return other

    after = patched(apply_bridge(host, model, bridge, REFERENCE))
    before = apply_bridge(host, patched(model), bridge, REFERENCE)
    first = sample(host, after, steps=1)
    with Blocks(host, model) as blocks:
        second = sample(host, before, steps=1)
    assert torch.equal(first, second)
    assert images == [2, 2]  # the reference pass, of one row, is not among them
    for layer in blocks.layers:
        r, h = blocks.normed[layer.key][0], blocks.normed[layer.key][-1] + 0.1
        own = Layer(model, bridge, layer)
        plain = own.plain(h)
        if layer.key == "output.3.0":
            plain = 2 * (h @ own.base["v"].T) @ own.base["out"].T + own.bias
        expected = own.output("linear", plain, own.bridged(h, r.expand(len(h), -1, -1)), 1.0) / 2
        close(blocks.output[layer.key][-1], expected)


def test_attention_override_is_asked(host: Host, bridged: Any) -> None:
    """Protects: `optimized_attention_override`, where sage attention and others live, is asked for the
    bridge's attention too, in the reference pass as in the steps.
    """
    asked = []

    def override(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(args[0].shape)
        return func(*args, **kwargs)

    patched = bridged.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(sample(host, patched, steps=1), sample(host, bridged, steps=1))
    reading = 2 * bridge_edit.LAYERS - 1  # self- and cross-attention, up to the last layer's self-attention
    assert len(asked) == reading - 1 + 3 * bridge_edit.LAYERS


def test_hooks(host: Host, model: Any, bridged: Any) -> None:
    """Protects: LoRA hooks on a conditioning work: a hook of no effect changes nothing, one with effect does,
    the reference is read without it, and two runs give the same bits.
    """
    lora = attention_lora(host, model)
    nothing = {name: weight * 0 for name, weight in lora.items()}

    def run(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        hooks = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning(small_models.conditioning(2), hooks=hooks)
        return sample(host, bridged, positive)

    plain = sample(host, bridged)
    assert same(run(nothing), plain)
    changed = run(lora)
    assert not same(changed, plain)
    assert torch.equal(run(lora), changed)
    assert torch.equal(sample(host, bridged), plain)


@memory_modes.only("resident")
def test_torch_compile(host: Host) -> None:
    """Protects: the host's TorchCompileModel gives the same latents with a bridge, with the reference in some
    rows only, and outside the bridge's range, whatever the compiled graph saw first.
    """

    one_level = {"transformer_depth": [1], "transformer_depth_output": [1, 1]}

    def dual(which: Any) -> torch.Tensor:
        (guider,) = host.execute(
            "DescEditDualGuider",
            model=which,
            edit=small_models.conditioning(2),
            unconditional=small_models.conditioning(4),
            image_guidance=2.0,
            text_guidance=2.0,
        )
        return guided(host, guider)

    model = small_models.small_unet(layout={"channel_mult": (1,), "num_res_blocks": [1], **one_level})
    late = apply_bridge(host, model, random_bridge(host, model), REFERENCE, start_percent=0.3)
    (compiled,) = host.execute("TorchCompileModel", model=late, backend="inductor")
    for run in (lambda which: sample(host, which), dual):
        expected = run(late)
        assert float((run(compiled) - expected).abs().max()) < 1e-4 * float(expected.std())
        assert not same(expected, run(model))


def test_unify_edit_with_a_bridge(host: Host, model: Any, bridged: Any) -> None:
    """Protects: UnifyEdit's sampler, which differentiates through the UNet, runs with a bridge and dual
    guidance in the same graph, and the bridge matters to it.
    """
    plain = Edit(host, model).run()
    edit = Edit(host, bridged)
    found = edit.run()
    assert found.isfinite().all()
    assert not same(found, plain)
    (edit.model,) = host.execute("DescEditDualGuidance", model=bridged, image_guidance=1.5, text_guidance=3.0)
    assert edit.run().isfinite().all()


def test_a_bridge_names_itself_inside_of_unify_edit(host: Host, bridged: Any) -> None:
    """Protects: what only the bridge cannot follow begins with the bridge's title, though the call is of
    UnifyEdit's sampler.
    """
    edit = Edit(host, bridged)
    edit.sampler_inputs.update(max_self_attn_res=4, cross_attn_res=4)  # layers that HyperTile leaves alone
    (edit.model,) = host.execute(
        "HyperTile", model=bridged, tile_size=64, swap_size=2, max_depth=0, scale_depth=False
    )
    with pytest.raises(ValueError, match=r"^Apply Attention Bridge: the self-attention of layer .* rows"):
        edit.run()


def widened(conditioning: Any, times: int) -> Any:
    """A small model's CONDITIONING for a model whose text is `times` as wide."""
    return [[text.repeat(1, 1, times), options] for text, options in conditioning]


def keeps_its_contracts(host: Host, model: Any, times: int, names: tuple[str, ...], **inputs: Any) -> None:
    """In these layouts, with a mask and dual guidance: one batch or one by one, guider or patch, and a second
    run give the same; the reference is read once; a bridge of strength 0 changes no bit.
    """
    bridge, source = random_bridge(host, model), widened(small_models.conditioning(1), times)
    reference = {"reference": REFERENCE, "source": source, "mask": bridge_edit.half_mask()}
    bridged = apply_bridge(host, model, bridge, **reference)
    off = apply_bridge(host, model, bridge, **reference, strength=0.0)
    scales = {"image_guidance": 1.5, "text_guidance": 3.0}
    (patched,) = host.execute("DescEditDualGuidance", model=bridged, **scales)
    rounding = 0.0
    for name in names:
        positive, negative, images = bridge_edit.layouts(host)[name]
        conds = [widened(positive, times), widened(negative, times)]
        latent = torch.zeros(images, 4, 16, 16)
        with counted(model) as calls:
            together = sample(host, patched, *conds, latent=latent, **inputs)
        assert (calls.rows[0], calls.timesteps[0]) == (1, 0)
        assert torch.equal(sample(host, patched, *conds, latent=latent, **inputs), together)
        (guider,) = host.execute(
            "DescEditDualGuider", model=bridged, edit=conds[0], unconditional=conds[1], **scales
        )
        assert same(guided(host, guider, latent=latent, **inputs), together), name
        plain = sample(host, model, *conds, latent=latent, **inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
            alone = sample(host, patched, *conds, latent=latent, **inputs)
            plain_alone = sample(host, model, *conds, latent=latent, **inputs)
        # A trained model magnifies the rounding of its batches: the stock runs so far say by how much.
        rounding = max(rounding, 3 * float((plain_alone - plain).abs().max()))
        assert float((alone - together).abs().max()) <= max(rounding, tolerance() * float(together.std())), (
            name
        )
        assert torch.equal(sample(host, off, *conds, latent=latent, **inputs), plain)
        assert not same(together, plain)


@memory_modes.only("resident")
def test_tiny_studio(host: Host) -> None:
    """Protects: the contracts on the Tiny Studio, in every layout of conditionings."""
    keeps_its_contracts(host, host.execute("DescEditTinyStudio")[0], 4, bridge_edit.LAYOUTS, steps=2)


@memory_modes.only("resident")
def test_tree_of_sd15(host: Host) -> None:
    """Protects: on SD1.5's own module tree, with random weights, all 16 layers fire, the reference is read
    once, a fresh bridge leaves every bit as it is, and the contracts hold.
    """
    sd15 = host.pack_module("lab.bench.random_sd15")
    model = sd15.random_sd15(width=sd15.NARROW)
    positive, negative, source = (widened(small_models.conditioning(seed), 24) for seed in (2, 4, 1))
    inputs: dict[str, Any] = {"positive": positive, "negative": negative, "steps": 2}
    inputs["latent"] = torch.zeros(1, 4, 8, 8)
    plain = sample(host, model, **inputs)
    (fresh,) = host.execute("DescEditNewBridge", model=model)
    assert len(fresh.model.settings.widths) == 16
    with counted(model) as calls:
        reference = small_models.latent(9, size=(8, 8))
        found = sample(host, apply_bridge(host, model, fresh, reference, source=source), **inputs)
    assert calls.rows == [1, 2, 2]
    assert torch.equal(found, plain)
    keeps_its_contracts(host, model, 24, ("an area", "odd text"), steps=1)
