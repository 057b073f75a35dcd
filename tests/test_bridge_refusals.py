"""Inputs that a bridge cannot work with, each refused by the node's name, before or at the run's start."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import bridge_edit
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, random_bridge, sample
from host import Host

REFERENCE = small_models.latent(9)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridge(host: Host, model: Any) -> Any:
    """A random bridge for it."""
    return random_bridge(host, model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"reference": torch.zeros(1, 16, 8, 8)}, r"reference has shape \[1, 16, 8, 8\] .* \[images, 4,"),
        ({"reference": torch.zeros(1, 4, 8, 8)}, r"reference is an empty latent"),
        ({"strength": float("nan")}, r"strength is nan"),
        ({"strength": float("inf")}, r"strength is inf"),
        ({"start_percent": 0.6, "end_percent": 0.4}, r"start_percent is 0.6 and end_percent 0.4"),
        ({"start_percent": 0.5, "end_percent": 0.5}, r".*must rise"),
        ({"source": small_models.conditioning(1) * 2}, r"source must be one description"),
    ],
)
def test_at_the_node(host: Host, model: Any, bridge: Any, inputs: dict, message: str) -> None:
    """Protects: what is wrong by itself is refused when the node runs."""
    reference = inputs.pop("reference", REFERENCE)
    with pytest.raises(ValueError, match=f"Apply Attention Bridge: {message}"):
        apply_bridge(host, model, bridge, reference, **inputs)


def test_source_with_an_area(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a source description of a part of the image is refused."""
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(1),
        width=64,
        height=64,
        x=0,
        y=0,
        strength=1.0,
    )
    with pytest.raises(ValueError, match="source must be one description of the whole reference"):
        apply_bridge(host, model, bridge, REFERENCE, source=area)


def test_join_needs_edit_queries(host: Host, model: Any) -> None:
    """Protects: joining is refused for a bridge that cannot."""
    bridge = random_bridge(host, model, direction="reference_queries")
    with pytest.raises(ValueError, match="joined only for a bridge with the direction edit_queries"):
        apply_bridge(host, model, bridge, REFERENCE, references="all for every image")


def test_another_base(host: Host, bridge: Any) -> None:
    """Protects: a bridge for another base is refused with both shapes named, also where only the family
    differs.
    """
    studio, *_ = host.execute("DescEditTinyStudio")
    with pytest.raises(
        ValueError,
        match=r"for _SmallSD15 with 10 layers \(3 of width 32, 7 of width 64\), but .* is TinySD15 with",
    ):
        apply_bridge(host, studio, bridge, REFERENCE)
    settings = bridge.model.settings
    other = type(settings)("SDXL", settings.widths, settings.rank, settings.alpha)
    bridges = host.pack_module("models.bridge")
    with pytest.raises(ValueError, match=r"the bridge is for SDXL with 10 layers"):
        apply_bridge(host, small_models.small_unet(), bridges.new_bridge(other), REFERENCE)


def test_a_model_that_is_no_unet(host: Host, bridge: Any) -> None:
    """Protects: another kind of network is named by its class."""

    class Model:
        """A MODEL of another kind."""

        model = type("M", (), {"diffusion_model": torch.nn.Linear(1, 1)})

    with pytest.raises(ValueError, match=r"Apply Attention Bridge: needs a UNet.*got Linear"):
        apply_bridge(host, Model(), bridge, REFERENCE)
    with pytest.raises(ValueError, match=r"New Attention Bridge: needs a UNet.*got Linear"):
        host.execute("DescEditNewBridge", model=Model())


