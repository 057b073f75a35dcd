"""The templates of UnifyEdit."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Node, Output, Place
from .shared import (
    DISTILLED,
    FIFTH,
    FLUX,
    FOURTH,
    LEFT,
    LITERATURE,
    MEASURED,
    MEASURED_ON_FLUX,
    NOW,
    SDXL,
    SECOND,
    TALKER,
    TALKERS,
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


def start(graph: Graph) -> None:
    """A drawn scene, edited by the small model."""
    _drawn(graph, "UNet", MEASURED)


def start_flux(graph: Graph) -> None:
    """The same with the small network of Flux.1's kind."""
    _drawn(graph, "Flux", MEASURED_ON_FLUX)


def _drawn(graph: Graph, network: str, settings: dict[str, Any]) -> None:
    studio = load_studio(graph, network)
    scene = graph.add("DescEditTinyScene", studio.below(), 270, 500, seed=8, wording="complex")
    describe = describe_scene(graph, (SECOND, 0), studio, scene)
    latent = graph.add("VAEEncode", (SECOND, 500), 310, 60, pixels=scene["source"], vae=studio["vae"])
    unify = graph.add(
        "DescEditUnify",
        (THIRD, 0),
        300,
        660,
        model=studio["model"],
        source=describe["source"],
        edit=describe["edit"],
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
        mask=scene["mask"],
        **settings,
    )
    edited = graph.add("VAEDecode", (THIRD, 720), 300, 60, samples=unify["latent"], vae=studio["vae"])
    add_result(graph, (FOURTH, 0), scene["source"], edited[0], 400)
    add_notes(graph, (SECOND, 620), (310, 280), (LEFT, 760))


def photo(graph: Graph) -> None:
    """Your photo, edited without training."""
    _photo(graph, load_checkpoint(graph))


def photo_sdxl(graph: Graph) -> None:
    """The same with SDXL, at its size."""
    _photo(graph, load_checkpoint(graph, SDXL), side=1024, checkpointing=True)


def _photo(graph: Graph, model: Node, side: int = 512, **options: Any) -> None:
    picture, crop, latent = load_photo(graph, model, side=side)
    empty = add_empty(graph, (SECOND, 500), 310, model["CLIP"])
    describe = describe_photo(graph, (SECOND, 0), model["CLIP"])
    chosen = graph.add("DescEditUnifyOptions", (THIRD, 0), 300, 500, auto_mask=True, **options)
    _edit_photo(graph, model, describe, empty, crop, latent, picture, chosen, chosen.below())
    add_notes(graph, (SECOND, 640), (340, 400))


def photo_flux(graph: Graph) -> None:
    """The same with Flux.1 dev, which has learned guidance by the text."""
    model = load_checkpoint(graph, FLUX)
    picture, crop, latent = load_photo(graph, model, side=1024)
    describe = describe_photo(graph, (SECOND, 0), model["CLIP"], height=360)
    source = graph.add(
        "FluxGuidance",
        describe.below(),
        310,
        110,
        "Guidance of the inversion",
        conditioning=describe["source"],
        guidance=1.0,
    )
    edit = graph.add(
        "FluxGuidance",
        source.below(),
        310,
        110,
        "Guidance of the edit",
        conditioning=describe["edit"],
        guidance=3.5,
    )
    options = graph.add("DescEditUnifyOptions", (THIRD, 0), 300, 500, auto_mask=True, checkpointing=True)
    _edit_photo(
        graph,
        model,
        describe,
        None,
        crop,
        latent,
        picture,
        options,
        options.below(),
        texts=(source[0], edit[0]),
        settings=DISTILLED,
    )
    add_notes(graph, (FIFTH, 0), (340, 600))


def _edit_photo(
    graph: Graph,
    model: Node,
    describe: Node,
    empty: Node | None,
    crop: Node,
    latent: Node,
    picture: Node,
    options: Node,
    at: Place,
    texts: tuple[Output, Output] | None = None,
    settings: dict[str, Any] = LITERATURE,
) -> None:
    """UnifyEdit on a crop, put back into the photo.

    empty: the empty description, for a model that has not learned guidance.
    texts: source and edit, in place of those of `describe`.
    settings: of UnifyEdit.
    """
    source, edit = texts or (describe["source"], describe["edit"])
    negative: dict[str, Any] = {} if empty is None else {"negative": empty[0]}
    unify = graph.add(
        "DescEditUnify",
        at,
        300,
        560,
        model=model["MODEL"],
        source=source,
        edit=edit,
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
        mask=crop["mask"],
        options=options[0],
        **negative,
        **settings,
    )
    edited = graph.add("VAEDecode", (FOURTH, 0), 380, 60, samples=unify["latent"], vae=model["VAE"])
    whole = graph.add(
        "DescEditStitch", edited.below(), 380, 110, crop=crop["crop"], edited=edited[0], mask=unify["mask"]
    )
    add_result(graph, whole.below(), picture["IMAGE"], whole[0])


