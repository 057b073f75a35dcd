"""The Tiny Studio's bridge on held-out edits, and the study that compares it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Host

A_TYPE = 2


@pytest.fixture(scope="module")
def study(host: Host) -> Any:
    """The study's modules."""
    names = ("bridge_study", "study", "tiny_benchmark")
    return SimpleNamespace(**{name: host.pack_module(f"lab.studies.{name}") for name in names})


@pytest.fixture(scope="module")
def cases(study: Any) -> Any:
    """A studio and a few held-out cases of each type."""
    tiny = study.tiny_benchmark.Studio.load()
    return tiny, study.tiny_benchmark.draw_cases(tiny, held_out=True, a_type=A_TYPE)


def test_the_shipped_bridge_edits(host: Host, study: Any, cases: Any, tmp_path: Path) -> None:
    """Protects: on edits it never saw, the shipped bridge makes what was asked and keeps the rest, which the
    text alone cannot; pictures that are there are not made again.
    """
    tiny, drawn = cases
    shown = study.study.Study(tiny, drawn, tmp_path)
    bridge, text, *_ = study.bridge_study.tables()["methods"]
    made, without = shown.pictures(bridge), shown.pictures(text)
    error = [(pictures - drawn.target).square().mean((1, 2, 3)) for pictures in (made, without)]
    bridged, alone = (float((-10 * values.log10()).mean()) for values in error)
    assert bridged > 22
    assert bridged > alone + 5
    read = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(made)
    asked = [
        all(seen.get(name) == value for name, value in pair.changed.items())
        for seen, pair in zip(read, drawn.pairs, strict=True)
    ]
    assert sum(asked) >= 0.75 * len(asked)
    scores = shown.scores(bridge)
    assert scores.mean("psnr_db") == pytest.approx(bridged, abs=1e-3)
    wanted = [{"kind": pair.target.kind, **pair.target.values} for pair in drawn.pairs]
    assert scores.success.tolist() == [seen == values for seen, values in zip(read, wanted, strict=True)]

    broken = study.study.Row(
        bridge.label, lambda *_: pytest.fail("made again"), bridge.settings, bridge.files
    )
    assert torch.equal(shown.pictures(broken), made)


def test_held_out_cases(host: Host, study: Any, cases: Any) -> None:
    """Protects: every case's target has a combination that no training saw, every type has as many cases,
    and tuning cases are none of the training's or of the held-out ones.
    """
    scenes = host.pack_module("models.tiny_studio.scenes")
    tiny, drawn = cases
    assert [pair.edit_type for pair in drawn.pairs] == [
        kind for kind in scenes.EDIT_TYPES for _ in range(A_TYPE)
    ]
    assert all(scenes.held_out(pair.target) for pair in drawn.pairs)
    tuning = study.tiny_benchmark.draw_cases(tiny, held_out=False, a_type=A_TYPE)
    assert not any(scenes.held_out(scene) for pair in tuning.pairs for scene in (pair.source, pair.target))


def test_stored_bridges(host: Host, study: Any) -> None:
    """Protects: every bridge that the study names is there, is what its name says, and ships small."""
    load = host.pack_module("models.bridge_file").load_bridge
    tiny = host.pack_module("models.tiny_studio.studio")
    assert tiny.BRIDGE.stat().st_size < 6_000_000
    for direction in ("edit_queries", "reference_queries"):
        for fusion in ("linear", "add", "replace"):
            settings = load(study.bridge_study.COMPARED / f"{direction}_{fusion}.safetensors").model.settings
            assert (settings.direction, settings.fusion) == (direction, fusion)
    rows = [row for some in study.bridge_study.tables().values() for row in some]
    assert rows
    assert all(file.is_file() for row in rows for file in row.files)


def test_instructions(host: Host) -> None:
    """Protects: an instruction says the change alone."""
    scenes = host.pack_module("models.tiny_studio.scenes")
    for number in range(20):
        for kind in scenes.EDIT_TYPES:
            pair = scenes.sample_edit(kind, number)
            ((_, value),) = pair.changed.items()
            text = scenes.instruction(pair)
            assert value in text or value in ("yes", "no"), text
            kept = {v for k, v in pair.target.values.items() if k not in pair.changed} - {
                "no",
                "red",
                "green",
            }
            assert kind in ("face", "background", "style") or not kept & set(text.split()), text


def test_table(study: Any) -> None:
    """Protects: a table's means are over all cases, a type's over its own, and what was not measured is
    empty.
    """
    scores = study.tiny_benchmark.Scores(
        types=("colour", "colour", "style"),
        success=torch.tensor([True, False, True]),
        psnr_db=torch.tensor([20.0, 22.0, 30.0]),
        ssim=torch.tensor([0.5, 0.5, 0.8]),
        lpips=torch.full((3,), torch.nan),
        kept_db=torch.tensor([30.0, 40.0, torch.nan]),
        kept_ssim=torch.tensor([0.9, 0.8, torch.nan]),
        structure=torch.tensor([1.0, 2.0, 3.0]),
    )
    line = study.study.table({"row": scores}, by_type=True).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["row", "66.7%", "24.00", "0.600", "", "35.00"]
    assert cells[6] == "50%"
    assert cells[10] == "100%"
