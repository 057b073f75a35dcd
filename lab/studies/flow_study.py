"""`python dev.py run lab.studies.flow_study`: UnifyEdit on the Tiny Flux, beside the edit
description alone and beside its own path without the losses, and its attention bridges.

Two methods of other papers for flows stand beside UnifyEdit, with the best settings of `--search methods
--per-type 3`; UnifyEdit's layers are from `--search layers`, the scales of the bridges from `--search bridges
--per-type 2`. Prints success and similarity to the true edit, on held-out cases or, with `--tuning` or
`--search`, on those that settings are chosen on; and the paired difference from the first row with its 95%
interval.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import comfy.utils
import torch

from ...metrics.image import measure_edit
from ...models.bridge import DIRECTIONS
from ...models.tiny_studio import flux, scenes, studio
from ...patches.bridge.guidance import DualGuidance
from ...patches.unify.balance import Balance
from ...patches.unify.settings import UnifyOptions
from ..benchmark.cases import Case, first_of_each_type
from ..benchmark.layouts import read_cases
from ..benchmark.statistics import estimate
from ..output import markdown
from ..tiny_studio.attribute_classifier import shows
from ..tiny_studio.train_bridge import VARIANTS
from .flow_methods import flow_edit, rf_edit
from .methods import Edit, bridged, text_only, unify
from .studio import Batch, Studio, StudioMethod
from .study import Rows


@dataclass(frozen=True)
class Layered(Edit):
    """structure_layers, word_layers: as in UnifyOptions."""

    structure_layers: str = ""
    word_layers: str = ""

    def options(self) -> UnifyOptions:
        layers = {"structure_layers": self.structure_layers, "word_layers": self.word_layers}
        return replace(super().options(), **layers)


# Chosen on the tuning cases; a style needs a third of the structure's weight.
EDIT = Layered(Balance(beta1=0.3), cfg=2.0, denoise=0.8, steps=15, masked=True, structure_region="outside")
LAYERS = {
    "the second double block": "double_block.1",
    "the single blocks 0 and 1": "single_block.0, single_block.1",
    "the single blocks 2 and 3": "single_block.2, single_block.3",
    "the single blocks 4 and 5": "single_block.4, single_block.5",
    "the single blocks 2 to 5": "single_block.2, single_block.3, single_block.4, single_block.5",
}
GUIDANCE = DualGuidance(image=4.0, text=2.0)
BRIDGES = Path(__file__).with_name("bridges")


def edited(
    beta1: float = EDIT.balance.beta1, beta2: float = EDIT.balance.beta2, **changes: Any
) -> StudioMethod:
    """UnifyEdit with these weights of structure and words, and changes of EDIT."""
    edit = replace(EDIT, balance=Balance(beta1=beta1, beta2=beta2), **changes)
    style = replace(edit, balance=Balance(beta1=beta1 / 3, beta2=beta2))
    return unify({kind: style if kind == "style" else edit for kind in scenes.EDIT_TYPES})


def methods() -> Rows:
    """The rows of UnifyEdit's table."""
    return {
        "the source's path, no losses": edited(0.0, 0.0),
        "the edit description alone": text_only(),
        "UnifyEdit": edited(),
        "FlowEdit": flow_edit(1.5, 2.0, 5),
        "RF-Edit": rf_edit(2.0, 6, 0.5),
    }


def bridges(guidance: DualGuidance = GUIDANCE) -> Rows:
    """The bridges that there are, by direction and rank of F."""
    found = {}
    for name, variant in VARIANTS.items():
        file = BRIDGES / f"{name}.safetensors"
        if variant.flux and file.is_file():
            rank = f"F of rank {variant.fuse_rank}" if variant.fuse_rank else "a full F"
            found[f"{variant.direction}, {rank}"] = bridged(file, guidance)
    return found


