"""The studies: their methods on held-out edits of the Tiny Studio, and the pages from known results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import tolerance
from host import Host
from PIL import Image


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = ("bridge_study", "methods", "results_page", "studio", "study", "unify_study")
    found = {name: host.pack_module(f"lab.studies.{name}") for name in names}
    found |= {name: host.pack_module(f"lab.benchmark.{name}") for name in ("layouts", "results")}
    return SimpleNamespace(**found, shows=host.pack_module("lab.tiny_studio.attribute_classifier").shows)


@pytest.fixture(scope="module")
def tiny(lab: Any) -> Any:
    """The studio."""
    return lab.studio.Studio.load()


@pytest.fixture(scope="module")
def cases(lab: Any) -> list[Any]:
    """Two held-out cases of each type."""
    return lab.study.first_of_each_type(lab.layouts.read_cases("tiny-studio", None, "test"), 2)


@pytest.fixture(scope="module")
def batch(lab: Any, tiny: Any, cases: list[Any]) -> Any:
    """The first case of each type."""
    return lab.studio.Batch.of(tiny, cases[::2])


def changed(host: Host, batch: Any, pictures: torch.Tensor) -> int:
    """In how many pictures the classifier reads the attribute that the edit changes."""
    read = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(pictures)
    return sum(
        all(seen.get(name) == value for name, value in pair.changed.items())
        for seen, pair in zip(read, batch.pairs, strict=True)
    )


def test_shipped_bridge(host: Host, lab: Any, tiny: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: on edits it never saw, the shipped bridge makes what was asked and keeps the rest, which the
    text alone cannot; success is every attribute as in the true edit; what is there is not made again.
    """
    bridge, text, *_ = lab.bridge_study.tables()["methods"].values()
    study = lab.study.Study(tiny, cases, "test", tmp_path)
    study.run([bridge, text])
    drawn = lab.studio.Batch.of(tiny, cases)
    error = [
        (torch.stack([study.picture(method, case) for case in cases]) - drawn.target).square().mean((1, 2, 3))
        for method in (bridge, text)
    ]
    bridged, alone = (float((-10 * values.log10()).mean()) for values in error)
    assert bridged > 22
    assert bridged > alone + 5
    assert study.mean(bridge, "target_psnr") == pytest.approx(bridged, abs=1e-3)
    made = torch.stack([study.picture(bridge, case) for case in cases])
    assert changed(host, drawn, made) >= 0.75 * len(cases)
    read = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(made)
    wanted = [{"kind": pair.target.kind, **pair.target.values} for pair in drawn.pairs]
    success = [result["metrics"]["success"] for result in study.of(bridge)]
    assert success == [float(seen == values) for seen, values in zip(read, wanted, strict=True)]
    again = lab.study.Study(tiny, cases, "test", tmp_path)
    again.run([replace(bridge, edit=lambda *_: pytest.fail("made again"))])
    assert again.of(bridge) == study.of(bridge)


