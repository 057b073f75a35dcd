"""`python dev.py bridge-study`: bridges of the Tiny Studio on 300 held-out edits, against baselines.

The page is written from stored rows; `--measure` first measures what is missing or of earlier weights.
Scales and strengths were chosen on the tuning cases (`--tune` measures and prints that search).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from ...models.bridge import DIRECTIONS, FUSIONS
from ...models.tiny_studio import studio
from ...patches.bridge.guidance import DualGuidance
from ..tiny_studio.train_bridge import WHOLE
from ..tiny_studio.train_instruct import BATCH as PAIRS
from .claims import Aim, Claim, Comparison
from .instruct import instructed, steps_learned
from .methods import TEXT_CFG, bridged, image_to_image, inverted, text_only
from .publish import Plan, command
from .studio import StudioMethod
from .study import AGAINST_TRUE, Rows, Study, Tables, best, strongest

COMPARED = Path(__file__).with_name("bridges")
# Chosen on the tuning cases.
GUIDANCE = DualGuidance(image=3.0, text=3.0)
DENOISE, INVERSION_CFG = 0.2, 1.0
COMPARED_GUIDANCE = DualGuidance(image=1.5, text=3.0)
INSTRUCT = (1.5, 1.5)  # s_I and s_T
SWEEP = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def baselines() -> dict[str, StudioMethod]:
    """The methods without a bridge and without UnifyEdit."""
    return {
        f"text only, CFG {TEXT_CFG:g}": text_only(),
        f"image to image, denoise {DENOISE:g}": image_to_image(DENOISE),
        f"DDIM inversion, CFG {INVERSION_CFG:g}": inverted(INVERSION_CFG),
    }


def variant(name: str) -> StudioMethod:
    """A bridge of the comparison; the one trained on instructions gets instructions."""
    return bridged(COMPARED / f"{name}.safetensors", COMPARED_GUIDANCE, name == "instruction")


def tables() -> dict[str, Rows]:
    """The rows of every table, by the name that the page gives it."""
    equal = variant("reference_queries_linear")
    return {
        "methods": {
            "bridge": bridged(studio.BRIDGE, GUIDANCE),
            **baselines(),
            "InstructPix2Pix": instructed(*INSTRUCT),
        },
        "sweep": {
            f"λ_I = {image:g}": bridged(studio.BRIDGE, DualGuidance(image, GUIDANCE.text)) for image in SWEEP
        },
        "wordings": {"descriptions": equal, "instructions": variant("instruction")},
        "starts": {"F starts at zero": equal, "F starts at random": variant("random_start")},
        "times": {"s = 0": equal, "s = t": variant("same_time")},
        "directions": {
            "reference_queries, the bridge that ships": bridged(studio.BRIDGE, GUIDANCE),
            "edit_queries": bridged(COMPARED / "edit_queries.safetensors", GUIDANCE),
        },
        "fusions": {f"{d}, {f}": variant(f"{d}_{f}") for d, f in product(DIRECTIONS, FUSIONS)},
    }


def metrics(study: Study, tables: Tables) -> dict[str, float]:
    """The numbers for machines."""
    bridge, *others = tables["methods"].values()
    found = {
        "success": study.mean(bridge),
        "success_worst_type": study.worst_type(bridge),
        "success_best_baseline": best(map(study.mean, others)),
        "psnr_db": study.mean(bridge, "target_psnr"),
        "psnr_db_best_baseline": best(study.mean(other, "target_psnr") for other in others),
    }
    for (direction, fusion), method in zip(
        product(DIRECTIONS, FUSIONS), tables["fusions"].values(), strict=True
    ):
        found[f"success_{direction}_{fusion}"] = study.mean(method)
    return found


# Metrics of the paper's main table, and its figures of DescriptiveEdit and InstructPix2Pix.
PAPER = {
    "l1": ("L1", 0.065, 0.083),
    "l2": ("L2", 0.011, 0.015),
    "lpips": ("LPIPS", 0.139, 0.210),
    "psnr": ("PSNR", 20.99, 20.03),
    "ssim": ("SSIM", 0.661, 0.619),
    "dino_i": ("DINO-I", 0.843, 0.740),
    "clip_i": ("CLIP-I", 0.874, 0.805),
    "clip_t": ("CLIP-T", 0.315, 0.293),
}
BEST_IN_PAPER = ("l1", "l2", "lpips", "psnr", "dino_i", "clip_i")
ABLATED = ("success", "psnr", "ssim")


def claims(study: Study, tables: Tables) -> list[Claim]:
    """The paper's claims. Its metrics compare with the source; success stands in for CLIP-T in ablations."""
    bridge, *others = tables["methods"].items()
    found = []
    for label, method in others:
        if label.startswith("InstructPix2Pix"):
            found += [
                Claim(
                    f"Better than InstructPix2Pix in {name} (there {ours} and {theirs})",
                    (Comparison(metric, bridge, (label, method)),),
                )
                for metric, (name, ours, theirs) in PAPER.items()
            ]
            rival = (label, method)
            found.append(
                Claim(
                    "Follows the text better than InstructPix2Pix (success stands for CLIP-T)",
                    (Comparison("success", bridge, rival),),
                )
            )
            found.append(
                Claim(
                    "Keeps more than InstructPix2Pix (the structure distance stands for DINO-I)",
                    (Comparison("structure", bridge, rival),),
                )
            )
    for metric in BEST_IN_PAPER:
        rival = strongest(study, others, metric)
        text = f"Best of all methods in {PAPER[metric][0]} (here against the strongest)"
        found.append(Claim(text, (Comparison(metric, bridge, rival),)))
    found.append(Claim("Descriptions are better than instructions", _ordered(tables["wordings"], ABLATED)))
    found += [
        Claim(
            f"The fusion linear is better than add, and add than replace ({direction})",
            _ordered({f: tables["fusions"][f"{direction}, {f}"] for f in FUSIONS}, ABLATED),
        )
        for direction in DIRECTIONS
    ]
    found.append(Claim("F starting at zero is better than at random", _ordered(tables["starts"], ABLATED)))
    sweep = list(zip(SWEEP, tables["sweep"].items(), strict=True))
    inside, outside = (
        strongest(study, [row for image, row in sweep if (1 <= image <= 2.5) == wanted])
        for wanted in (True, False)
    )
    found.append(
        Claim(
            "λ_I from 1 to 2.5 is best (here the best inside against the best outside)",
            (Comparison("success", inside, outside),),
        )
    )
    found.append(
        Claim(
            "More λ_I keeps more of the image (here the ends of the sweep)",
            (Comparison("structure", sweep[-1][1], sweep[0][1]),),
        )
    )
    found.append(
        Claim(
            "Works with ControlNet, IP-Adapter and community checkpoints",
            (),
            "shown there as pictures; needs their files. The tests run small random ones",
        )
    )
    return found


