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
    names = (
        *("bridge_study", "claims", "methods", "publish", "results_page", "rows"),
        *("studio", "study", "unify_study"),
    )
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
    text alone cannot; success is every attribute as in the true edit; the metrics are stored, and what is
    stored is not made again.
    """
    bridge, text, *_ = lab.bridge_study.tables()["methods"].values()
    study = lab.study.Study(tiny, cases, "test", folder=tmp_path)
    study.run([bridge, text])
    drawn = lab.studio.Batch.of(tiny, cases)
    made, written = ((method.pictures(tiny, drawn) * 255).round() / 255 for method in (bridge, text))
    error = [(pictures - drawn.target).square().mean((1, 2, 3)) for pictures in (made, written)]
    bridged, alone = (float((-10 * values.log10()).mean()) for values in error)
    assert bridged > 22
    assert bridged > alone + 5
    assert study.mean(bridge, "target_psnr") == pytest.approx(bridged, abs=1e-2)
    assert changed(host, drawn, made) >= 0.75 * len(cases)
    read = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(made)
    wanted = [{"kind": pair.target.kind, **pair.target.values} for pair in drawn.pairs]
    success = [result["metrics"]["success"] for result in study.of(bridge)]
    assert success == [float(seen == values) for seen, values in zip(read, wanted, strict=True)]
    again = lab.study.Study(tiny, cases, "test", folder=tmp_path)
    again.run([replace(bridge, edit=lambda tiny, batch: only_the_probe(bridge, tiny, batch))])
    assert again.of(bridge) == study.of(bridge)
    assert again.store.state(bridge) == ""


def test_a_probe_is_of_one_thread(
    lab: Any, tiny: Any, cases: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a machine with more threads does not take stored rows for those of other code."""
    threads, before = [], torch.get_num_threads()

    def note(*_: Any) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return torch.zeros(1, 4, 16, 16)

    monkeypatch.setattr(lab.study, "Batch", SimpleNamespace(of=note))
    study = lab.study.Study(tiny, cases, "test", folder=tmp_path)
    torch.set_num_threads(2)
    try:
        study.check(lab.studio.StudioMethod("a method", note, "settings"))
        assert (threads, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)


def only_the_probe(method: Any, tiny: Any, batch: Any) -> torch.Tensor:
    """The method's edit of one case; a second case is an error."""
    assert len(batch) == 1
    return method.edit(tiny, batch)


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


PSNR = 20.0


def single(lab: Any) -> tuple[Any, ...]:
    """The studies on scenes of one object."""
    return (lab.bridge_study.PLAN, lab.unify_study.PLAN)


@pytest.fixture
def known(lab: Any, cases: list[Any], tmp_path: Path) -> Any:
    """Both studies with every result stored: method n succeeds in the cases before the n-th and has a PSNR of
    20 + n, without LPIPS; a style has no outside.
    """
    plans = single(lab)
    tables = {plan.name: plan.tables() for plan in plans}
    study = lab.study.Study(SimpleNamespace(), cases, "test", tables, tmp_path / "rows")
    tuned = {plan.name: plan.search() for plan in plans}
    tuning = lab.study.Study(SimpleNamespace(), cases, "tuning", tuned, tmp_path / "rows")
    rows = [rows for some in tables.values() for rows in some.values()]
    methods = {method.label: method for some in rows for method in some.values()}
    for number, method in enumerate(methods.values()):
        study.store.add(method, made_up(lab, method, cases, number), [1.0], "a card")
    return [(study, tuning)] * len(plans)


def made_up(lab: Any, method: Any, cases: list[Any], number: int) -> list[Any]:
    """The results of method `number`, as `known` says."""
    results = []
    for index, case in enumerate(cases):
        outside = None if case.edit_type == "style" else 30.0 + index
        metrics = {
            "success": float(index < number),
            "target_psnr": PSNR + number,
            "psnr_outside": outside,
            "psnr": PSNR - number,
        }
        metrics |= {"target_ssim": 0.5, "ssim_outside": 0.9, "structure": 1.0}
        results.append(lab.results.new_result(method, case, 1.5, metrics))
    return results


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