def test_two_bridges(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a second bridge on one model is refused, not mixed in silence."""
    once = apply_bridge(host, model, bridge, REFERENCE)
    with pytest.raises(ValueError, match="this MODEL has a bridge already"):
        apply_bridge(host, once, bridge, REFERENCE)


@pytest.mark.parametrize(
    ("inputs", "latent", "message"),
    [
        (
            {"reference": small_models.latent(9, batch=2)},
            (3, 16, 16),
            r"reference has 2 images but 3 are sampled",
        ),
        ({"mask": torch.ones(1, 64, 128)}, (1, 16, 16), r"mask is 128x64 but the image is 128x128"),
        ({"mask": torch.ones(2, 128, 128)}, (3, 16, 16), r"mask has 2 images but 3 are edited"),
    ],
)
def test_at_the_run(
    host: Host, model: Any, bridge: Any, inputs: dict, latent: tuple[int, int, int], message: str
) -> None:
    """Protects: what does not fit the sampled latent is refused at the run's start, before any UNet call."""
    reference = inputs.pop("reference", REFERENCE)
    patched = apply_bridge(host, model, bridge, reference, **inputs)
    images, height, width = latent
    with (
        bridge_edit.counted(model) as calls,
        pytest.raises(ValueError, match=f"Apply Attention Bridge: {message}"),
    ):
        sample(host, patched, latent=torch.zeros(images, 4, height, width))
    assert calls.rows == []


def test_reference_queries_need_the_same_grid(host: Host, model: Any) -> None:
    """Protects: with reference_queries another size is refused, and so is a conditioning with an area."""
    bridge = random_bridge(host, model, direction="reference_queries")
    other = apply_bridge(host, model, bridge, small_models.latent(9, size=(12, 16)))
    with pytest.raises(ValueError, match=r"latent's size, 16x16, but it has 16x12"):
        sample(host, other)
    (area,) = host.execute(
        "ConditioningSetArea",
        conditioning=small_models.conditioning(2),
        width=64,
        height=64,
        x=0,
        y=0,
        strength=1.0,
    )
    with pytest.raises(ValueError, match=r"needs the grid of the whole image"):
        sample(host, apply_bridge(host, model, bridge, REFERENCE), area)


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}, r"HyperTile"),
        ("TomePatchModel", {"ratio": 0.5}, r"merges tokens .*ToMe"),
    ],
)
def test_nodes_that_change_the_tokens(
    host: Host, model: Any, bridge: Any, node: str, inputs: dict, message: str
) -> None:
    """Protects: where another node rearranges rows or, under a mask, tokens, the error names its kind."""
    mask = torch.ones(1, 256, 256)
    mask[:, :100] = 0.5
    patched = apply_bridge(host, model, bridge, REFERENCE, mask=mask)
    (patched,) = host.execute(node, model=patched, **inputs)
    with pytest.raises(ValueError, match=message):
        sample(host, patched, latent=torch.zeros(1, 4, 32, 32))


def test_training_a_model_with_a_bridge(host: Host) -> None:
    """Protects: Train LoRA on a MODEL with a bridge is refused with what to do; on one without, it runs."""
    studio, clip, _, tiny_bridge, *_ = host.execute("DescEditTinyStudio")
    (text,) = host.execute("CLIPTextEncode", clip=clip, text="a red circle")
    latent = {"samples": small_models.latent(3)}
    inputs = {"latents": latent, "positive": text, "steps": 1, "rank": 1, "existing_lora": "[None]"}
    patched = bridge_edit.apply_bridge(host, studio, tiny_bridge, small_models.latent(4), source=text)
    with pytest.raises(ValueError, match=r"Apply Attention Bridge: another node trains this MODEL"):
        host.execute("TrainLoraNode", model=patched, **inputs)
    assert host.execute("TrainLoraNode", model=studio, **inputs)


def test_a_model_call_outside_of_a_sampling(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a call of the patched model where no reference was read is an error, not a plain picture."""
    options = host.pack_module("patches.bridge.apply")
    with pytest.raises(ValueError, match="outside of a sampling"):
        options._ApplyModel(nullcontext())(lambda *_: None, torch.zeros(1), None, None, None, None, {})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha 0.0"), ({"fusion": "melt"}, "fusion is 'melt'")],
)
def test_new_bridge(host: Host, model: Any, inputs: dict, message: str) -> None:
    """Protects: settings that no bridge has are refused."""
    with pytest.raises(ValueError, match=f"New Attention Bridge: .*{message}"):
        host.execute("DescEditNewBridge", model=model, **inputs)
