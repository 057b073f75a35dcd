"""`python dev.py run lab.studies.flow_study`: UnifyEdit on the Tiny Flux, beside the edit
description alone and beside its own path without the losses.

Two methods of other papers for flows stand beside them, with the best settings of `--search --per-type 3`.
Prints success and similarity to the true edit, on held-out cases or, with `--tuning`, on those that settings
are chosen on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import comfy.utils
import torch

from ...metrics.image import measure_edit
from ...models.tiny_studio import flux, scenes, studio
from ...patches.unify.balance import Balance
from ..benchmark.cases import Case, first_of_each_type
from ..benchmark.layouts import read_cases
from ..output import markdown
from ..tiny_studio.attribute_classifier import shows
from .flow_methods import flow_edit, rf_edit
from .methods import Edit, text_only, unify
from .studio import Batch, Studio, StudioMethod

# Chosen on the tuning cases, five of each type; a style needs a third of the structure's weight.
EDIT = Edit(Balance(beta1=0.3), cfg=2.0, denoise=0.8, steps=15, masked=True, structure_region="outside")
STYLE = replace(EDIT, balance=Balance(beta1=0.1))
_PATH = replace(EDIT, balance=Balance(beta1=0.0, beta2=0.0))
_EDITS = {edit_type: STYLE if edit_type == "style" else EDIT for edit_type in scenes.EDIT_TYPES}


def search() -> dict[str, StudioMethod]:
    """The settings tried for the other papers' methods."""
    flow = product((1.0, 1.5), (2.0, 3.0), (5, 10))
    rf = product((1.0, 2.0), (3, 6), (0.25, 0.5))
    return {f"FlowEdit, CFG {s:g} and {c:g}, {n} steps left out": flow_edit(s, c, n) for s, c, n in flow} | {
        f"RF-Edit, CFG {c:g}, {n} blocks, {share:g} of the steps": rf_edit(c, n, share) for c, n, share in rf
    }


def methods() -> dict[str, StudioMethod]:
    """The rows of the table."""
    return {
        "the edit description alone": text_only(),
        "the source's path, no losses": unify(dict.fromkeys(scenes.EDIT_TYPES, _PATH)),
        "UnifyEdit": unify(_EDITS),
        "FlowEdit": flow_edit(1.5, 2.0, 5),
        "RF-Edit": rf_edit(2.0, 6, 0.5),
    }


@torch.inference_mode()
def table(tiny: Studio, cases: Sequence[Case], rows: Mapping[str, StudioMethod]) -> str:
    """A Markdown table: success, PSNR to the true edit and outside the mask, and CPU seconds an edit."""
    batch, lines = Batch.of(tiny, cases), []
    for label, method in rows.items():
        begin = time.process_time()
        made = tiny.vae.decode(method.edit(tiny, batch)).clamp(0, 1)
        seconds = (time.process_time() - begin) / len(cases)
        made = (made * 255).round().byte().float() / 255  # as a file holds it
        found = measure_edit(made, batch.source, batch.target, batch.mask, {})
        right = shows(made, [pair.target for pair in batch.pairs])
        numbers = (found[name].nanmean() for name in ("target_psnr", "psnr_outside"))
        cells = [f"{sum(right) / len(cases):.1%}", *(f"{float(number):.2f}" for number in numbers)]
        lines.append([label, *cells, f"{seconds:.1f}"])
    return markdown(["", "success", "PSNR (dB)", "PSNR outside mask (dB)", "CPU seconds an edit"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="flow_study", description=__doc__)
    parser.add_argument(
        "--network", type=Path, default=flux.FILE, help="other packed weights of the Tiny Flux"
    )
    parser.add_argument("--tuning", action="store_true", help="the tuning cases instead of held-out ones")
    parser.add_argument("--search", action="store_true", help="the search for the other methods' settings")
    parser.add_argument("--per-type", type=int, default=8, help="cases of each edit type")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    tiny = Studio(flux.load_model(args.network), studio.load_clip(), studio.load_vae())
    split = "tuning" if args.tuning or args.search else "test"
    cases = first_of_each_type(read_cases("tiny-studio", None, split), args.per_type)
    print(f"{len(cases)} {split} cases\n\n{table(tiny, cases, search() if args.search else methods())}")


if __name__ == "__main__":
    main()