def test_pages_from_known_results(lab: Any, known: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: all pages hold the means of the stored results, also by type, with no image made; what was
    not measured is empty and says so; the numbers for machines have their names.
    """
    metrics, page = lab.results_page.write(known, single(lab), tmp_path)
    table = cells(page)
    text = table["text only, CFG 3"]  # the second of all methods, so it succeeds in the first case
    named = [text[name] for name in ("success", "PSNR (dB)", "SSIM", "LPIPS")]
    assert named == ["8.3%", "21.00", "0.500", ""]
    assert [text[kind] for kind in ("colour", "texture")] == ["50%", "0%"]
    outside = [30 + index for index, case in enumerate(cases) if case.edit_type != "style"]
    assert text["PSNR outside mask (dB)"] == f"{np.mean(outside):.2f}"
    assert "Better than InstructPix2Pix in PSNR" in (tmp_path / "claims.md").read_text()
    baselines = {
        "InstructPix2Pix",
        "text only, CFG 3",
        "image to image, denoise 0.2",
        "DDIM inversion, CFG 1",
    }
    unify = {"UnifyEdit", "UnifyEdit without a mask, denoise 0.6, CFG 2", "UnifyEdit, denoise 0.6, CFG 2"}
    assert {"bridge", "attention injection"} | baselines | unify <= set(table)
    assert metrics["bridge_study.success"] == 0
    assert metrics["bridge_study.psnr_db_best_baseline"] == 24  # InstructPix2Pix, the last
    assert {name.partition(".")[0] for name in metrics} == {"bridge_study", "unify_study"}
    assert len(metrics) == 11 + 18
    assert table["`success_best_baseline`"][""].endswith("%")
    study = (tmp_path / "unify_study.md").read_text()
    (line, *_) = (line for line in study.splitlines() if line.startswith("| UnifyEdit without a mask,"))
    assert "| 1.50 |" in line  # seconds
    assert "| with a mask, denoise 0.6, CFG 2 (not measured) |" in study  # of the search, on the tuning cases
    assert all("{" not in file.read_text() for file in tmp_path.glob("*.md"))
    assert "All rows are of the weights, settings and code of this version. Measured on: a card." in page


def test_rows_of_earlier_weights_settings_and_code(
    lab: Any, known: Any, cases: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a stored row that is not what the code would give now says so on the page instead of passing,
    and measuring replaces it.
    """
    study, rows = known[0][0], lab.bridge_study.tables()["methods"]
    bridge, text, image, *_ = rows.values()

    def opened_with(rows: Any) -> Any:
        tables = {"bridge_study": {"methods": rows}}
        return lab.study.Study(study.tiny, cases, "test", tables, tmp_path / "rows")

    opened = opened_with(rows)
    store = opened.store
    assert {store.state(method) for method in rows.values()} == {""}
    store.check(bridge, [1.002])
    store.check(text, [1.05])
    assert (store.state(bridge), store.state(text)) == ("", "earlier code")
    other = replace(image, settings="denoise 0.25")
    rows = {**rows, "image to image, denoise 0.2": other}
    moved = opened_with(rows)
    assert moved.store.state(other) == "earlier settings"
    assert moved.of(other) == opened.of(image)
    assert "| image to image, denoise 0.2 (earlier settings) |" in moved.table(rows)
    moved.store.add(other, made_up(lab, other, cases, 1)[:3], [1.0], "a card")
    assert moved.store.state(other) == "3 of 12 cases"
    assert len(moved.of(other)) == 3
    monkeypatch.setattr(lab.studio.StudioMethod, "weights", {"tiny_studio.safetensors": "other"})
    assert opened.store.state(bridge) == "earlier weights"
    assert "0 of 5 rows" in opened.summary({"methods": rows})


def test_interrupted_measuring_goes_on(lab: Any, tiny: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: measuring begins with the main table, stores what is made, and goes on with the rest."""
    made: list[tuple[str, int]] = []

    def method(name: str) -> Any:
        def edit(tiny: Any, batch: Any) -> torch.Tensor:
            made.append((name, len(batch)))
            return batch.latent

        return lab.studio.StudioMethod(name, edit, name)

    tables = {"parts": {"part": method("part")}, "methods": {"whole": method("whole")}}

    def measure(**options: Any) -> list[tuple[str, int]]:
        made.clear()
        study = lab.study.Study(tiny, cases, "test", {"a study": tables}, tmp_path)
        lab.publish.measure([(study, tables)], **options)
        return list(made)

    assert measure(per_type=1) == [("whole", 1), ("whole", 6), ("part", 1), ("part", 6)]  # probe, then edits
    assert measure() == [("whole", 1), ("whole", 6), ("part", 1), ("part", 6)]
    assert measure() == [("whole", 1), ("part", 1)]
    assert measure(anew=True) == [("whole", 1), ("whole", 12), ("part", 1), ("part", 12)]
    assert measure(anew=True, shard=(1, 2)) == [("part", 1), ("part", 12)]


def test_settings_for_some_types(lab: Any, tiny: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: a method with settings for some edit types is measured on these alone, and complete then."""
    types = {cases[0].edit_type, cases[4].edit_type}
    made: list[set[str]] = []

    def edit(tiny: Any, batch: Any) -> torch.Tensor:
        made.append({pair.edit_type for pair in batch.pairs})
        return batch.latent

    method = lab.studio.StudioMethod("some", edit, "some", types=tuple(types))
    study = lab.study.Study(tiny, cases, "test", folder=tmp_path)
    study.run([method], per_type=1)
    assert study.store.state(method) == "2 of 4 cases"
    study.run([method])
    assert study.store.state(method) == ""
    assert {result["type"] for result in study.of(method)} == types == set.union(*made)


def test_code_that_makes_other_images(lab: Any, tiny: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: writing pages finds rows whose method now makes other images with the same settings, and
    `--measure` makes these anew and draws the sheet.
    """
    shift = 0.0

    def keep(tiny: Any, batch: Any) -> torch.Tensor:
        return batch.latent + shift

    method = lab.studio.StudioMethod("keep", keep, "keep")
    rows = {"methods": {"keep": method}}
    plan = SimpleNamespace(name="a_study", shown=1, tables=lambda: rows, search=dict)
    study = lab.study.Study(tiny, cases[:6], "test", {"a_study": rows}, tmp_path / "rows")

    def prepare(*words: str) -> str:
        args = lab.publish.parser("report", "").parse_args(words)
        lab.publish.prepare([plan], [(study, study)], args, tmp_path)
        return study.store.state(method)

    assert prepare("--measure") == ""
    assert prepare() == ""
    kept = study.mean(method, "psnr")
    shift = 1.0
    assert prepare() == "earlier code"
    assert study.mean(method, "psnr") == kept
    assert prepare("--measure") == ""
    assert study.mean(method, "psnr") < kept - 3
    assert (tmp_path / "pictures" / "a_study.jpg").is_file()


def test_claims_against_instruct_pix2pix(lab: Any, known: Any) -> None:
    """Protects: DescriptiveEdit's main comparison is made in all metrics of the paper's table."""
    study, tables = known[0][0], lab.bridge_study.tables()
    rival = lab.studio.StudioMethod("rival", lambda *_: None, "rival")
    tables["methods"]["InstructPix2Pix"] = rival
    claims = [c for c in lab.bridge_study.claims(study, tables) if "InstructPix2Pix" in c.text]
    metrics = [comparison.metric for claim in claims for comparison in claim.comparisons]
    assert metrics[:8] == ["l1", "l2", "lpips", "psnr", "ssim", "dino_i", "clip_i", "clip_t"]
    assert {lab.claims.judge(study, claim.comparisons[0])[0] for claim in claims} == {"not measured"}


def test_verdicts(lab: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: a claim holds or fails by the interval of the paired differences, in the metric's direction,
    and is open where the interval contains 0 or a network is missing.
    """
    claims, names = lab.claims, ("good", "bad", "even", "absent")
    methods = {name: lab.studio.StudioMethod(name, lambda *_: None, name) for name in names}
    study = lab.study.Study(SimpleNamespace(), cases, "test", folder=tmp_path)
    for name, shift in (("good", 1.0), ("bad", 0.0), ("even", 0.0)):
        results = []
        for index, case in enumerate(cases):
            psnr = 20 + index + shift + (0.1 * (-1) ** index if name == "even" else 0)
            metrics = {"psnr": psnr, "lpips": 0.5 - 0.1 * shift - 0.01 * index}
            results.append(lab.results.new_result(methods[name], case, 1.0, metrics))
        study.store.add(methods[name], results, [1.0], "a card")

    def verdict(metric: str, first: str, second: str, margin: float = 0.0) -> str:
        rows = ((first, methods[first]), (second, methods[second]))
        return claims.judge(study, claims.Comparison(metric, *rows, margin))[0]

    assert verdict("psnr", "good", "bad") == verdict("lpips", "good", "bad") == "holds"
    assert verdict("psnr", "bad", "good") == verdict("lpips", "bad", "good") == "does not hold"
    assert verdict("psnr", "even", "bad") == "cannot be shown here"
    assert verdict("psnr", "even", "bad", 0.2) == "holds"
    assert verdict("psnr", "bad", "good", 0.9) == "does not hold"
    assert verdict("clip_t", "good", "bad") == "cannot be shown here"
    assert verdict("psnr", "good", "absent") == "not measured"
    assert claims.verdict_of(["holds", "holds"]) == "holds"
    assert claims.verdict_of(["holds", "does not hold", "cannot be shown here"]) == "does not hold"
    assert claims.verdict_of(["holds", "not measured"]) == claims.verdict_of([]) == "cannot be shown here"
    assert claims.verdict_of(["not measured", "not measured"]) == "not measured"
    good, bad = (("good", methods["good"]), ("bad", methods["bad"]))
    row = cells(claims.claim_table(study, [claims.Claim("A", (claims.Comparison("psnr", good, bad),))]))["A"]
    assert row["here"] == "**holds**"
    assert row["cases"] == "12"
    assert row["difference (95% interval)"] == "PSNR to the source: good against bad: +1.00 (+1.00 to +1.00)"


def test_contact_sheet(lab: Any, tiny: Any, cases: list[Any], tmp_path: Path) -> None:
    """Protects: the sheet has the best, median and worst cases of the first row, with a red frame around an
    edit without success.
    """
    keep = lab.studio.StudioMethod("keep", lambda tiny, batch: batch.latent, "keep")
    study = lab.study.Study(tiny, cases, "test", folder=tmp_path)
    study.store.add(keep, made_up(lab, keep, cases, 0), [1.0], "a card")
    file = tmp_path / "sheet.jpg"
    study.draw({"keep": keep}, file)
    with Image.open(file) as picture:
        assert picture.width == 3 * 134 + 6
        assert picture.height > 9 * 128
        assert picture.getpixel((6 + 134 + 3, 200))[0] > 200  # an unchanged image is no edit


def test_one_label_for_two_methods(lab: Any) -> None:
    """Protects: a label that stands for different methods in the studies is refused."""
    rows = [{"methods": {"noise": lab.methods.text_only(cfg)}} for cfg in (1, 2)]
    plans = [SimpleNamespace(tables=lambda one=one: one) for one in rows]
    with pytest.raises(ValueError, match=r"'noise' is two methods: text only 1 and text only 2"):
        lab.results_page.side_by_side(plans)


def test_wordings(lab: Any, known: Any, cases: list[Any]) -> None:
    """Protects: a case counts for its type and wording."""
    study, method = known[0][0], lab.bridge_study.tables()["methods"]["text only, CFG 3"]
    row = cells(lab.unify_study.wording_table(study, {"a row": method}))["a row"]
    assert [name for name, found in row.items() if found == "100%"] == ["colour, simple"]
    assert sorted(row.values())[:11] == ["0%"] * 11
