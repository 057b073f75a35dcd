"""UnifyEdit on other module trees and predictions, and together with what else a graph may hold."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.sd
import comfy.supported_models
import pytest
import small_models
import torch
from comfy.model_base import ModelType
from host import Host
from unify_edit import Edit, FakeControl, box_mask, euler

SD2_LAYOUT = {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 8}


class _SmallSD2(comfy.supported_models.SD20):
    unet_config: ClassVar = {
        **comfy.supported_models.SD20.unet_config,
        "context_dim": small_models.CONTEXT_WIDTH,
        "model_channels": 32,
    }
    unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": 8}

    def model_type(self, state_dict: Any, prefix: str = "") -> ModelType:
        """SD2.x at 768: v-prediction."""
        return ModelType.V_PREDICTION


def sd2() -> Any:
    """A small UNet with SD2.x's module tree and v-prediction, through the host's loader."""
    family: Any = _SmallSD2
    comfy.supported_models.models.insert(0, family)
    try:
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model_state_dict(small_models.unet_state_dict(layout=SD2_LAYOUT))
    finally:
        comfy.supported_models.models.remove(family)
    assert isinstance(model.model.model_config, _SmallSD2)
    assert model.model.model_type == ModelType.V_PREDICTION
    return model


@pytest.mark.parametrize("name", ["sd15", "sd15 v", "sd2 v", "sdxl"])
@pytest.mark.parametrize("mode", ["ddim", "virtual"])
def test_module_trees_and_predictions(host: Host, name: str, mode: str) -> None:
    """Protects: every supported module tree, with noise and with v-prediction, is inverted and edited, both
    losses find their way back at every step, and with no strength the source comes back.
    """
    if name == "sd2 v":
        model = sd2()
    elif name == "sdxl":
        model = small_models.small_unet(layout=small_models.SDXL_LAYOUT)
    else:
        model = small_models.small_unet()
    if name == "sd15 v":
        (model,) = host.execute("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    edit = Edit(host, model, mode=mode, refine=8)
    edit.sampler_inputs["mask"] = box_mask()
    edit.run(euler(host))  # so that the model is loaded
    before = small_models.fingerprint(model)
    edited = edit.run()
    assert small_models.fingerprint(model) == before
    assert bool(torch.isfinite(edited).all())
    assert bool((edit.trace().values > 0).all())
    assert bool(edit.trace().usable.all())
    assert torch.equal(edit.run(), edited)
    edit.positive, edit.cfg = small_models.conditioning(1), 1.0
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    expected = edit.run(euler(host)) if mode == "ddim" else edit.latent["samples"]
    torch.testing.assert_close(edit.run(), expected, rtol=1e-3, atol=1e-3)


def test_everything_in_one_graph(host: Host) -> None:
    """Protects: a bridge, dual guidance, a LoRA and a ControlNet take part in the same edit, each of them
    changes it, and the model is left as it was.
    """
    base = small_models.small_unet()
    lora = base.clone()
    weight = "diffusion_model.middle_block.1.proj_in.weight"
    shape = base.model.state_dict()[weight].shape
    lora.add_patches({weight: (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)),)})
    (bridge,) = host.execute("DescEditNewBridge", model=base, fusion="add")
    (bridged,) = host.execute(
        "DescEditApplyBridge",
        model=lora,
        bridge=bridge,
        reference={"samples": small_models.latent(3)},
        source=small_models.conditioning(1),
        strength=0.3,
    )
    control = [
        [small_models.conditioning(2)[0][0], {"control": FakeControl(), "control_apply_to_uncond": True}]
    ]
    clean = {name: value.clone().cpu() for name, value in base.model.state_dict().items()}

    def run(model: Any, positive: Any, dual: bool) -> torch.Tensor:
        edit = Edit(host, model)
        edit.positive = positive
        if dual:
            (edit.guider,) = host.execute(
                "DescEditDualGuider",
                model=model,
                edit=positive,
                unconditional=small_models.conditioning(4),
                image_guidance=1.5,
                text_guidance=3.0,
            )
        edited = edit.run()
        assert bool(torch.isfinite(edited).all())
        assert bool(edit.trace().usable.all())
        return edited

    everything = run(bridged, control, dual=True)
    for part in (
        run(bridged, small_models.conditioning(2), dual=True),
        run(lora, control, dual=True),
        run(bridged, control, dual=False),
    ):
        assert float((part - everything).norm() / everything.norm()) > 1e-3
    for patched in (bridged, lora):
        patched.detach()
    assert all(torch.equal(value.cpu(), clean[name]) for name, value in base.model.state_dict().items())