def _ordered(rows: Rows, metrics: Iterable[str]) -> tuple[Comparison, ...]:
    """Each row against the next one."""
    pairs = list(pairwise(rows.items()))
    return tuple(Comparison(metric, *pair) for pair in pairs for metric in metrics)


def aims(study: Study, tables: Tables) -> list[Aim]:
    """What the shipped bridge should reach."""
    found = metrics(study, tables)
    margin = found["success"] - found["success_best_baseline"]
    return [
        Aim("success", found["success"], 0.9),
        Aim("success above the best baseline", margin, 0.2),
        Aim("PSNR, that of the best baseline", found["psnr_db"], found["psnr_db_best_baseline"], "dB"),
    ]


def texts(study: Study, tables: Tables, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The page's values beside the tables."""
    return {
        "image": GUIDANCE.image,
        "text": GUIDANCE.text,
        "compared": COMPARED_GUIDANCE.image,
        "s_image": INSTRUCT[0],
        "s_text": INSTRUCT[1],
        "steps": steps_learned(),
        "whole": WHOLE.steps,
        "batch": PAIRS,
    }


def search() -> dict[str, Rows]:
    """The search on the tuning cases."""
    scales = [DualGuidance(image, text) for text in (3.0, 5.0, 2.0) for image in (2.0, 2.5, 3.0, 4.0)]
    scales += [DualGuidance(image, 2.0, "release") for image in (0.5, 1.5)]
    rows = {f"text only, CFG {cfg:g}": text_only(cfg) for cfg in (2.0, 3.0, 5.0)}
    for tenths in range(1, 9):
        rows[f"image to image, denoise {tenths / 10:g}"] = image_to_image(tenths / 10)
    rows |= {f"DDIM inversion, CFG {cfg:g}": inverted(cfg) for cfg in (1.0, 2.0, 3.0, 5.0)}
    for image, text in product((1.0, 1.5, 2.0), (1.5, 2.0, 3.0)):
        rows[f"InstructPix2Pix, s_I = {image:g}, s_T = {text:g}"] = instructed(image, text)
    for g in scales:
        rows[f"bridge, {g.formula}, λ_I = {g.image:g}, λ_T = {g.text:g}"] = bridged(studio.BRIDGE, g)
    return {"search": rows}


PLAN = Plan("bridge_study", AGAINST_TRUE, tables, metrics, texts, search, claims, aims, shown=4)

if __name__ == "__main__":
    command("dev.py bridge-study", __doc__, PLAN)
