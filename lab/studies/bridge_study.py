"""`python dev.py bridge-study`: bridges of the Tiny Studio on 300 held-out edits, against baselines.

All numbers come from stored weights. Scales and strengths were chosen on the tuning cases (`--tune` prints
that search). Results are kept, so a stopped study continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from ...models.bridge import DIRECTIONS, FUSIONS
from ...models.tiny_studio import studio
from ...patches.bridge.guidance import DualGuidance
from .methods import TEXT_CFG, bridged, image_to_image, inverted, text_only
from .study import AGAINST_TRUE, Plan, Rows, StudioMethod, Study, command

COMPARED = Path(__file__).with_name("bridges")
# Chosen on the tuning cases.
GUIDANCE = DualGuidance(image=3.0, text=3.0)
DENOISE, INVERSION_CFG = 0.2, 1.0
COMPARED_GUIDANCE = DualGuidance(image=1.5, text=3.0)
SWEEP = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


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
        "methods": {"bridge": bridged(studio.BRIDGE, GUIDANCE), **baselines()},
        "fusions": {f"{d}, {f}": variant(f"{d}_{f}") for d, f in product(DIRECTIONS, FUSIONS)},
        "starts": {"F starts at zero": equal, "F starts at random": variant("random_start")},
        "sweep": {
            f"λ_I = {image:g}": bridged(studio.BRIDGE, DualGuidance(image, GUIDANCE.text)) for image in SWEEP
        },
        "wordings": {"descriptions": equal, "instructions": variant("instruction")},
        "times": {"s = 0": equal, "s = t": variant("same_time")},
    }


def metrics(study: Study, rows: Mapping[str, Rows]) -> dict[str, float]:
    """The numbers for machines."""
    bridge, *others = rows["methods"].values()
    found = {
        "success": study.mean(bridge),
        "success_worst_type": study.worst_type(bridge),
        "success_best_baseline": max(map(study.mean, others)),
        "psnr_db": study.mean(bridge, "target_psnr"),
        "psnr_db_best_baseline": max(study.mean(other, "target_psnr") for other in others),
    }
    for (direction, fusion), method in zip(
        product(DIRECTIONS, FUSIONS), rows["fusions"].values(), strict=True
    ):
        found[f"success_{direction}_{fusion}"] = study.mean(method)
    return found


def texts(study: Study, rows: Mapping[str, Rows], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The page's values beside the tables."""
    return {
        "margin": 100 * (metrics["success"] - metrics["success_best_baseline"]),
        "short": "reaches 90%" if metrics["success"] >= 0.9 else "stays below 90%",
        "image": GUIDANCE.image,
        "text": GUIDANCE.text,
        "compared": COMPARED_GUIDANCE.image,
    }


def tune(study: Study) -> None:
    """The searches on the tuning cases."""
    scales = [DualGuidance(image, text) for text in (3.0, 5.0, 2.0) for image in (2.0, 2.5, 3.0, 4.0)]
    scales += [DualGuidance(image, 2.0, "release") for image in (0.5, 1.5)]
    rows = {f"text only, CFG {cfg:g}": text_only(cfg) for cfg in (2.0, 3.0, 5.0)}
    for tenths in range(1, 9):
        rows[f"image to image, denoise {tenths / 10:g}"] = image_to_image(tenths / 10)
    rows |= {f"DDIM inversion, CFG {cfg:g}": inverted(cfg) for cfg in (1.0, 2.0, 3.0, 5.0)}
    for g in scales:
        rows[f"bridge, {g.formula}, λ_I = {g.image:g}, λ_T = {g.text:g}"] = bridged(studio.BRIDGE, g)
    study.run(rows.values())
    print(study.table(rows))


PLAN = Plan("bridge_study", AGAINST_TRUE, tables, metrics, texts, tune, shown=4)

if __name__ == "__main__":
    command("dev.py bridge-study", __doc__, PLAN)
