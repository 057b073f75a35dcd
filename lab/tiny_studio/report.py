"""`python dev.py studio` trains the Tiny Studio; `python dev.py studio --report` measures the shipped one.
With `--flux` both are about the Tiny Flux (`train_flow`).

All scenes have a combination of attributes that no training saw, and run with the host's own classes and
sampler. The attribute classifier reads the images. A prompt counts as right if every attribute that it names
or implies is right.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
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


def held_scenes(count: int, seed: int, kind: str | None = None) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, kind, held=True) for _ in range(count)]


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
) -> tuple[dict[str, float], list[bool]]:
    """For each attribute the fraction read right where it was named, and for each image whether all of its
    attributes are right.
    """
    found = reader.read_as([scene.kind for scene in chosen], pictures)
    right: dict[str, list[bool]] = defaultdict(list)
    whole = []
    for scene, read, names in zip(chosen, found, named, strict=True):
        marks = {name: read.get(name) == scene.values[name] for name in names}
        for name, mark in marks.items():
            right[f"{scene.kind}.{name}"].append(mark)
        whole.append(all(marks.values()))
    return {name: float(np.mean(marks)) for name, marks in sorted(right.items())}, whole


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
        path = inversion.invert(model, latent, source, sigmas, refine=inversion.REFINE)
        start, noise = inversion.sampler_inputs(model, latent, path)
        again = comfy.sample.sample_custom(
            model, noise.samples, 1.0, sampler, sigmas, source, source, start, disable_pbar=True
        )
        values.append(psnr_db(vae.decode(again), vae.decode(latent)))
    return float(np.mean(values))


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts and the model's images of them.

    marks: whether all attributes of an image are right. drawn, made: for each attribute the fraction read
    right on drawings and on the images.
    """

    texts: list[str]
    images: torch.Tensor
    marks: list[bool]
    drawn: dict[str, float]
    made: dict[str, float]

    @property
    def accuracy(self) -> float:
        """The fraction of prompts with all attributes right."""
        return float(np.mean(self.marks))


def prompts(tiny: tuple[Any, Any, Any], kind: str | None = None, count: int = PROMPTS) -> Prompts:
    """`count` prompts for MODEL, CLIP and VAE, of scenes of a kind as in `scenes.sample_scene`."""
    reader = attribute_classifier.load()
    fresh = held_scenes(1000, 11, kind)
    drawn, _ = attribute_scores(reader, fresh, drawings(fresh), [set(scene.values) for scene in fresh])
    rng = np.random.default_rng(12)
    chosen = held_scenes(count, 13, kind)
    named = [scenes.random_named(scene, rng) for scene in chosen]
    texts = [scenes.caption(scene, names) for scene, names in zip(chosen, named, strict=True)]
    images = torch.cat([generate(*tiny, texts[i : i + BATCH], seed=i) for i in range(0, count, BATCH)])
    spoken = [scenes.said(scene, names) for scene, names in zip(chosen, named, strict=True)]
    made, marks = attribute_scores(reader, chosen, images, spoken)
    return Prompts(texts, images, marks, drawn, made)


def contact_sheet(found: Prompts, path: Path) -> None:
    """The first 64 images with their texts, a frame around each that is not right."""
    rows = [slice(start, start + 8) for start in range(0, 64, 8)]
    columns = [("", found.images[column:64:8]) for column in range(8)]
    framed = [[not mark for mark in found.marks[row]] for row in rows]
    save_image(to_image(draw_sheet(columns, 128, [found.texts[row] for row in rows], framed)[0]), path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py studio", description=__doc__, add_help=False)
    parser.add_argument(
        "--report", action="store_true", help="measure the shipped studio and draw its contact sheet"
    )
    parser.add_argument("--json", type=Path, help="write the metrics as one flat JSON object")
    parser.add_argument(
        "--out", type=Path, default=Path("output/studio"), help="where the contact sheet goes"
    )
    parser.add_argument("--flux", action="store_true", help="the Tiny Flux in place of the studio")
    args, rest = parser.parse_known_args()
    if args.flux:
        from . import train_flow  # which measures by this module

        train_flow.main([*rest, *(["--report"] if args.report else [])])
        return
    if not args.report:
        train.main(rest)
        return
    torch.set_num_threads(2)
    model, clip, vae = tiny = studio.load_model(), studio.load_clip(), studio.load_vae()
    with torch.inference_mode():
        single, two = prompts(tiny), prompts(tiny, "two")
        fresh = held_scenes(200, 11)
        pictures = drawings(fresh)
        metrics = {
            "vae_psnr_db": psnr_db(vae.decode(vae.encode(pictures)), pictures),
            "judge_accuracy_min": min(single.drawn.values()),
            "attribute_accuracy_min": min(single.made.values()),
            "prompt_accuracy": single.accuracy,
            "inversion_psnr_db": inversion_psnr(model, clip, vae, fresh[:10]),
            "file_mb": studio.FILE.stat().st_size / 1e6,
            "two_judge_accuracy_min": min(two.drawn.values()),
            "two_attribute_accuracy_min": min(two.made.values()),
            "two_prompt_accuracy": two.accuracy,
        }
    sheets = {args.out / "contact_sheet.png": single, args.out / "two_objects.png": two}
    for path, found in sheets.items():
        contact_sheet(found, path)
    print(f"{'attribute':<20}{'on drawings':>20}{'model':>10}")
    for found in (single, two):
        for name, fraction in found.drawn.items():
            print(f"{name:<20}{fraction:>20.3f}{found.made[name]:>10.3f}")
    for name, value in metrics.items():
        print(f"{name:<28}{value:.3f}")
    print(f"contact sheets: {', '.join(map(str, sheets))}")
    write_json(args.json, metrics)


if __name__ == "__main__":
    main()
