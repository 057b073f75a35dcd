"""A bridge where other nodes call the model with parts of a batch or of the picture, or drop it."""

from __future__ import annotations

from typing import Any

import comfy_api.torch_helpers.torch_compile
import other_nodes
import pytest
import small_models
import torch
from bridge_edit import apply_bridge, guided, half_mask, random_bridge, sample
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from host import Host
from test_bridge_host import same

REFERENCE = small_models.latent(9)
BATCH = torch.zeros(4, 4, 16, 16)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def bridge(host: Host, model: Any) -> Any:
    """A random bridge for it."""
    return random_bridge(host, model)


def dual(host: Host, model: Any) -> Any:
    """GUIDER of dual guidance whose rows see the reference or do not."""
    return host.execute(
        "DescEditDualGuider",
        model=model,
        edit=small_models.conditioning(2),
        unconditional=small_models.conditioning(4),
        image_guidance=2.0,
        text_guidance=3.0,
    )[0]


@pytest.mark.parametrize("references", [1, 2])
def test_tiles(host: Host, model: Any, bridge: Any, references: int) -> None:
    """Protects: every tile sees the reference, however many tiles are one batch: as when each is a call."""
    inputs = {"references": "all for every image"} if references > 1 else {}
    bridged = apply_bridge(host, model, bridge, small_models.latent(9, batch=references), **inputs)
    alone = sample(host, other_nodes.tiled(bridged, 8, 1), latent=BATCH[:2])
    assert not same(alone, sample(host, other_nodes.tiled(model, 8, 1), latent=BATCH[:2]))
    for together in (2, 3, 4):
        assert same(sample(host, other_nodes.tiled(bridged, 8, together), latent=BATCH[:2]), alone)
    whole = sample(host, bridged, latent=BATCH[:2])
    assert torch.equal(sample(host, other_nodes.tiled(bridged, 16, 4), latent=BATCH[:2]), whole)


def test_tiles_one_by_one(host: Host, model: Any, bridge: Any) -> None:
    """Protects: tiles that come one by one keep the host's order of rows, so that each image has its own
    reference and dual guidance knows its rows.
    """
    references = torch.cat([small_models.latent(seed) for seed in (9, 10)])
    bridged = apply_bridge(host, model, bridge, references)
    found = sample(host, other_nodes.tiled(bridged, 8, 1), latent=BATCH[:2])
    for image, reference in enumerate(references.split(1)):
        only = apply_bridge(host, model, bridge, reference)
        expected = sample(host, other_nodes.tiled(only, 8, 1), latent=BATCH[:2])
        assert same(found[image], expected[image])
    one = apply_bridge(host, model, bridge, REFERENCE)
    assert guided(host, dual(host, other_nodes.tiled(one, 8, 1))).isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "direction", "reason"),
    [
        ({"mask": half_mask()}, "edit_queries", "it has a mask"),
        ({}, "reference_queries", "it has reference_queries"),
        ({"reference": small_models.latent(9, batch=2)}, "edit_queries", "each image has its own"),
    ],
)
def test_tiles_that_are_refused(host: Host, model: Any, inputs: dict, direction: str, reason: str) -> None:
    """Protects: where a tile's place or its image must be known, the refusal says what came and what not."""
    inputs = {"reference": REFERENCE, **inputs}
    bridged = apply_bridge(host, model, random_bridge(host, model, direction=direction), **inputs)
    with pytest.raises(
        ValueError,
        match=rf"Apply Attention Bridge: .* with 16 latents of 8x8 where .* 4 of 16x16: .*Tiled.*{reason}",
    ):
        sample(host, other_nodes.tiled(bridged, 8, 4), latent=BATCH[:2])


def test_dual_guidance_in_tiles(host: Host, model: Any, bridge: Any) -> None:
    """Protects: several tiles in one batch are refused where only some rows see the reference."""
    bridged = other_nodes.tiled(apply_bridge(host, model, bridge, REFERENCE), 8, 4)
    with pytest.raises(
        ValueError, match=r"12 latents of 8x8 where .* 3 of 16x16.*some rows of dual guidance"
    ):
        guided(host, dual(host, bridged))


@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
@pytest.mark.parametrize("mask", [None, half_mask()])
def test_windows(host: Host, model: Any, direction: str, mask: Any) -> None:
    """Protects: with one reference and one mask, windows of a batch are what the batch is."""
    inputs = {} if mask is None else {"mask": mask}
    bridged = apply_bridge(host, model, random_bridge(host, model, direction=direction), REFERENCE, **inputs)
    expected = sample(host, bridged, latent=BATCH)
    assert same(sample(host, other_nodes.windows(host, bridged, 2), latent=BATCH), expected)