def searches() -> Mapping[str, Rows]:
    """What is tried on the tuning cases for other papers' methods, UnifyEdit's layers, the bridges'
    scales.
    """
    found: dict[str, dict[str, StudioMethod]] = {"methods": {}, "layers": {}, "bridges": {}}
    for source, cfg, skipped in product((1.0, 1.5), (2.0, 3.0), (5, 10)):
        label = f"FlowEdit, CFG {source:g} and {cfg:g}, {skipped} steps left out"
        found["methods"][label] = flow_edit(source, cfg, skipped)
    for cfg, blocks, share in product((1.0, 2.0), (3, 6), (0.25, 0.5)):
        label = f"RF-Edit, CFG {cfg:g}, {blocks} blocks, {share:g} of the steps"
        found["methods"][label] = rf_edit(cfg, blocks, share)
    found["layers"]["no losses"] = edited(0.0, 0.0)
    for name, keys in LAYERS.items():
        found["layers"][f"structure at {name}"] = edited(beta2=0.0, structure_layers=keys)
    for name, keys in LAYERS.items():
        found["layers"][f"words at {name}"] = edited(word_layers=keys)
    for image, text in product((1.0, 1.5, 2.0, 3.0, 4.0), (2.0, 3.0)):
        for direction in DIRECTIONS:
            label = f"{direction}, λ_I = {image:g}, λ_T = {text:g}"
            file = BRIDGES / f"flux_{direction}.safetensors"
            found["bridges"][label] = bridged(file, DualGuidance(image, text))
    return found


@torch.inference_mode()
def table(tiny: Studio, cases: Sequence[Case], rows: Rows) -> Iterator[str]:
    """The lines of a Markdown table: success, PSNR to the true edit and outside the mask, their paired
    differences from the first row, and CPU seconds an edit.
    """
    batch, first = Batch.of(tiny, cases), []
    head = ["", "success", "PSNR (dB)", "PSNR outside mask (dB)", "CPU seconds an edit"]
    yield from markdown(head, []).splitlines()
    for label, method in rows.items():
        begin = time.process_time()
        made = tiny.vae.decode(method.edit(tiny, batch)).clamp(0, 1)
        seconds = (time.process_time() - begin) / len(cases)
        made = (made * 255).round().byte().float() / 255  # as a file holds it
        found = measure_edit(made, batch.source, batch.target, batch.mask, {})
        right = torch.tensor(shows(made, [pair.target for pair in batch.pairs])).float()
        values = [100 * right, found["target_psnr"], found["psnr_outside"]]
        first = first or values
        means = [f"{float(right.mean()):.1%}", *(f"{float(one.nanmean()):.2f}" for one in values[1:])]
        changes = [against(one, base) for one, base in zip(values, first, strict=True)]
        cells = [" ".join(pair).strip() for pair in zip(means, changes, strict=True)]
        yield f"| {' | '.join([label, *cells, f'{seconds:.1f}'])} |"


def against(values: torch.Tensor, base: torch.Tensor) -> str:
    """The mean difference of two rows over their cases, with its interval. A style has no outside."""
    if values is base:
        return ""
    found = estimate([change for change in (values - base).tolist() if not math.isnan(change)])
    return f"({found.mean:+.2f}, {found.low:+.2f} to {found.high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="flow_study", description=__doc__)
    parser.add_argument(
        "--network", type=Path, default=flux.FILE, help="other packed weights of the Tiny Flux"
    )
    parser.add_argument("--tuning", action="store_true", help="the tuning cases instead of held-out ones")
    parser.add_argument("--bridges", action="store_true", help="the bridges instead of UnifyEdit")
    parser.add_argument("--search", choices=("methods", "layers", "bridges"), help="what was chosen how")
    parser.add_argument("--per-type", type=int, default=8, help="cases of each edit type")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    tiny = Studio(flux.load_model(args.network), studio.load_clip(), studio.load_vae())
    split = "tuning" if args.tuning or args.search else "test"
    cases = first_of_each_type(read_cases("tiny-studio", None, split), args.per_type)
    chosen = bridges() if args.bridges else methods()
    rows = searches()[args.search] if args.search else chosen
    print(f"{len(cases)} {split} cases\n", flush=True)
    for line in table(tiny, cases, rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