def test_shipped_settings_of_unifyedit(host: Host, lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: on edits that no training saw, most described attributes change and what lies outside the
    mask stays.
    """
    made = lab.unify_study.tables()["methods"]["UnifyEdit"].pictures(tiny, batch)
    assert changed(host, batch, made) >= 4
    outside = (batch.mask == 0)[..., None]
    error = (((made - batch.source) ** 2) * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    kept = -10 * error[torch.isfinite(error)].log10()
    assert float(kept.mean()) > 25


def test_settings_by_type(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: each type is edited with its own settings, and results come back in the cases' order."""
    rounding = 10 * tolerance(tiny.model.model.get_dtype_inference())
    batch = batch.chosen([5, 0, 4])
    types = [pair.edit_type for pair in batch.pairs]
    common = lab.methods.Edit(denoise=0.3, steps=2)
    edits = {kind: replace(common, cfg=1.0 + number) for number, kind in enumerate(types)}
    with torch.inference_mode():
        together = lab.methods.unify_by_type(tiny, batch, edits)
        for number, kind in enumerate(types):
            alone = lab.methods.unify_latents(tiny, batch.chosen([number]), edits[kind])
            torch.testing.assert_close(together[number : number + 1], alone, rtol=rounding, atol=rounding)
            other = lab.methods.unify_latents(tiny, batch.chosen([number]), replace(common, cfg=9.0))
            assert not torch.allclose(other, alone, atol=1e-2)


def test_injection(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: the baseline that injects attention is plain DDIM inversion at fractions of 0, is nearer to
    the source with all of the self-attention, and leaves the model as it was.
    """
    batch = batch.chosen([0, 3])

    def latents(method: Any) -> torch.Tensor:
        return method.edit(tiny, batch)

    with torch.inference_mode():
        plain = latents(lab.methods.inverted(3.0))
        none = latents(lab.methods.injected(3.0, 0.0, 0.0))
        torch.testing.assert_close(none, plain, rtol=1e-3, atol=1e-3)
        kept = latents(lab.methods.injected(3.0, 1.0, 0.0))
        crossed = latents(lab.methods.injected(3.0, 0.0, 1.0))
        assert not torch.allclose(crossed, plain, atol=1e-2)
        torch.testing.assert_close(latents(lab.methods.inverted(3.0)), plain)
    distance = [float((latent - batch.latent).square().mean()) for latent in (kept, plain)]
    assert distance[0] < distance[1]


def test_structure_distance(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: the distance is 0 for equal pictures, each case's own, and larger for another picture than
    for the true edit.
    """
    rounding = 10 * tolerance(tiny.model.model.get_dtype_inference())
    distance = lab.studio.structure_distance
    assert torch.equal(distance(tiny, batch, batch.source), torch.zeros(len(batch)))
    edited = distance(tiny, batch, batch.target)
    assert bool((edited < distance(tiny, batch, batch.source.flip(0))).all())
    one = batch.chosen([2])
    alone = distance(tiny, one, one.target)
    torch.testing.assert_close(alone, edited[2:3], rtol=rounding, atol=rounding / 10)


def test_stored_bridges(host: Host, lab: Any) -> None:
    """Protects: every bridge that the study names is there, is what its name says, and ships small."""
    load = host.pack_module("models.bridge_file").load_bridge
    assert host.pack_module("models.tiny_studio.studio").BRIDGE.stat().st_size < 6_000_000
    for label, method in lab.bridge_study.tables()["fusions"].items():
        settings = load(method.files[0]).model.settings
        assert f"{settings.direction}, {settings.fusion}" == label
    methods = [method for rows in lab.bridge_study.tables().values() for method in rows.values()]
    assert len(methods) > 12
    assert all(file.is_file() for method in methods for file in method.files)


def test_instructions(host: Host) -> None:
    """Protects: an instruction says the change alone."""
    scenes = host.pack_module("models.tiny_studio.scenes")
    for number in range(20):
        for kind in scenes.EDIT_TYPES:
            pair = scenes.sample_edit(kind, number)
            ((_, value),) = pair.changed.items()
            text = scenes.instruction(pair)
            assert value in text or value in ("yes", "no"), text
            kept = {v for k, v in pair.source.values.items() if k not in pair.changed and len(v) > 3}
            assert kind in ("face", "background", "style") or not kept & set(text.split()), text


@pytest.fixture
def known(lab: Any, cases: list[Any], tmp_path: Path) -> Any:
    """A study all of whose results are there: method n succeeds in the cases before the n-th and has a PSNR
    of 20 + n, without LPIPS; a style has no outside.
    """
    study = lab.study.Study(SimpleNamespace(), cases, "test", tmp_path / "work")
    plans = [lab.bridge_study.PLAN, lab.unify_study.PLAN]
    tables = [rows for plan in plans for rows in plan.tables().values()]
    methods = {method.label: method for rows in tables for method in rows.values()}
    for number, method in enumerate(methods.values()):
        for index, case in enumerate(cases):
            outside = None if case.edit_type == "style" else 30.0 + index
            metrics = {
                "success": float(index < number),
                "target_psnr": 20.0 + number,
                "psnr_outside": outside,
            }
            metrics |= {"target_ssim": 0.5, "ssim_outside": 0.9, "structure": 1.0}
            study.results.append(lab.results.new_result(method, case, 1.0, metrics))
            picture = Image.fromarray(np.full((128, 128, 3), 4 * number, np.uint8))
            lab.results.save_picture(study.results.folder, method.label, case.id, picture)
    return study


def cells(page: str) -> dict[str, dict[str, str]]:
    """The rows of the page's tables by their first cell, those of the last table if several have it."""
    found, head = {}, []
    for line in page.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = row
        elif row[0] != "---":
            found[row[0]] = dict(zip(head, row, strict=True))
    return found


def test_pages_from_known_results(
    lab: Any, known: Any, cases: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the pages of both studies and docs/results.md hold the means of the results, also by type;
    what was not measured is empty; the numbers for machines have their names; nothing is computed again.
    """
    monkeypatch.setattr(lab.unify_study, "seconds", lambda tiny, rows: dict.fromkeys(rows, 1.5))
    monkeypatch.setattr(
        lab.study.Batch, "of", lambda tiny, cases: SimpleNamespace(source=plain, target=plain)
    )
    plain = torch.zeros(12, 128, 128, 3)
    metrics, page = lab.results_page.write(known, (lab.bridge_study.PLAN, lab.unify_study.PLAN), tmp_path)
    table = cells(page)
    text = table["text only, CFG 3"]  # the second of all methods, so it succeeds in the first case
    named = [text[name] for name in ("success", "PSNR (dB)", "SSIM", "LPIPS")]
    assert named == ["8.3%", "21.00", "0.500", ""]
    assert [text[kind] for kind in ("colour", "texture")] == ["50%", "0%"]
    outside = [30 + index for index, case in enumerate(cases) if case.edit_type != "style"]
    assert text["PSNR outside mask (dB)"] == f"{np.mean(outside):.2f}"
    baselines = ("text only, CFG 3", "image to image, denoise 0.2", "DDIM inversion, CFG 1")
    unify = ("UnifyEdit", "UnifyEdit without a mask", "UnifyEdit, denoise 0.4")
    assert list(table)[:8] == ["bridge", *baselines, *unify, "attention injection, 0.2 and 0.4"]
    assert metrics["bridge_study.success"] == 0
    assert metrics["bridge_study.psnr_db_best_baseline"] == 23
    assert {name.partition(".")[0] for name in metrics} == {"bridge_study", "unify_study"}
    assert len(metrics) == 11 + 18
    assert table["`success_best_baseline`"][""].endswith("%")
    study = (tmp_path / "unify_study.md").read_text()
    assert "| UnifyEdit without a mask | 1.50 |" in study
    assert "{" not in study
    with Image.open(tmp_path / "pictures" / "bridge_study.jpg") as picture:
        assert picture.getpixel((6 + 134 + 3, 200))[0] > 200  # the bridge's failures have a red frame


def test_one_label_for_two_methods(lab: Any) -> None:
    """Protects: a label that stands for different methods in the studies is refused."""
    rows = [{"methods": {"noise": lab.methods.text_only(cfg)}} for cfg in (1, 2)]
    plans = [SimpleNamespace(tables=lambda one=one: one) for one in rows]
    with pytest.raises(ValueError, match=r"'noise' is two methods: text only 1 and text only 2"):
        lab.results_page.side_by_side(plans)


def test_success_by_wording(lab: Any, cases: list[Any]) -> None:
    """Protects: a tuning case counts for its type and wording."""
    wanted = ("colour, complex", "face, simple")
    heads = [f"{case.edit_type}, {('simple', 'complex')[number % 2]}" for number, case in enumerate(cases)]
    results = [
        {"case": case.id, "metrics": {"success": float(head in wanted)}}
        for case, head in zip(cases, heads, strict=True)
    ]
    row = cells(lab.unify_study.success_by_wording(cases, {"a row": results}))["a row"]
    assert {name for name, cell in row.items() if cell == "100%"} == set(wanted)
    assert sorted(row.values())[:10] == ["0%"] * 10
