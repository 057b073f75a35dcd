"""The blueprints: each method on a photo, as one node."""

from __future__ import annotations

from typing import Any

from .graph import Blueprint, Node, Output

PHOTO = {
    "image": "IMAGE",
    "mask": "MASK",
    "source_description": "STRING",
    "edit_description": "STRING",
    "side": "INT",
    "steps": "INT",
}


def unify(graph: Blueprint) -> None:
    """UnifyEdit on a photo as one node."""
    dials = dict.fromkeys(("cfg", "denoise", "structure", "words"), "FLOAT")
    given = _sockets(
        graph,
        model="MODEL",
        clip="CLIP",
        vae="VAE",
        **PHOTO,
        **dials,
        auto_mask="BOOLEAN",
        inversion="COMBO",
        seed="INT",
    )
    crop, latent, empty, describe = _described(graph, given)
    options = graph.add(
        "DescEditUnifyOptions",
        describe.below(),
        auto_mask=given["auto_mask"],
        inversion=given["inversion"],
        virtual_seed=given["seed"],
    )
    edited = graph.add(
        "DescEditUnify",
        (760, 0),
        model=given["model"],
        source=describe["source"],
        edit=describe["edit"],
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
        negative=empty[0],
        mask=crop["mask"],
        options=options[0],
        **{name: given[name] for name in ("steps", *dials)},
    )
    _put_back(graph, given, crop, edited["latent"], edited, mask=edited["mask"])
    graph.results += [("crop_mask", edited["mask"]), ("plot", edited["plot"])]


def bridge(graph: Blueprint) -> None:
    """A bridge on a photo as one node."""
    given = _sockets(
        graph,
        model="MODEL",
        clip="CLIP",
        vae="VAE",
        bridge="ATTENTION_BRIDGE",
        **PHOTO,
        image_guidance="FLOAT",
        text_guidance="FLOAT",
        seed="INT",
    )
    crop, latent, empty, describe = _described(graph, given)
    applied = graph.add(
        "DescEditApplyBridge",
        describe.below(),
        model=given["model"],
        bridge=given["bridge"],
        reference=latent[0],
        source=describe["source"],
    )
    guided = graph.add(
        "DescEditDualGuidance",
        (760, 0),
        model=applied[0],
        image_guidance=given["image_guidance"],
        text_guidance=given["text_guidance"],
    )
    blank = graph.add(
        "LatentMultiply", guided.below(), title="Empty latent", samples=latent[0], multiplier=0.0
    )
    sampled = graph.add(
        "KSampler",
        blank.below(),
        model=guided[0],
        positive=describe["edit"],
        negative=empty[0],
        latent_image=blank[0],
        seed=given["seed"],
        steps=given["steps"],
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
    )
    _put_back(graph, given, crop, sampled[0], sampled)


def _sockets(graph: Blueprint, **kinds: str) -> dict[str, Any]:
    """The blueprint's own inputs by name."""
    return {name: graph.socket(name, kind) for name, kind in kinds.items()}


def _described(graph: Blueprint, given: dict[str, Any]) -> tuple[Node, Node, Node, Node]:
    """The photo's crop, its latent, the empty description and Describe Edit, in two columns."""
    crop = graph.add("DescEditCrop", (0, 0), image=given["image"], mask=given["mask"], side=given["side"])
    latent = graph.add("VAEEncode", crop.below(), pixels=crop["image"], vae=given["vae"])
    empty = graph.add("CLIPTextEncode", latent.below(), title="Empty description", clip=given["clip"])
    describe = graph.add(
        "DescEditDescribe",
        (380, 0),
        clip=given["clip"],
        source_description=given["source_description"],
        edit_description=given["edit_description"],
    )
    return crop, latent, empty, describe


def _put_back(
    graph: Blueprint, given: dict[str, Any], crop: Node, latent: Output, above: Node, **mask: Any
) -> None:
    """The photo with the edited latent in it, below a node: the blueprint's first result."""
    edited = graph.add("VAEDecode", above.below(), samples=latent, vae=given["vae"])
    whole = graph.add("DescEditStitch", edited.below(), crop=crop["crop"], edited=edited[0], **mask)
    graph.results.append(("image", whole[0]))
