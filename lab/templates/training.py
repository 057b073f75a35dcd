"""The templates of making a bridge."""

from __future__ import annotations

from .graph import Graph
from .shared import (
    FOURTH,
    LEFT,
    PAIRED,
    SECOND,
    TALKER,
    TALKERS,
    THIRD,
    add_empty,
    add_notes,
    describe_scene,
    load_checkpoint,
    load_studio,
)


def make_pairs(graph: Graph) -> None:
    """Edit pairs of a folder of photos, by an instruction-edit model and a captioner."""
    edit_file, text_file, vae_file = (
        "flux-2-klein-4b-fp8.safetensors",
        "qwen_3_4b.safetensors",
        "flux2-vae.safetensors",
    )
    hub = "https://huggingface.co/"
    unet = graph.add(
        "UNETLoader",
        (LEFT, 0),
        270,
        90,
        unet_name=edit_file,
        models=(
            {
                "name": edit_file,
                "url": f"{hub}black-forest-labs/FLUX.2-klein-4b-fp8/resolve/main/{edit_file}",
                "directory": "diffusion_models",
            },
        ),
    )
    text = graph.add(
        "CLIPLoader",
        unet.below(),
        270,
        110,
        clip_name=text_file,
        type="flux2",
        models=(
            {
                "name": text_file,
                "url": f"{hub}Comfy-Org/z_image_turbo/resolve/main/split_files/text_encoders/{text_file}",
                "directory": "text_encoders",
            },
        ),
    )
    vae = graph.add(
        "VAELoader",
        text.below(),
        270,
        60,
        vae_name=vae_file,
        models=(
            {
                "name": vae_file,
                "url": f"{hub}Comfy-Org/flux2-dev/resolve/main/split_files/vae/{vae_file}",
                "directory": "vae",
            },
        ),
    )
    talker = graph.add(
        "CLIPLoader", vae.below(), 270, 110, "Captioner", clip_name=TALKER, type="ideogram4", models=TALKERS
    )
    photos = graph.add("LoadImageDataSetFromFolder", talker.below(), 270, 60, folder="edit_sources")
    scaled = graph.add(
        "ImageScaleToTotalPixels",
        photos.below(),
        270,
        110,
        image=photos[0],
        upscale_method="lanczos",
        megapixels=1.0,
        resolution_steps=16,
    )
    order = graph.add(
        "PrimitiveStringMultiline", (SECOND, 0), 310, 110, "Instruction", value="make it winter"
    )
    encoded = graph.add("CLIPTextEncode", order.below(), 310, 100, clip=text[0], text=order[0])
    latent = graph.add("VAEEncode", encoded.below(), 310, 60, pixels=scaled[0], vae=vae[0])
    seen = graph.add("ReferenceLatent", latent.below(), 310, 60, conditioning=encoded[0], latent=latent[0])
    guider = graph.add("BasicGuider", seen.below(), 310, 60, model=unet[0], conditioning=seen[0])
    sigmas = graph.add("Flux2Scheduler", guider.below(), 310, 110, steps=4, width=1024, height=1024)
    sampler = graph.add("KSamplerSelect", sigmas.below(), 310, 60, sampler_name="euler")
    noise = graph.add("RandomNoise", scaled.below(), 270, 90, noise_seed=1)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        sampler.below(),
        310,
        130,
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    edited = graph.add("VAEDecode", (THIRD, 0), 300, 60, samples=sampled[0], vae=vae[0])
    caption = graph.add(
        "TextGenerate",
        edited.below(),
        300,
        280,
        "Source description",
        clip=talker[0],
        image=scaled[0],
        prompt="Describe this picture in one sentence of at most 20 words: subject first, then the setting.",
        max_length=64,
        sampling_mode="off",
    )
    prompt = graph.add(
        "DescEditDescribePrompt",
        caption.below(),
        300,
        220,
        instruction=order[0],
        source_description=caption[0],
    )
    told = graph.add(
        "TextGenerate",
        prompt.below(),
        300,
        280,
        "Edit description",
        clip=talker[0],
        image=edited[0],
        prompt=prompt[0],
        max_length=128,
        sampling_mode="off",
    )
    at = (FOURTH, 0)
    graph.add("ImageCompare", at, 360, 380, "Before and after", image_a=scaled[0], image_b=edited[0])
    graph.add(
        "DescEditSavePair",
        (at[0], 440),
        360,
        520,
        source=scaled[0],
        edited=edited[0],
        source_description=caption[0],
        edit_description=told[0],
    )
    add_notes(graph, (at[0] + 400, 0), (360, 900))


