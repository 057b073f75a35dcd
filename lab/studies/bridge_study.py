"""`python dev.py bridge-study`: what the Tiny Studio's bridges do on 300 held-out edits, against what one
does without a bridge.

Every number comes from stored weights. Scales and strengths were chosen on the tuning cases (`--tune`
shows that search). The pictures of the cases are kept, so that a study that was stopped goes on.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import torch

from ...models.bridge import DIRECTIONS, FUSIONS
from ...models.bridge_file import load_bridge
from ...models.tiny_studio import studio
from ...patches import inversion
from ...patches.bridge.apply import apply_bridge
from ...patches.bridge.guidance import DualGuidance, DualGuider
from ...patches.bridge.run import BridgeSetup
from .study import Row, Study, command, contact_sheet, table
from .tiny_benchmark import Cases, Studio, cfg_guider, conditioning, euler, sigmas

ROOT = Path(__file__).resolve().parents[2]
COMPARED = Path(__file__).with_name("bridges")
PAGE, PAGE_TEXT = ROOT / "docs" / "bridge_study.md", Path(__file__).with_name("bridge_study_page.md")
PICTURE = ROOT / "docs" / "pictures" / "bridge_study.jpg"
# Chosen on the tuning cases.
GUIDANCE = DualGuidance(image=3.0, text=3.0)
TEXT_ONLY_CFG, DENOISE, INVERSION_CFG = 3.0, 0.2, 1.0
COMPARED_GUIDANCE = DualGuidance(image=1.5, text=3.0)
SWEEP = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def text_only(tiny: Studio, cases: Cases, cfg: float) -> torch.Tensor:
    """The edit description alone, from each case's own noise."""
    guider = cfg_guider(tiny.model, cases.edit_text, cases.no_text, cfg)
    return euler(guider, cases.noise, torch.zeros_like(cases.latent), sigmas(tiny))


def image_to_image(tiny: Studio, cases: Cases, denoise: float) -> torch.Tensor:
    """The source with noise of strength `denoise`, sampled with the edit description."""
    guider = cfg_guider(tiny.model, cases.edit_text, cases.no_text, TEXT_ONLY_CFG)
    return euler(guider, cases.noise, cases.latent, sigmas(tiny, denoise))


def inverted(tiny: Studio, cases: Cases, cfg: float) -> torch.Tensor:
    """The source's DDIM inversion with the source description, sampled with the edit description."""
    path = inversion.invert(tiny.model, cases.latent, conditioning(cases.source_text), sigmas(tiny), refine=1)
    start = tiny.model.model.process_latent_out(path.trajectory[0].clone())
    guider = cfg_guider(tiny.model, cases.edit_text, cases.no_text, cfg)
    return euler(guider, torch.zeros_like(start), start, sigmas(tiny))


def bridged(
    tiny: Studio, cases: Cases, file: Path, guidance: DualGuidance, instruction: bool = False
) -> torch.Tensor:
    """Dual guidance with a bridge, from each case's own noise."""
    setup = BridgeSetup(load_bridge(file), cases.latent, conditioning(cases.source_text))
    guider = DualGuider(apply_bridge(tiny.model, setup), guidance)
    wanted = cases.instruction if instruction else cases.edit_text
    guider.set_conds(conditioning(wanted), conditioning(cases.no_text))
    return euler(guider, cases.noise, torch.zeros_like(cases.latent), sigmas(tiny))


def text_row(cfg: float = TEXT_ONLY_CFG) -> Row:
    return Row(f"text only, CFG {cfg:g}", partial(text_only, cfg=cfg), f"text only {cfg}")


def image_row(denoise: float = DENOISE) -> Row:
    method = partial(image_to_image, denoise=denoise)
    return Row(f"image to image, denoise {denoise:g}", method, f"image to image {denoise} {TEXT_ONLY_CFG}")