def control(graph: Graph) -> None:
    """Your photo, with a ControlNet and a LoRA."""
    base = load_checkpoint(graph)
    picture, crop, latent = load_photo(graph, base)
    styled = add_style(graph, (SECOND, 0), 310, base)
    describe = describe_photo(
        graph,
        styled.below(),
        styled["CLIP"],
        "a watercolor painting of a girl in a pink dress on a green hill",
    )
    empty = add_empty(graph, describe.below(), 310, styled["CLIP"])
    edges, net = add_edges(graph, (THIRD, 0), 300, crop)
    applied = add_control(graph, net.below(), 300, edges, net, describe, empty, base)
    unify = graph.add(
        "DescEditUnify",
        applied.below(),
        300,
        600,
        model=styled["MODEL"],
        source=describe["source"],
        edit=applied["positive"],
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
        negative=applied["negative"],
        mask=crop["mask"],
        structure=0.3,
        **LITERATURE,
    )
    edited = graph.add("VAEDecode", (FOURTH, 0), 380, 60, samples=unify["latent"], vae=base["VAE"])
    whole = graph.add(
        "DescEditStitch", edited.below(), 380, 110, crop=crop["crop"], edited=edited[0], mask=unify["mask"]
    )
    add_result(graph, whole.below(), picture["IMAGE"], whole[0])
    add_notes(graph, (FIFTH, 0), (340, 700))


def instruction(graph: Graph) -> None:
    """Your photo, edited by an instruction that a language model turns into a description."""
    model = load_checkpoint(graph)
    picture, crop, latent = load_photo(graph, model)
    source = graph.add("PrimitiveStringMultiline", (SECOND, 0), 310, 110, "Source description", value=NOW)
    prompt = graph.add(
        "DescEditDescribePrompt",
        source.below(),
        310,
        220,
        instruction="make her dress blue",
        source_description=source[0],
    )
    talker = graph.add(
        "CLIPLoader", prompt.below(), 310, 110, clip_name=TALKER, type="ideogram4", models=TALKERS
    )
    told = graph.add(
        "TextGenerate",
        talker.below(),
        310,
        270,
        clip=talker[0],
        prompt=prompt[0],
        max_length=128,
        sampling_mode="off",
        image=crop["image"],
    )
    describe = graph.add(
        "DescEditDescribe", (THIRD, 0), 300, 400, clip=model["CLIP"], source_text=source[0], edit_text=told[0]
    )
    empty = add_empty(graph, (FIFTH, 0), 340, model["CLIP"])
    options = graph.add("DescEditUnifyOptions", empty.below(), 340, 500, auto_mask=True)
    _edit_photo(graph, model, describe, empty, crop, latent, picture, options, describe.below())
    add_notes(graph, (FIFTH, 720), (340, 295))


def parts(graph: Graph) -> None:
    """UnifyEdit from its parts, with what shows and measures it."""
    studio = load_studio(graph)
    scene = graph.add("DescEditTinyScene", studio.below(), 270, 500, edit_type="object", seed=1)
    sigmas = graph.add(
        "BasicScheduler",
        scene.below(),
        270,
        110,
        model=studio["model"],
        scheduler="normal",
        steps=25,
        denoise=0.6,
    )
    describe = describe_scene(graph, (SECOND, 0), studio, scene)
    latent = graph.add("VAEEncode", describe.below(), 310, 60, pixels=scene["source"], vae=studio["vae"])
    mask = graph.add(
        "DescEditFindMask",
        latent.below(),
        310,
        360,
        model=studio["model"],
        source=describe["source"],
        edit=describe["edit"],
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
    )
    inversion = graph.add(
        "DescEditInvert",
        (THIRD, 0),
        300,
        250,
        model=studio["model"],
        latent=latent[0],
        source=describe["source"],
        sigmas=sigmas[0],
    )
    balance = graph.add("DescEditAdaptiveScheduler", inversion.below(), 300, 400)
    sampler = graph.add(
        "DescEditUnifySampler",
        balance.below(),
        300,
        120,
        inversion=inversion["inversion"],
        edit_tokens=describe["edit_tokens"],
        balance=balance["balance"],
        mask=mask[0],
    )
    empty = add_empty(graph, sampler.below(), 300, studio["clip"])
    guider = graph.add(
        "CFGGuider",
        (FOURTH, 0),
        300,
        110,
        model=studio["model"],
        positive=describe["edit"],
        negative=empty[0],
        cfg=2.0,
    )
    none = graph.add("DisableNoise", guider.below(), 300, 40)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        none.below(),
        300,
        130,
        noise=none[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    edited = graph.add("VAEDecode", sampled.below(), 300, 60, samples=sampled[0], vae=studio["vae"])
    maps = graph.add(
        "DescEditAttentionMaps",
        edited.below(),
        300,
        480,
        model=studio["model"],
        conditioning=describe["edit"],
        edit_tokens=describe["edit_tokens"],
        inversion=inversion["inversion"],
        image=scene["source"],
    )
    assert maps
    graph.add(
        "DescEditCompare",
        (FOURTH + 340, 0),
        400,
        460,
        side=200,
        labels="source\nedited\nperfect edit",
        **{"images.image0": scene["source"], "images.image1": edited[0], "images.image2": scene["edited"]},
    )
    graph.add(
        "DescEditMetrics",
        (FOURTH + 340, 520),
        400,
        330,
        edited=edited[0],
        source=scene["source"],
        target=scene["edited"],
        mask=scene["mask"],
    )
    add_notes(graph, (FOURTH + 340, 880), (400, 130), (LEFT, 960))
