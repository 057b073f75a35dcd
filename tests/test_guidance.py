"""Dual guidance: the two formulas, which rows are computed, and other packs' functions."""

from __future__ import annotations

import itertools
from typing import Any

import bridge_edit
import numpy as np
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, counted, guided, random_bridge, sample
from closeness import tolerance
from host import Host

REFERENCE = small_models.latent(9)
EDIT, NOTHING = 2, 4


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridged(host: Host, model: Any) -> Any:
    """It, with a random bridge."""
    return apply_bridge(host, model, random_bridge(host, model), REFERENCE)


def dual(host: Host, model: Any, image: float, text: float, formula: str = "paper", **inputs: Any) -> Any:
    """GUIDER from its node."""
    return host.execute(
        "DescEditDualGuider",
        model=model,
        edit=small_models.conditioning(EDIT),
        unconditional=small_models.conditioning(NOTHING),
        image_guidance=image,
        text_guidance=text,
        formula=formula,
        **inputs,
    )[0]


def patch(host: Host, model: Any, image: float, text: float, formula: str = "paper", **inputs: Any) -> Any:
    """MODEL from the node for KSampler."""
    return host.execute(
        "DescEditDualGuidance",
        model=model,
        image_guidance=image,
        text_guidance=text,
        formula=formula,
        **inputs,
    )[0]


def row(host: Host, model: Any, text: int) -> torch.Tensor:
    """One step's result with one conditioning and no guidance, in float64: a step is linear in it."""
    return sample(host, model, small_models.conditioning(text), cfg=1.0, steps=1).double()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to what rounding leaves of the latent's scale."""
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance() * float(expected.std()))


@pytest.mark.parametrize(
    ("image", "text"), [(1.5, 3.0), (2.5, 2.5), (1.0, 4.0), (0.0, 2.0), (2.0, 0.0), (-0.5, 1.0)]
)
def test_formulas(host: Host, model: Any, bridged: Any, image: float, text: float) -> None:
    """Protects: both formulas, term by term, from predictions that were sampled one by one."""
    both, seen = row(host, bridged, EDIT), row(host, bridged, NOTHING)
    told, neither = row(host, model, EDIT), row(host, model, NOTHING)
    paper = neither + image * (seen - neither) + text * (both - seen)
    close(guided(host, dual(host, bridged, image, text), steps=1), paper)
    release = seen + text * (both - seen) + image * (both - told)
    close(guided(host, dual(host, bridged, image, text, "release"), steps=1), release)


@pytest.mark.parametrize(
    ("formula", "image", "text", "rows"),
    [
        ("paper", 1.5, 3.0, 3),
        ("paper", 3.0, 3.0, 2),
        ("paper", 1.0, 3.0, 2),
        ("paper", 1.0, 1.0, 1),
        ("paper", 1.0, 0.0, 1),
        ("paper", 0.0, 0.0, 1),
        ("paper", 1.5, 0.0, 2),
        ("release", 1.5, 3.0, 3),
        ("release", 0.0, 3.0, 2),
        ("release", 1.5, 1.0, 2),
        ("release", 0.0, 1.0, 1),
    ],
)
def test_rows_of_no_weight_are_not_computed(
    host: Host, model: Any, bridged: Any, formula: str, image: float, text: float, rows: int
) -> None:
    """Protects: a step computes only the predictions whose weight is not zero, in one batch."""
    with counted(model) as calls:
        guided(host, dual(host, bridged, image, text, formula), steps=2)
    assert calls.rows == [1, rows, rows]


