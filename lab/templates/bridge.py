"""The templates of an attention bridge."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Node, Output, Place
from .shared import (
    BRIDGE,
    FIFTH,
    FLUX,
    FLUX_BRIDGE,
    FOURTH,
    PICTURE,
    SECOND,
    THEN,
    THIRD,
    add_control,
    add_edges,
    add_empty,
    add_notes,
    add_result,
    add_style,
    describe_photo,
    describe_scene,
    load_checkpoint,
    load_photo,
    load_studio,
)

AUTHORS: dict[str, Any] = {"steps": 50, "cfg": 7.5, "scheduler": "normal"}


def guidance(graph: Graph) -> None:
    """One edit at every pair of the bridge's two scales."""
    studio = load_studio(graph)
    scene = graph.add("DescEditTinyScene", studio.below(), 270, 500, edit_type="background", seed=3)
    describe = describe_scene(graph, (SECOND, 0), studio, scene)
    empty = add_empty(graph, (SECOND, 500), 310, studio["clip"])
    latent = graph.add("VAEEncode", (THIRD, 0), 300, 60, pixels=scene["source"], vae=studio["vae"])
    bridged = graph.add(
        "DescEditApplyBridge",
        latent.below(),
        300,
        260,
        model=studio["model"],
        bridge=studio["bridge"],
        reference=latent[0],
        source=describe["source"],
    )
    grid = graph.add(
        "DescEditGuidanceGrid",
        bridged.below(),
        300,
        300,
        model=bridged[0],
        vae=studio["vae"],
        edit=describe["edit"],
        unconditional=empty[0],
        latent=latent[0],
        image_guidance="0, 1, 4",
        text_guidance="0, 1, 5",
        steps=12,
        seed=1,
    )
    at = (FOURTH, 0)
    graph.add("SaveImage", at, 560, 660, "Grid", images=grid[0], filename_prefix="descriptive-edit/guidance")
    add_notes(graph, (SECOND, 640), (310, 280))


def _bridged(
    graph: Graph, model: Output, clip: Output, latent: Node, then: str, bridge_name: str = BRIDGE
) -> tuple[Node, Node, Node]:
    """Describe Edit, the empty text and the applied bridge, in the second column."""
    describe = describe_photo(graph, (SECOND, 0), clip, then, 360)
    empty = add_empty(graph, describe.below(), 310, clip)
    loaded = graph.add("DescEditLoadBridge", empty.below(), 310, 110, bridge_name=bridge_name)
    applied = graph.add(
        "DescEditApplyBridge",
        loaded.below(),
        310,
        240,
        model=model,
        bridge=loaded[0],
        reference=latent[0],
        source=describe["source"],
    )
    return describe, empty, applied


def _sampled(
    graph: Graph,
    model: Output,
    edit: Output,
    negative: Output,
    latent: Node,
    vae: Output,
    crop: Node,
    picture: Node,
    at: Place,
    guidance: dict[str, Any] | None = None,
    **sampler: Any,
) -> None:
    """Dual guidance, a KSampler and the photo with the result in it.

    guidance, sampler: inputs of these two.
    """
    guided = graph.add("DescEditDualGuidance", at, 300, 150, model=model, **(guidance or {}))
    empty = graph.add(
        "LatentMultiply",
        guided.below(),
        300,
        80,
        "Empty latent",
        samples=latent[0],
        multiplier=0.0,
    )
    sampled = graph.add(
        "KSampler",
        empty.below(),
        300,
        280,
        model=guided[0],
        positive=edit,
        negative=negative,
        seed=1,
        latent_image=empty[0],
        sampler_name="euler",
        **(sampler or AUTHORS),
    )
    edited = graph.add("VAEDecode", sampled.below(), 300, 60, samples=sampled[0], vae=vae)
    whole = graph.add("DescEditStitch", edited.below(), 300, 110, crop=crop["crop"], edited=edited[0])
    add_result(graph, (at[0] + 350, 0), picture["IMAGE"], whole[0])


def bridge(graph: Graph) -> None:
    """Your photo, edited with a bridge."""
    model = load_checkpoint(graph)
    picture, crop, latent = load_photo(graph, model)
    describe, empty, applied = _bridged(graph, model["MODEL"], model["CLIP"], latent, THEN)
    _sampled(graph, applied[0], describe["edit"], empty[0], latent, model["VAE"], crop, picture, (THIRD, 0))
    add_notes(graph, (FIFTH, 0), (340, 700))


def bridge_flux(graph: Graph) -> None:
    """The same with Flux.1 dev, which has learned guidance by the text."""
    model = load_checkpoint(graph, FLUX)
    picture, crop, latent = load_photo(graph, model, side=1024)
    describe, empty, applied = _bridged(graph, model["MODEL"], model["CLIP"], latent, THEN, FLUX_BRIDGE)
    guided = graph.add("FluxGuidance", applied.below(), 310, 80, conditioning=describe["edit"], guidance=3.5)
    _sampled(
        graph,
        applied[0],
        guided[0],
        empty[0],
        latent,
        model["VAE"],
        crop,
        picture,
        (THIRD, 0),
        {"image_guidance": 1.0, "formula": "image"},
        steps=20,
        cfg=1.0,
        scheduler="simple",
    )
    add_notes(graph, (FIFTH, 0), (340, 700))


def bridge_control(graph: Graph) -> None:
    """A bridge beside a ControlNet and a LoRA."""
    base = load_checkpoint(graph)
    picture, crop, latent = load_photo(graph, base)
    styled = add_style(graph, (FIFTH, 0), 340, base)
    describe, empty, applied = _bridged(graph, styled["MODEL"], styled["CLIP"], latent, THEN)
    edges, net = add_edges(graph, (FOURTH, 850), 380, crop)
    controlled = add_control(graph, styled.below(), 340, edges, net, describe, empty, base)
    _sampled(
        graph,
        applied[0],
        controlled["positive"],
        controlled["negative"],
        latent,
        base["VAE"],
        crop,
        picture,
        (THIRD, 0),
    )
    add_notes(graph, (FIFTH, 490), (340, 410))


def bridge_adapter(graph: Graph) -> None:
    """A bridge beside an IP-Adapter, of another pack."""
    base = load_checkpoint(graph)
    picture, crop, latent = load_photo(graph, base)
    style = graph.add("LoadImage", (THIRD, 0), 300, 350, "Style image", image=PICTURE)
    loaded = graph.add(
        "IPAdapterUnifiedLoader", style.below(), 300, 120, model=base["MODEL"], preset="PLUS (high strength)"
    )
    adapted = graph.add(
        "IPAdapter",
        loaded.below(),
        300,
        240,
        model=loaded[0],
        ipadapter=loaded[1],
        image=style["IMAGE"],
        weight=0.6,
        start_at=0.0,
        end_at=1.0,
        weight_type="style transfer",
    )
    then = "an oil painting of a girl in a pink dress on a green hill"
    describe, empty, applied = _bridged(graph, adapted[0], base["CLIP"], latent, then)
    _sampled(graph, applied[0], describe["edit"], empty[0], latent, base["VAE"], crop, picture, (FOURTH, 0))
    add_notes(graph, (FOURTH + 350, 850), (380, 240), (THIRD, 920))