def inverted_row(cfg: float = INVERSION_CFG) -> Row:
    return Row(f"DDIM inversion, CFG {cfg:g}", partial(inverted, cfg=cfg), f"inverted {cfg}")


def bridge_row(label: str, file: Path, guidance: DualGuidance = GUIDANCE, instruction: bool = False) -> Row:
    method = partial(bridged, file=file, guidance=guidance, instruction=instruction)
    return Row(label, method, f"bridge {guidance} {instruction}", (file,))


def variant_row(label: str, name: str) -> Row:
    """A bridge of the comparison; the one that learned from instructions is asked with them."""
    return bridge_row(label, COMPARED / f"{name}.safetensors", COMPARED_GUIDANCE, name == "instruction")


def tables() -> dict[str, list[Row]]:
    """The rows of every table, by the name that the page gives it."""
    shipped, equal = bridge_row("bridge", studio.BRIDGE), "reference_queries_linear"
    return {
        "methods": [shipped, text_row(), image_row(), inverted_row()],
        "fusions": [variant_row(f"{d}, {f}", f"{d}_{f}") for d in DIRECTIONS for f in FUSIONS],
        "starts": [
            variant_row("F starts at zero", equal),
            variant_row("F starts at random", "random_start"),
        ],
        "sweep": [
            bridge_row(f"λ_I = {image:g}", studio.BRIDGE, DualGuidance(image, GUIDANCE.text))
            for image in SWEEP
        ],
        "wordings": [variant_row("descriptions", equal), variant_row("instructions", "instruction")],
        "times": [
            variant_row("s = 0", equal),
            variant_row("s = t", "same_time"),
        ],
    }


def measure(study: Study) -> tuple[dict[str, float], str]:
    """The figures, and the page with all tables; draws the page's picture."""
    rows = tables()
    scores = {name: {row.label: study.scores(row) for row in some} for name, some in rows.items()}
    bridge, *baselines = scores["methods"].values()
    figures = {
        "success": bridge.mean("success"),
        "success_worst_type": bridge.worst_type(),
        "success_best_baseline": max(other.mean("success") for other in baselines),
        "psnr_db": bridge.mean("psnr_db"),
        "psnr_db_best_baseline": max(other.mean("psnr_db") for other in baselines),
    }
    for (direction, fusion), found in zip(
        product(DIRECTIONS, FUSIONS), scores["fusions"].values(), strict=True
    ):
        figures[f"success_{direction}_{fusion}"] = found.mean("success")
    shown = {
        row.label: (study.pictures(row), scores["methods"][row.label].success) for row in rows["methods"]
    }
    contact_sheet(study.cases, shown, 2, PICTURE)
    page = PAGE_TEXT.read_text(encoding="utf-8").format(
        cases=len(study.cases),
        margin=100 * (figures["success"] - figures["success_best_baseline"]),
        short="reaches 90%" if figures["success"] >= 0.9 else "stays below 90%",
        image=GUIDANCE.image,
        text=GUIDANCE.text,
        compared=COMPARED_GUIDANCE.image,
        **{name: table(found, by_type=True) for name, found in scores.items()},
    )
    return figures, page


def tune(study: Study) -> None:
    """The searches on the tuning cases."""
    scales = [
        *(DualGuidance(image, text) for text in (3.0, 5.0, 2.0) for image in (2.0, 2.5, 3.0, 4.0)),
        *(DualGuidance(image, 2.0, "release") for image in (0.5, 1.5)),
    ]
    rows = [
        *map(text_row, (2.0, 3.0, 5.0)),
        *map(image_row, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
        *map(inverted_row, (1.0, 2.0, 3.0, 5.0)),
        *(
            bridge_row(f"bridge, {g.formula}, λ_I = {g.image:g}, λ_T = {g.text:g}", studio.BRIDGE, g)
            for g in scales
        ),
    ]
    print(table({row.label: study.scores(row) for row in rows}, by_type=True))


if __name__ == "__main__":
    command("dev.py bridge-study", __doc__, PAGE, measure, tune)
