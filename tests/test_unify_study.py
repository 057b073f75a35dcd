"""UnifyEdit on held-out edits of the Tiny Studio, and the study that compares it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import tolerance
from host import Host


@pytest.fixture(scope="module")
def study(host: Host) -> Any:
    """The study's modules."""
    names = ("bridge_study", "unify_study", "unify_methods", "tiny_benchmark")
    return SimpleNamespace(**{name: host.pack_module(f"lab.studies.{name}") for name in names})


@pytest.fixture(scope="module")
def cases(study: Any) -> Any:
    """A studio and one held-out case of each type."""
    tiny = study.tiny_benchmark.Studio.load()
    return tiny, study.tiny_benchmark.draw_cases(tiny, held_out=True, a_type=1)


def test_shipped_settings_edit(host: Host, study: Any, cases: Any) -> None:
    """Protects: with the presets, on edits that no training saw, most asked attributes change and what lies
    outside the mask stays.
    """
    tiny, drawn = cases
    row = study.unify_study.tables()["methods"][0]
    made = study.tiny_benchmark.run(tiny, drawn, row.method)
    read = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(made)
    asked = [
        all(seen.get(name) == value for name, value in pair.changed.items())
        for seen, pair in zip(read, drawn.pairs, strict=True)
    ]
    assert sum(asked) >= 4
    outside = (drawn.mask == 0)[..., None]
    error = (((made - drawn.source) ** 2) * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    kept = -10 * error[torch.isfinite(error)].log10()
    assert float(kept.mean()) > 25


def test_by_type(study: Any, cases: Any) -> None:
    """Protects: each type is edited with its own settings, and pictures come back in the cases' order."""
    tiny, drawn = cases
    rounding = 10 * tolerance(tiny.model.model.get_dtype_inference())
    drawn = drawn.chosen([5, 0, 4])
    types = [pair.edit_type for pair in drawn.pairs]
    common = study.unify_methods.Edit(denoise=0.3, steps=2)
    edits = {kind: replace(common, cfg=1.0 + number) for number, kind in enumerate(types)}
    with torch.inference_mode():
        together = study.unify_methods.unified_by_type(tiny, drawn, edits)
        for number, kind in enumerate(types):
            alone = study.unify_methods.unified(tiny, drawn.chosen([number]), edits[kind])
            torch.testing.assert_close(together[number : number + 1], alone, rtol=rounding, atol=rounding)
            other = study.unify_methods.unified(tiny, drawn.chosen([number]), replace(common, cfg=9.0))
            assert not torch.allclose(other, alone, atol=1e-2)


def test_injection(study: Any, cases: Any) -> None:
    """Protects: the baseline that injects attention is plain DDIM inversion at shares of 0, comes nearer to
    the source with all of the self-attention, and leaves the model as it was.
    """
    tiny, drawn = cases
    drawn = drawn.chosen([0, 3])
    injected = study.unify_methods.injected
    with torch.inference_mode():
        plain = study.bridge_study.inverted(tiny, drawn, 3.0)
        none = injected(tiny, drawn, cfg=3.0, self_share=0.0, cross_share=0.0)
        torch.testing.assert_close(none, plain, rtol=1e-3, atol=1e-3)
        kept = injected(tiny, drawn, cfg=3.0, self_share=1.0, cross_share=0.0)
        crossed = injected(tiny, drawn, cfg=3.0, self_share=0.0, cross_share=1.0)
        assert not torch.allclose(crossed, plain, atol=1e-2)
        torch.testing.assert_close(study.bridge_study.inverted(tiny, drawn, 3.0), plain)
    distance = [float((latent - drawn.latent).square().mean()) for latent in (kept, plain)]
    assert distance[0] < distance[1]


def test_structure_distance(study: Any, cases: Any) -> None:
    """Protects: the distance is 0 for the same pictures, each case's own, and larger for another picture than
    for its edit.
    """
    tiny, drawn = cases
    distance = study.tiny_benchmark.structure_distance
    rounding = 10 * tolerance(tiny.model.model.get_dtype_inference())
    assert torch.equal(distance(tiny, drawn, drawn.source), torch.zeros(len(drawn)))
    edited = distance(tiny, drawn, drawn.target)
    assert bool((edited < distance(tiny, drawn, drawn.source.flip(0))).all())
    one = drawn.chosen([2])
    alone = distance(tiny, one, one.target)
    torch.testing.assert_close(alone, edited[2:3], rtol=rounding, atol=rounding / 10)


def test_success_by_preset(study: Any) -> None:
    """Protects: a tuning case counts for the preset of its type and wording."""
    presets = study.unify_study.PRESETS
    pairs = [SimpleNamespace(edit_type=name.partition(",")[0]) for name in presets]  # simple, complex, ...
    success = torch.tensor([name in ("colour, complex", "face, simple") for name in presets])
    none = torch.zeros(len(pairs))
    kinds = tuple(pair.edit_type for pair in pairs)
    scores = study.tiny_benchmark.Scores(kinds, success, none, none, none, none, none, none)
    lines = study.unify_study.preset_success(SimpleNamespace(pairs=pairs), {"a row": scores}).splitlines()
    head, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[-1]))
    found = dict(zip(head[1:], row[1:], strict=True))
    assert {name for name, cell in found.items() if cell == "100%"} == {"colour, complex", "face, simple"}
    assert set(found.values()) == {"0%", "100%"}
