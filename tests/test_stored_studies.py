"""What the studies store: rows of this code, pages from them, bridges, and the settings that they chose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host import Host


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = (
        *("bridge_study", "methods", "paper_settings", "publish", "results_page", "rows"),
        *("settings_search", "studio", "unify_study"),
    )
    found = {name: host.pack_module(f"lab.studies.{name}") for name in names}
    return SimpleNamespace(**found, cases=host.pack_module("lab.benchmark.cases"))


@pytest.fixture(scope="module")
def tiny(lab: Any) -> Any:
    """The studio."""
    return lab.studio.Studio.load()


@pytest.fixture(scope="module")
def shipped(lab: Any, tiny: Any) -> Any:
    """The studies as the repository stores them, each with that on tuning cases."""
    return lab.publish.studies(lab.results_page.PLANS, tiny)


@pytest.fixture(scope="module")
def tuning(lab: Any, shipped: Any) -> Any:
    """The UnifyEdit study on tuning cases."""
    return shipped[lab.results_page.PLANS.index(lab.unify_study.PLAN)][1]


def test_stored_pages(lab: Any, shipped: Any, tmp_path: Path) -> None:
    """Protects: the committed pages are what the stored rows give, so no number in them is typed."""
    lab.results_page.write(shipped, lab.results_page.PLANS, tmp_path)
    docs = Path(__file__).resolve().parent.parent / "docs"
    for page in tmp_path.glob("*.md"):
        committed = (docs / page.name).read_text(encoding="utf-8")
        assert page.read_text(encoding="utf-8") == committed, f"{page.name}: run python dev.py report"


def test_unet_beside_the_tiny_flux(host: Host, lab: Any, shipped: Any) -> None:
    """Protects: the UNet's rows in the table of the Tiny Flux's bridges are the stored ones of the same 48
    edits.
    """
    study, _ = shipped[lab.results_page.PLANS.index(lab.bridge_study.PLAN)]
    same = {case.id for case in lab.cases.first_of_each_type(study.cases, 8)}
    mean = host.pack_module("lab.benchmark.statistics").mean
    page = (Path(__file__).resolve().parent.parent / "docs" / "bridge.md").read_text(encoding="utf-8")
    for direction in ("edit_queries", "reference_queries"):
        method = lab.bridge_study.tables()["fusions"][f"{direction}, linear"]
        results = [result for result in study.of(method) if result["case"] in same]
        success, near, kept = (mean(results, m) for m in ("success", "target_psnr", "psnr_outside"))
        assert len(results) == 48
        assert f"{direction}, a full F | {success:.1%} | {near:.2f} | {kept:.2f} |" in page


def test_stored_rows_are_of_this_code(lab: Any, tiny: Any, tmp_path: Path) -> None:
    """Protects: results that pass for those of this version are what its code makes, in the main rows."""
    copied = shutil.copytree(lab.rows.ROWS, tmp_path / "rows")
    plans = (lab.bridge_study.PLAN, lab.unify_study.PLAN)
    ((study, _), *_) = lab.publish.studies(plans, tiny, copied)
    rows = lab.results_page.side_by_side(plans)
    for label in ("bridge", "UnifyEdit"):
        if study.store.is_current(rows[label]):
            study.check(rows[label])
            assert study.store.is_current(rows[label]), f"{label}: python dev.py report --measure"


def test_every_stored_file_is_a_row(lab: Any, shipped: Any) -> None:
    """Protects: no results of a row that the pages no longer have are left."""
    wanted = {
        f"{plan.name}/{table}/{label}"
        for plan in lab.results_page.PLANS
        for tables in (plan.tables(), plan.search())
        for table, rows in tables.items()
        for label in rows
    }
    for file in lab.rows.ROWS.glob("*/*.json"):
        assert set(json.loads(file.read_text(encoding="utf-8"))["rows"]) & wanted, file.name


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


def test_chosen_settings_of_papers(lab: Any, tuning: Any) -> None:
    """Protects: each method of another paper has the setting that the stored search chose: of the six the two
    best on half of the cases, of these the better one on all.
    """

    def score(method: Any, per_type: int) -> tuple[float, float]:
        some = {case.id for case in lab.cases.first_of_each_type(tuning.cases, per_type)}
        found = [result["metrics"] for result in tuning.of(method) if result["case"] in some]
        assert len(found) == len(some), method.settings
        return sum(m["success"] for m in found), sum(m["target_psnr"] for m in found)

    for name, tuned in lab.paper_settings.TUNED.items():
        rows = [row for label, row in lab.paper_settings.search().items() if label.startswith(f"{name}, ")]
        best = sorted(rows, key=lambda row: score(row, 2))[-2:]
        chosen = tuned.make(*tuned.chosen).label
        assert chosen == max(best, key=lambda row: score(row, 4)).label, name


def test_as_many_settings_for_each_paper(lab: Any) -> None:
    """Protects a fair comparison: every method of another paper has as many settings in the search, and the
    chosen one is among them.
    """
    search = lab.paper_settings.search()
    labels = {method.label for method in search.values()}
    assert len(labels) == len(search)
    for name, tuned in lab.paper_settings.TUNED.items():
        assert sum(label.startswith(f"{name}, ") for label in search) == 6
        assert {tuned.make(*some).label for some in (tuned.chosen, tuned.style) if some} <= labels


def test_chosen_settings(lab: Any, tuning: Any) -> None:
    """Protects: of UnifyEdit's settings that the stored search tried, none that keeps enough outside the mask
    is better than the chosen one by more than chance in success or PSNR, and not worse in the other.
    """
    for rows in lab.settings_search.search().values():
        chosen, *others = rows.values()
        assert len(others) >= 10
        assert {len(tuning.of(method)) for method in others} == {len(tuning.of(chosen))}
        assert not tuning.mean(chosen, "psnr_outside") < lab.settings_search.KEPT  # a style has no outside
        for other in others:
            found = [tuning.difference(other, chosen, name) for name in ("success", "target_psnr")]
            better = any(one.low > 0 for one in found) and not any(one.high < 0 for one in found)
            assert not better or tuning.mean(other, "psnr_outside") < lab.settings_search.KEPT, other.settings
