"""`dev.py report`: the page with both studies' methods, from scores that are known."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Host


@pytest.fixture(scope="module")
def modules(host: Host) -> Any:
    """The report's modules."""
    names = ("report", "study", "tiny_benchmark")
    return SimpleNamespace(**{name: host.pack_module(f"lab.studies.{name}") for name in names})


def scores(modules: Any, success: list[bool], psnr: float) -> Any:
    """Of three cases, two of colour and one of style; what is not named was not measured."""
    kind = modules.tiny_benchmark.Scores
    unknown = {field.name: torch.full((3,), torch.nan) for field in fields(kind)}
    known = {"success": torch.tensor(success), "psnr_db": torch.full((3,), psnr)}
    return kind(**{**unknown, **known, "types": ("colour", "colour", "style")})


def fake_study(modules: Any, page: Path, rows: dict[str, str], figures: dict[str, float]) -> Any:
    """A study's module with methods by label and settings."""
    methods = [modules.study.Row(label, pytest.fail, settings) for label, settings in rows.items()]
    return SimpleNamespace(
        PAGE=page, tables=lambda: {"methods": methods}, measure=lambda _: (figures, f"# The {page.stem}\n")
    )


def test_results_page(modules: Any, tmp_path: Path) -> None:
    """Protects: each method is in the table once with the means of its scores, each study's figures stand
    below a link to its page, and that page is written.
    """
    known = {
        "bridge": scores(modules, [True, True, True], 26.5),
        "noise": scores(modules, [True, False, False], 12.25),
        "unify": scores(modules, [False, True, True], 19.0),
    }
    studies = [
        fake_study(modules, tmp_path / "one.md", {"bridge": "b", "noise": "n"}, {"success": 0.927}),
        fake_study(modules, tmp_path / "two.md", {"unify": "u", "noise": "n"}, {"psnr_db": 19.0}),
    ]
    study = SimpleNamespace(cases=range(3), scores=lambda row: known[row.label])
    found = modules.report.write(study, studies, tmp_path / "results.md")
    assert found == {"one.success": 0.927, "two.psnr_db": 19.0}
    assert (tmp_path / "two.md").read_text() == "# The two\n"
    page = (tmp_path / "results.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    head, _, *lines = [line for line in cells if len(line) > 6]
    table = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(table) == ["bridge", "noise", "unify"]
    names = ("success", "PSNR (dB)", "SSIM", "colour", "style")
    assert [table["bridge"][name] for name in names] == ["100.0%", "26.50", "", "100%", "100%"]
    assert [table["noise"][name] for name in names] == ["33.3%", "12.25", "", "50%", "0%"]
    assert [table["unify"][name] for name in names] == ["66.7%", "19.00", "", "50%", "100%"]
    one, two = page.index("[The one](one.md)"), page.index("[The two](two.md)")
    assert one < page.index("| `success` | 92.7% |") < two < page.index("| `psnr_db` | 19.00 |")


def test_one_label_for_two_methods(modules: Any, tmp_path: Path) -> None:
    """Protects: a label that stands for different methods in the studies is no line of the table."""
    studies = [
        fake_study(modules, tmp_path / f"{settings}.md", {"noise": settings}, {}) for settings in ("n1", "n2")
    ]
    study = SimpleNamespace(cases=range(3), scores=pytest.fail)
    with pytest.raises(ValueError, match="'noise' is two methods: n1 and n2"):
        modules.report.side_by_side(study, studies)