@pytest.mark.parametrize("images", ["reference", "mask"])
def test_windows_that_are_refused(host: Host, model: Any, bridge: Any, images: str) -> None:
    """Protects: a window's images cannot be known, so what is given for each image is refused."""
    inputs = {"reference": REFERENCE, "mask": half_mask()}
    inputs[images] = inputs[images].repeat(4, *[1] * (inputs[images].ndim - 1))
    bridged = other_nodes.windows(host, apply_bridge(host, model, bridge, **inputs), 2)
    with pytest.raises(
        ValueError, match=r"4 latents of 16x16 where .* 8 of 16x16.*context windows.*each image"
    ):
        sample(host, bridged, latent=BATCH)


def test_outside_of_its_range(host: Host, model: Any, bridge: Any) -> None:
    """Protects: where the bridge does not act, a call that it could not follow is no error."""
    late = apply_bridge(host, model, bridge, REFERENCE, mask=half_mask(), start_percent=0.4, end_percent=0.41)
    plain = sample(host, other_nodes.tiled(model, 8, 4))
    assert torch.equal(sample(host, other_nodes.tiled(late, 8, 4)), plain)


@pytest.mark.parametrize(
    ("direction", "inputs", "change", "message"),
    [
        ("reference_queries", {}, "banked", r"layer input.1.0 has 512 keys for 256 tokens.*ControlNet"),
        ("reference_queries", {}, "shrunk", r"layer .*tokens where .*reference_queries.*(Deep Shrink)"),
        ("edit_queries", {"mask": half_mask()}, "shrunk", r"layer .* where a mask needs .*Deep Shrink"),
    ],
)
def test_layers_that_another_node_changed(
    host: Host, model: Any, direction: str, inputs: dict, change: str, message: str
) -> None:
    """Protects: a layer whose grid or keys are others is refused by its name, with the kind of node."""
    bridged = apply_bridge(host, model, random_bridge(host, model, direction=direction), REFERENCE, **inputs)
    if change == "shrunk":
        (bridged,) = host.execute("PatchModelAddDownscale", model=bridged, block_number=2, end_percent=1.0)
    else:
        bridged = other_nodes.banked(bridged)
    with pytest.raises(ValueError, match=f"Apply Attention Bridge: the self-attention of {message}"):
        sample(host, bridged)


def test_a_layer_that_is_left_out(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a layer that another node leaves out is named, in place of a picture without it."""
    bridged = other_nodes.dropped(apply_bridge(host, model, bridge, REFERENCE), ("output", 3))
    with pytest.raises(
        ValueError, match=r"Apply Attention Bridge: the self-attention of layer output.3.0 did not"
    ):
        sample(host, bridged)


def test_cached_steps(host: Host, model: Any, bridge: Any) -> None:
    """Protects: a node that skips the UNet at some steps works beside a bridge; one that always does, not."""
    bridged = apply_bridge(host, model, bridge, REFERENCE)
    last: list[torch.Tensor] = []

    def skip(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not last:
            last.append(executor(*args, **kwargs))
        return last[0]

    def always(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(args[0])

    for wrapper in (skip, always):
        patched = bridged.clone()
        patched.add_wrapper_with_key("diffusion_model", "test", wrapper)
        if wrapper is skip:
            assert sample(host, patched).isfinite().all()
            continue
        with pytest.raises(
            ValueError, match="Apply Attention Bridge: the bridge acted at no layer in any step"
        ):
            sample(host, patched)


@pytest.fixture
def compiled_first(host: Host) -> Any:
    """A UNet with one level of attention, and it compiled and run without a bridge: one graph, as on a card,
    with torch's attention in place of the host's choice for a CPU, which breaks the graph.
    """
    layout = {"channel_mult": (1,), "num_res_blocks": [1], "transformer_depth": [1]}
    model = small_models.small_unet(layout={**layout, "transformer_depth_output": [1, 1]})
    torch_attention = host.pack_module("lab.bench.measuring").torch_attention
    model.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
    torch.compiler.reset()
    plain = sample(host, compiled(model), steps=1)
    assert torch.equal(plain, sample(host, model, steps=1))
    yield model
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    """MODEL as TorchCompileModel makes it, with a backend that takes no time."""
    patched = model.clone()
    options: Any = {"guard_filter_fn": skip_torch_compile_dict}
    comfy_api.torch_helpers.torch_compile.set_torch_compile_wrapper(
        model=patched, backend="eager", options=options
    )
    return patched


def test_compiled_before_a_bridge(host: Host, compiled_first: Any) -> None:
    """Protects: a model that was compiled before it had a bridge, and so runs without, is an error that says
    what to do; in an order that works, the picture is the one without compilation.
    """
    model, bridge = compiled_first, random_bridge(host, compiled_first)
    bridged = apply_bridge(host, model, bridge, REFERENCE)
    for late in (apply_bridge(host, compiled(model), bridge, REFERENCE), compiled(bridged)):
        with pytest.raises(
            ValueError,
            match=r"Apply Attention Bridge: the bridge acted at no layer.*TorchCompileModel.*restart ComfyUI",
        ):
            sample(host, late, steps=1)
    torch.compiler.reset()  # what a restart does
    assert same(sample(host, compiled(bridged), steps=1), sample(host, bridged, steps=1))