@pytest.mark.parametrize("formula", ["paper", "release"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_guider_and_patch_agree(host: Host, bridged: Any, formula: str, scheduled: bool) -> None:
    """Protects: the guider on SamplerCustomAdvanced and the patch on KSampler give the same latents, whatever
    KSampler's own cfg is.
    """
    inputs = {}
    if scheduled:
        inputs["schedule"] = host.execute(
            "DescEditGuidanceSchedule", image_curve=line(0, 1), text_curve=line(1, 0)
        )[0]
    expected = guided(host, dual(host, bridged, 1.5, 3.0, formula, **inputs))
    for cfg in (1.0, 8.0):
        close(sample(host, patch(host, bridged, 1.5, 3.0, formula, **inputs), cfg=cfg), expected.double())


@pytest.mark.parametrize("layout", bridge_edit.LAYOUTS)
def test_layouts(host: Host, bridged: Any, layout: str) -> None:
    """Protects: in every layout of conditionings the patch gives the same latents as the guider."""
    positive, negative, images = bridge_edit.layouts(host)[layout]
    latent = torch.zeros(images, 4, 16, 16)
    together = sample(host, patch(host, bridged, 1.5, 3.0), positive, negative, latent=latent)
    (guider,) = host.execute(
        "DescEditDualGuider",
        model=bridged,
        edit=positive,
        unconditional=negative,
        image_guidance=1.5,
        text_guidance=3.0,
    )
    close(guided(host, guider, latent=latent), together.double())


def test_without_a_bridge_it_is_dual_cfg(host: Host, model: Any) -> None:
    """Protects: on a model without a bridge the formula is the stock DualCFGGuider's, and no row is computed
    twice.
    """
    (stock,) = host.execute(
        "DualCFGGuider",
        model=model,
        cond1=small_models.conditioning(EDIT),
        cond2=small_models.conditioning(NOTHING),
        negative=small_models.conditioning(NOTHING),
        cfg_conds=3.0,
        cfg_cond2_negative=1.5,
    )
    with counted(model) as calls:
        found = guided(host, dual(host, model, 1.5, 3.0))
    assert calls.rows == [2] * bridge_edit.STEPS
    close(found, guided(host, stock).double())


def line(start: float, end: float) -> dict[str, Any]:
    """A straight curve, as the page sends it."""
    return {"points": [[0.0, start], [1.0, end]], "interpolation": "linear"}


def test_schedule(host: Host, bridged: Any) -> None:
    """Protects: scales follow their curves from noise to image, step by step, with the design's progress
    p = 1 - t/T; the plot is an IMAGE that shows both.
    """
    schedule, plot = host.execute(
        "DescEditGuidanceSchedule",
        image_low=1.0,
        image_high=2.0,
        image_curve=line(0, 1),
        text_low=1.0,
        text_high=9.0,
        text_curve=line(1, 0),
    )
    steps = 4
    found = guided(host, dual(host, bridged, 0.0, 0.0, schedule=schedule), steps=steps)
    scales = []

    class ByHand(type(dual(host, bridged, 1.0, 1.0))):
        """The guider with constant scales, set before each prediction."""

        def predict_noise(self, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            sampling = self.inner_model.model_sampling
            progress = 1 - float(sampling.timestep(timestep)[0]) / 999
            scales.append((1.0 + progress, 9.0 - 8.0 * progress))
            self.guidance = type(self.guidance)(*scales[-1])
            return super().predict_noise(x, timestep, *args, **kwargs)

    by_hand = ByHand(bridged, dual(host, bridged, 1.0, 1.0).guidance)
    by_hand.set_conds(small_models.conditioning(EDIT), small_models.conditioning(NOTHING))
    close(found, guided(host, by_hand, steps=steps).double())
    assert scales[0][0] == pytest.approx(1.0, abs=0.01)
    assert scales[-1][0] == pytest.approx(2.0, abs=0.01)
    assert plot.shape[-1] == 3
    assert float(plot.std()) > 0


def test_constant_schedule_skips_rows(host: Host, model: Any, bridged: Any) -> None:
    """Protects: a schedule under which a row never has weight does not compute it."""
    schedule, _ = host.execute(
        "DescEditGuidanceSchedule",
        image_low=1.0,
        image_high=1.0,
        text_low=2.0,
        text_high=5.0,
        image_curve=line(0, 1),
        text_curve=line(0, 1),
    )
    with counted(model) as calls:
        guided(host, dual(host, bridged, 9.0, 9.0, schedule=schedule), steps=2)
    assert calls.rows == [1, 2, 2]


def test_other_packs_functions(host: Host, model: Any, bridged: Any) -> None:
    """Protects: pre-CFG, CFG and post-CFG functions of other packs run in this order, on the text pair, the
    text pair and the whole, and what they return is used.
    """
    order: list[str] = []

    def pre(args: dict) -> list[torch.Tensor]:
        order.append("pre")
        edit, unconditional = args["conds_out"]
        return [edit * 0.5, unconditional]

    def cfg(args: dict) -> torch.Tensor:
        order.append("cfg")
        return args["uncond"] + 2 * args["cond_scale"] * (args["cond"] - args["uncond"])

    def post(args: dict) -> torch.Tensor:
        order.append("post")
        return args["denoised"] + 0.1 * args["cond_denoised"] - 0.2 * args["uncond_denoised"]

    others = bridged.clone()
    others.set_model_sampler_pre_cfg_function(pre)
    others.set_model_sampler_cfg_function(cfg)
    others.set_model_sampler_post_cfg_function(post)
    denoised: list[torch.Tensor] = []
    rows = {}
    for name, which, text in itertools.chain(
        (("both", bridged, EDIT), ("seen", bridged, NOTHING)), (("neither", model, NOTHING),)
    ):
        rows[name] = first_denoised(host, which, text)
    guider = dual(host, others, 1.5, 3.0)
    guided_with(host, guider, denoised)
    assert order[:3] == ["pre", "cfg", "post"]
    edit = 0.5 * rows["both"]
    pair = rows["seen"] + 6.0 * (edit - rows["seen"])
    whole = pair + 0.5 * (rows["seen"] - rows["neither"])
    close(denoised[0], whole + 0.1 * edit - 0.2 * rows["seen"])


def first_denoised(host: Host, model: Any, text: int) -> torch.Tensor:
    """The first step's denoised prediction for one conditioning, in float64."""
    found: list[torch.Tensor] = []
    (guider,) = host.execute("BasicGuider", model=model, conditioning=small_models.conditioning(text))
    guided_with(host, guider, found)
    return found[0].double()


def guided_with(host: Host, guider: Any, denoised: list[torch.Tensor]) -> None:
    """Sample with a guider and keep every denoised prediction."""
    (sampler,) = host.execute("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.execute(
        "BasicScheduler", model=guider.model_patcher, scheduler="normal", steps=2, denoise=1.0
    )
    guider.sample(
        small_models.latent(3),
        torch.zeros(1, 4, 16, 16),
        sampler,
        sigmas,
        callback=lambda step, x0, x, total: denoised.append(x0.clone()),
        disable_pbar=True,
        seed=5,
    )


@pytest.mark.parametrize("name", ["PerturbedAttentionGuidance", "SelfAttentionGuidance"])
def test_host_guidance_nodes(host: Host, model: Any, bridged: Any, name: str) -> None:
    """Protects: PAG and SAG of the host work with a bridge and dual guidance: their own scale 0 changes
    nothing, another scale does, and the same run gives the same bits.
    """

    def run(scale: float) -> torch.Tensor:
        (with_it,) = host.execute(name, model=bridged, scale=scale)
        return guided(host, dual(host, with_it, 1.5, 3.0), latent=torch.zeros(1, 4, 32, 32))

    plain = guided(host, dual(host, bridged, 1.5, 3.0), latent=torch.zeros(1, 4, 32, 32))
    close(run(0.0), plain.double())
    changed = run(2.0)
    assert changed.isfinite().all()
    assert not torch.allclose(changed, plain, atol=1e-3 * float(plain.std()))
    assert torch.equal(run(2.0), changed)


def test_pag_perturbs_the_edit(host: Host, bridged: Any) -> None:
    """Protects: PAG's extra prediction is the edit's with the reference in it, as the formula's own is."""
    (with_it,) = host.execute("PerturbedAttentionGuidance", model=bridged, scale=1.0)
    denoised: list[torch.Tensor] = []
    guided_with(host, dual(host, with_it, 1.0, 1.0), denoised)
    expected: list[torch.Tensor] = []
    (cfg,) = host.execute(
        "CFGGuider",
        model=with_it,
        positive=small_models.conditioning(EDIT),
        negative=small_models.conditioning(NOTHING),
        cfg=1.0,
    )
    guided_with(host, cfg, expected)
    close(denoised[0], expected[0].double())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image_guidance": float("nan")}, r"image_guidance is nan"),
        ({"text_guidance": float("inf")}, r"text_guidance is inf"),
        ({"formula": "other"}, r"formula is 'other'"),
    ],
)
@pytest.mark.parametrize("node", ["DescEditDualGuider", "DescEditDualGuidance"])
def test_bad_scales(host: Host, model: Any, node: str, inputs: dict, message: str) -> None:
    """Protects: scales that are not finite and unknown formulas are refused by name."""
    conds = {}
    if node == "DescEditDualGuider":
        conds = {"edit": small_models.conditioning(EDIT), "unconditional": small_models.conditioning(NOTHING)}
    with pytest.raises(ValueError, match=f"Dual Guid.*: {message}"):
        host.execute(node, model=model, **conds, **inputs)


def test_guidance_twice_and_wrong_guiders(host: Host, model: Any) -> None:
    """Protects: two dual guidances are refused, and guiders without one positive and one negative."""
    once = patch(host, model, 1.5, 3.0)
    with pytest.raises(ValueError, match=r"Dual Guidance .for KSampler.: this MODEL has dual guidance"):
        patch(host, once, 1.5, 3.0)
    with pytest.raises(ValueError, match=r"Dual Guidance .for KSampler.: needs a sampler with one positive"):
        guided(host, dual(host, once, 1.5, 3.0))
    (basic,) = host.execute("BasicGuider", model=once, conditioning=small_models.conditioning(EDIT))
    with pytest.raises(
        ValueError, match=r"no unconditional \(or negative\) description is connected, but the formula paper"
    ):
        guided(host, basic)


def test_schedule_refuses_infinite_scales(host: Host) -> None:
    """Protects: a schedule's bounds are finite."""
    with pytest.raises(ValueError, match=r"Guidance Schedule: text_low is"):
        host.execute(
            "DescEditGuidanceSchedule",
            text_low=float("nan"),
            image_curve=line(0, 1),
            text_curve=line(0, 1),
        )


def test_table_is_linear_between_its_values(host: Host) -> None:
    """Protects: between the table's places a scale is interpolated, at both ends it is exact."""
    guidance = host.pack_module("patches.bridge.guidance")
    table = guidance.scale_table(1.0, 3.0, lambda x: np.square(x))
    schedule = guidance.GuidanceSchedule(table, table)
    for along in (0.0, 0.12345, 0.5, 0.9999, 1.0):
        image, _ = schedule.at(torch.tensor(along))
        assert float(image) == pytest.approx(1 + 2 * along**2, abs=1e-5)


def test_shapes(host: Host) -> None:
    """Protects: without a curve each scale follows its shape from its low to its high value."""
    middle = 0.5
    for shape, (start, half, end) in {
        "rising": (1, 2, 3),
        "falling": (3, 2, 1),
        "high in the middle": (1, 3, 1),
        "low in the middle": (3, 1, 3),
        "high in the first half": (3, 1, 1),
        "high in the second half": (1, 3, 3),
    }.items():
        schedule, _ = host.execute(
            "DescEditGuidanceSchedule", image_low=1.0, image_high=3.0, image_shape=shape
        )
        table = schedule.image
        found = table[0], table[round(middle * (len(table) - 1))], table[-1]
        np.testing.assert_allclose(found, (start, half, end), atol=1e-6, err_msg=shape)