def train_tiny(graph: Graph) -> None:
    """A bridge trained on drawn pairs, and at work."""
    studio = load_studio(graph)
    pairs = graph.add("DescEditTinyPairs", studio.below(50), 270, 140, vae=studio["vae"], clip=studio["clip"])
    new = graph.add("DescEditNewBridge", pairs.below(), 270, 190, model=studio["model"], rank=32, alpha=32.0)
    trained = graph.add(
        "DescEditTrainBridge",
        new.below(40),
        270,
        500,
        model=studio["model"],
        bridge=new[0],
        pairs=pairs[0],
        **PAIRED,
    )
    scene = graph.add("DescEditTinyScene", (SECOND, 0), 310, 500, seed=4, wording="simple")
    describe = describe_scene(graph, scene.below(), studio, scene)
    latent = graph.add("VAEEncode", (THIRD, 0), 300, 60, pixels=scene["source"], vae=studio["vae"])
    bridged = graph.add(
        "DescEditApplyBridge",
        latent.below(),
        300,
        260,
        model=studio["model"],
        bridge=trained["bridge"],
        reference=latent[0],
        source=describe["source"],
    )
    empty = add_empty(graph, bridged.below(), 300, studio["clip"])
    guided = graph.add("DescEditDualGuidance", empty.below(), 300, 150, model=bridged[0], text_guidance=3.0)
    blank = graph.add("EmptyLatentImage", guided.below(), 300, 110, width=128, height=128)
    pictures = []
    for title, model, at in (
        ("Without the bridge", studio["model"], (FOURTH, 0)),
        ("With the bridge", guided[0], (FOURTH, 460)),
    ):
        sampled = graph.add(
            "KSampler",
            at,
            300,
            270,
            title,
            model=model,
            positive=describe["edit"],
            negative=empty[0],
            latent_image=blank[0],
            seed=1,
            steps=12,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
        )
        pictures.append(
            graph.add("VAEDecode", sampled.below(), 300, 60, samples=sampled[0], vae=studio["vae"])
        )
    graph.add(
        "DescEditCompare",
        (FOURTH + 340, 0),
        420,
        460,
        side=160,
        labels="source\nno bridge\nyour bridge\nperfect edit",
        **{
            "images.image0": scene["source"],
            "images.image1": pictures[0][0],
            "images.image2": pictures[1][0],
            "images.image3": scene["edited"],
        },
    )
    graph.add(
        "DescEditSaveBridge", (FOURTH + 340, 520), 420, 80, bridge=trained["bridge"], name="tiny_bridge"
    )
    add_notes(graph, (FOURTH + 340, 660), (420, 300))


def train(graph: Graph) -> None:
    """A bridge for SD1.5, trained on a folder of pairs."""
    base = load_checkpoint(graph)
    pairs = graph.add("DescEditEditPairs", base.below(), 270, 180, vae=base["VAE"], clip=base["CLIP"])
    new = graph.add("DescEditNewBridge", pairs.below(), 270, 190, model=base["MODEL"])
    trained = graph.add(
        "DescEditTrainBridge",
        (SECOND, 0),
        400,
        640,
        model=base["MODEL"],
        bridge=new[0],
        pairs=pairs[0],
        name="sd15_bridge",
    )
    graph.add("DescEditSaveBridge", trained.below(), 400, 60, bridge=trained["bridge"], name="sd15_bridge")
    add_notes(graph, (SECOND + 440, 0), (480, 720))
