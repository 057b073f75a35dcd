"""`python dev.py studio` trains the Tiny Studio; `python dev.py studio --report` measures the shipped one.

All scenes have a combination of attributes that no training saw, and run with the host's own classes and
sampler. The attribute classifier reads the images. A prompt counts as right if every attribute that it names
or implies is right.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import kornia.metrics
import numpy as np
import torch

from ...models.tiny_studio import scenes, studio
from ...patches import inversion
from ...pictures.contact_sheet import draw_sheet, save_image, to_image
from ..output import write_json
from . import attribute_classifier, train
from .attribute_classifier import AttributeClassifier

PROMPTS, STEPS, CFG, BATCH = 300, 25, 3.0, 50


def held_scenes(count: int, seed: int) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, held=True) for _ in range(count)]


def drawings(chosen: list[scenes.Scene]) -> torch.Tensor:
    """[B, 128, 128, 3], 0 to 1."""
    return torch.from_numpy(np.stack([scene.draw() for scene in chosen]))


def psnr_db(image: torch.Tensor, target: torch.Tensor) -> float:
    """Mean PSNR over the batch for values 0 to 1, in dB."""
    return float(np.mean([kornia.metrics.psnr(a, b, 1.0).item() for a, b in zip(image, target, strict=True)]))


def generate(model: Any, clip: Any, vae: Any, texts: list[str], seed: int) -> torch.Tensor:
    """One image per text with the host's Euler sampler, [B, 128, 128, 3], 0 to 1."""
    encoded = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=False) for text in [*texts, ""]]
    positive = [[torch.cat(encoded[:-1]), {}]]
    negative = [[encoded[-1], {}]]
    latent = torch.zeros(len(texts), 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, seed)
    out = comfy.sample.sample(
        model, noise, STEPS, CFG, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=seed
    )
    return vae.decode(out)


def attribute_scores(
    reader: AttributeClassifier,
    chosen: list[scenes.Scene],
    pictures: torch.Tensor,
    named: list[set[str]],
) -> tuple[dict[str, float], float, list[bool]]:
    """For each attribute the fraction read right where it was named, and the fraction of images with all
    attributes right.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    whole = []
    for scene, read, names in zip(chosen, reader.read(pictures), named, strict=True):
        marks = {name: read.get(name) == scene.values[name] for name in names}
        for name, mark in marks.items():
            right[f"{scene.kind}.{name}"].append(mark)
        whole.append(all(marks.values()))
    return (
        {name: float(np.mean(marks)) for name, marks in sorted(right.items())},
        float(np.mean(whole)),
        whole,
    )


def inversion_psnr(model: Any, clip: Any, vae: Any, chosen: list[scenes.Scene]) -> float:
    """PSNR of images inverted and sampled again by the host's Euler sampler, against the VAE's own
    reconstruction.
    """
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    values = []
    for scene in chosen:
        latent = vae.encode(drawings([scene]))
        source = [[clip.encode_from_tokens(clip.tokenize(scenes.caption(scene)), return_pooled=False), {}]]
        path = inversion.invert(model, latent, source, sigmas, refine=3)
        start = model.model.process_latent_out(path.trajectory[0].clone())
        again = comfy.sample.sample_custom(
            model, torch.zeros_like(start), 1.0, sampler, sigmas, source, source, start, disable_pbar=True
        )
        values.append(psnr_db(vae.decode(again), vae.decode(latent)))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py studio", description=__doc__, add_help=False)
    parser.add_argument(
        "--report", action="store_true", help="measure the shipped studio and draw its contact sheet"
    )
    parser.add_argument("--json", type=Path, help="write the metrics as one flat JSON object")
    parser.add_argument(
        "--out", type=Path, default=Path("output/studio"), help="where the contact sheet goes"
    )
    args, rest = parser.parse_known_args()
    if not args.report:
        train.main(rest)
        return
    torch.set_num_threads(2)
    model, clip, vae = studio.load_model(), studio.load_clip(), studio.load_vae()
    reader = attribute_classifier.load()
    with torch.inference_mode():
        fresh = held_scenes(1000, 11)
        pictures = drawings(fresh)
        drawn, _, _ = attribute_scores(
            reader, fresh, pictures, [{"kind", *scene.values} - {"kind"} for scene in fresh]
        )
        vae_psnr = psnr_db(vae.decode(vae.encode(pictures[:200])), pictures[:200])
        rng = np.random.default_rng(12)
        chosen = held_scenes(PROMPTS, 13)
        named = [scenes.random_named(scene, rng) for scene in chosen]
        texts = [scenes.caption(scene, names) for scene, names in zip(chosen, named, strict=True)]
        made = torch.cat(
            [generate(model, clip, vae, texts[i : i + BATCH], seed=i) for i in range(0, PROMPTS, BATCH)]
        )
        spoken = [scenes.said(scene, names) for scene, names in zip(chosen, named, strict=True)]
        attributes, prompts, marks = attribute_scores(reader, chosen, made, spoken)
        metrics = {
            "vae_psnr_db": vae_psnr,
            "judge_accuracy_min": min(drawn.values()),
            "attribute_accuracy_min": min(attributes.values()),
            "prompt_accuracy": prompts,
            "inversion_psnr_db": inversion_psnr(model, clip, vae, fresh[:10]),
            "file_mb": studio.FILE.stat().st_size / 1e6,
        }
    rows = [slice(start, start + 8) for start in range(0, 64, 8)]
    columns = [("", made[column:64:8]) for column in range(8)]
    framed = [[not mark for mark in marks[row]] for row in rows]
    sheet = args.out / "contact_sheet.png"
    save_image(to_image(draw_sheet(columns, 128, [texts[row] for row in rows], framed)[0]), sheet)
    print(f"{'attribute':<20}{'on drawings':>20}{'model':>10}")
    for name in drawn:
        print(f"{name:<20}{drawn[name]:>20.3f}{attributes[name]:>10.3f}")
    for name, value in metrics.items():
        print(f"{name:<24}{value:.3f}")
    print(f"contact sheet: {sheet}")
    write_json(args.json, metrics)


if __name__ == "__main__":
    main()
