"""The templates and the blueprint of UnifyEdit."""

from __future__ import annotations

from typing import Any

from .graph import Blueprint, Graph, Node, Output, Place
from .shared import (
    CANNY,
    CONTROL,
    DISTILLED,
    FIFTH,
    FLUX,
    FOURTH,
    LEFT,
    LITERATURE,
    LORA,
    MEASURED,
    NOW,
    SDXL,
    SECOND,
    TALKER,
    TALKERS,
    THEN,
    THIRD,
    add_notes,
    add_result,
    load_checkpoint,
    load_photo,
)


def start(graph: Graph) -> None:
    """A drawn scene, edited by the small model."""
    studio = graph.add("DescEditTinyStudio", (LEFT, 0), 270, 110)
    scene = graph.add("DescEditTinyScene", studio.below(), 270, 500, seed=8, wording="complex")
    describe = graph.add(
        "DescEditDescribe",
        (SECOND, 0),
        310,
        440,
        clip=studio["clip"],
        source_text=scene["source_description"],
        edit_text=scene["edit_description"],
    )
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
        **MEASURED,
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
    empty = graph.add("CLIPTextEncode", (SECOND, 500), 310, 100, "Empty description", clip=model["CLIP"])
    describe = graph.add(
        "DescEditDescribe",
        (SECOND, 0),
        310,
        440,
        clip=model["CLIP"],
        source_description=NOW,
        edit_description=THEN,
    )
    chosen = graph.add("DescEditUnifyOptions", (THIRD, 0), 300, 500, auto_mask=True, **options)
    _edit_photo(graph, model, describe, empty, crop, latent, picture, chosen, chosen.below())
    add_notes(graph, (SECOND, 640), (310, 290))


def photo_flux(graph: Graph) -> None:
    """The same with Flux.1 dev, which has learned guidance by the text."""
    model = load_checkpoint(graph, FLUX)
    picture, crop, latent = load_photo(graph, model, side=1024)
    describe = graph.add(
        "DescEditDescribe",
        (SECOND, 0),
        310,
        360,
        clip=model["CLIP"],
        source_description=NOW,
        edit_description=THEN,
    )
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
    styled = graph.add(
        "LoraLoader",
        (SECOND, 0),
        310,
        160,
        model=base["MODEL"],
        clip=base["CLIP"],
        lora_name=LORA,
        strength_model=0.8,
        strength_clip=0.8,
    )
    describe = graph.add(
        "DescEditDescribe",
        styled.below(),
        310,
        440,
        clip=styled["CLIP"],
        source_description="a drawing of a girl in a pink dress on a green hill",
        edit_description="a watercolor painting of a girl in a pink dress on a green hill",
    )
    empty = graph.add("CLIPTextEncode", describe.below(), 310, 100, "Empty description", clip=styled["CLIP"])
    edges = graph.add(
        "Canny", (THIRD, 0), 300, 90, image=crop["image"], low_threshold=0.3, high_threshold=0.6
    )
    net = graph.add("ControlNetLoader", edges.below(), 300, 60, control_net_name=CANNY, models=CONTROL)
    applied = graph.add(
        "ControlNetApplyAdvanced",
        net.below(),
        300,
        190,
        positive=describe["edit"],
        negative=empty[0],
        control_net=net[0],
        image=edges[0],
        strength=0.6,
        end_percent=0.6,
        vae=base["VAE"],
    )
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
    empty = graph.add("CLIPTextEncode", (FIFTH, 0), 340, 100, "Empty description", clip=model["CLIP"])
    options = graph.add("DescEditUnifyOptions", empty.below(), 340, 500, auto_mask=True)
    _edit_photo(graph, model, describe, empty, crop, latent, picture, options, describe.below())
    add_notes(graph, (FIFTH, 720), (340, 220))


def parts(graph: Graph) -> None:
    """UnifyEdit from its parts, with what shows and measures it."""
    studio = graph.add("DescEditTinyStudio", (LEFT, 0), 270, 110)
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
    describe = graph.add(
        "DescEditDescribe",
        (SECOND, 0),
        310,
        440,
        clip=studio["clip"],
        source_text=scene["source_description"],
        edit_text=scene["edit_description"],
    )
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
    empty = graph.add("CLIPTextEncode", sampler.below(), 300, 100, "Empty description", clip=studio["clip"])
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
    add_notes(graph, (FOURTH + 340, 880), (400, 130), (LEFT, 900))


def unify_blueprint(graph: Blueprint) -> None:
    """UnifyEdit on a photo as one node."""
    sockets = {
        name: graph.socket(name, kind)
        for name, kind in (
            ("model", "MODEL"),
            ("clip", "CLIP"),
            ("vae", "VAE"),
            ("image", "IMAGE"),
            ("mask", "MASK"),
            ("source_description", "STRING"),
            ("edit_description", "STRING"),
            ("side", "INT"),
            ("steps", "INT"),
            ("cfg", "FLOAT"),
            ("denoise", "FLOAT"),
            ("structure", "FLOAT"),
            ("words", "FLOAT"),
            ("auto_mask", "BOOLEAN"),
            ("inversion", "COMBO"),
            ("seed", "INT"),
        )
    }
    crop = graph.add(
        "DescEditCrop", (0, 0), image=sockets["image"], mask=sockets["mask"], side=sockets["side"]
    )
    latent = graph.add("VAEEncode", crop.below(), pixels=crop["image"], vae=sockets["vae"])
    empty = graph.add("CLIPTextEncode", latent.below(), title="Empty description", clip=sockets["clip"])
    describe = graph.add(
        "DescEditDescribe",
        (380, 0),
        clip=sockets["clip"],
        source_description=sockets["source_description"],
        edit_description=sockets["edit_description"],
    )
    options = graph.add(
        "DescEditUnifyOptions",
        describe.below(),
        auto_mask=sockets["auto_mask"],
        inversion=sockets["inversion"],
        virtual_seed=sockets["seed"],
    )
    names = ("steps", "cfg", "denoise", "structure", "words")
    dials: dict[str, Any] = {name: sockets[name] for name in names}
    unify = graph.add(
        "DescEditUnify",
        (760, 0),
        model=sockets["model"],
        source=describe["source"],
        edit=describe["edit"],
        edit_tokens=describe["edit_tokens"],
        latent=latent[0],
        negative=empty[0],
        mask=crop["mask"],
        options=options[0],
        **dials,
    )
    edited = graph.add("VAEDecode", unify.below(), samples=unify["latent"], vae=sockets["vae"])
    whole = graph.add(
        "DescEditStitch", edited.below(), crop=crop["crop"], edited=edited[0], mask=unify["mask"]
    )
    graph.results += [("image", whole[0]), ("crop_mask", unify["mask"]), ("plot", unify["plot"])]
