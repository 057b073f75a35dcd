"""Dual guidance on DiTs: by the image alone on distilled models, with three rows on others."""

from __future__ import annotations

from typing import Any

import bridge_edit
import pytest
import small_dits
import small_models
import torch
from bridge_edit import counted, guided, sample
from closeness import same
from host import Host

EDIT, NOTHING = 2, 4


@pytest.fixture(scope="module")
def models(host: Host) -> dict[str, tuple[Any, Any]]:
    """By family the random network, and the same with a bridge."""
    found = {}
    for name in (*small_dits.FAMILIES, *small_dits.OTHERS):
        model = small_dits.small_dit(name)
        bridge = bridge_edit.random_bridge(host, model)
        found[name] = (
            model,
            bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model)),
        )
    return found


def guider(host: Host, model: Any, image: float, text: float = 3.0, **inputs: Any) -> Any:
    """GUIDER of the node, without an unconditional description unless one is given."""
    (found,) = host.execute(
        "DescEditDualGuider",
        model=model,
        edit=small_models.conditioning(EDIT),
        image_guidance=image,
        text_guidance=text,
        **inputs,
    )
    return found


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.1 schnell"])
def test_the_image_alone(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: on a distilled model no unconditional description is needed: the result is
    e(0,T) + image (e(I,T) - e(0,T)), by the guider and by the patch in a guider without a negative; at 1 it
    costs one row and is the stock run of the model with the bridge, bit for bit.
    """
    model, bridged = models[family]
    positive = small_models.conditioning(EDIT)
    both = [sample(host, which, positive, cfg=1.0, steps=1) for which in (model, bridged)]
    for image, rows in ((1.0, [1, 1]), (1.6, [1, 2]), (0.0, [1, 1])):
        with counted(model) as calls:
            found = guided(host, guider(host, bridged, image), steps=1)
        assert calls.rows == rows
        assert same(found, both[0] + image * (both[1] - both[0]))
        (patched,) = host.execute("DescEditDualGuidance", model=bridged, image_guidance=image)
        (basic,) = host.execute("BasicGuider", model=patched, conditioning=positive)
        assert torch.equal(guided(host, basic, steps=1), found)
        if image == 1.0:
            assert torch.equal(found, both[1])


@pytest.mark.parametrize("family", ["Chroma", *small_dits.OTHERS])
def test_three_rows_on_other_models(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: a model without learned guidance gets the paper's formula of three rows, and says so if there
    is no unconditional description.
    """
    model, bridged = models[family]
    negative = small_models.conditioning(NOTHING)
    edit, nothing = (sample(host, bridged, cond, cfg=1.0, steps=1) for cond in (None, negative))
    blind = sample(host, model, negative, cfg=1.0, steps=1)
    with counted(model) as calls:
        found = guided(host, guider(host, bridged, 1.5, 4.0, unconditional=negative), steps=1)
    assert calls.rows == [1, 3]
    assert same(found, blind + 1.5 * (nothing - blind) + 4.0 * (edit - nothing))
    with pytest.raises(
        ValueError,
        match=r"Dual Guider.*: no unconditional .* but the formula paper needs it .* formula image",
    ):
        guided(host, guider(host, bridged, 1.5, 4.0))
    with counted(model) as calls:  # asked for by name
        guided(host, guider(host, bridged, 1.5, formula="image"), steps=1)
    assert calls.rows == [1, 2]


def test_functions_of_other_packs(host: Host, models: dict[str, Any]) -> None:
    """Protects: with the image alone, other packs' functions get what the host gives them at cfg 1: the edit
    description's prediction and zeros, without a row more; the host's option has the pair computed.
    """
    model, bridged = models["Flux.1 dev"]
    seen: list[Any] = []

    def before(args: dict[str, Any]) -> list[torch.Tensor]:
        seen.append((args["cond_scale"], bool(args["conds_out"][1].any())))
        return args["conds_out"]

    def own(args: dict[str, Any]) -> torch.Tensor:
        return args["cond"]

    listening = bridged.clone()
    listening.set_model_sampler_pre_cfg_function(before)
    listening.set_model_sampler_cfg_function(own)
    expected = guided(host, guider(host, bridged, 1.6), steps=1)
    with counted(model) as calls:
        found = guided(host, guider(host, listening, 1.6), steps=1)
    assert same(found, expected)
    assert (calls.rows, seen) == ([1, 2], [(1.0, False)])
    seen.clear()
    listening.model_options["disable_cfg1_optimization"] = True
    with counted(model) as calls:
        guided(host, guider(host, listening, 1.6, unconditional=small_models.conditioning(NOTHING)), steps=1)
    assert (calls.rows, seen) == ([1, 3], [(1.0, True)])
