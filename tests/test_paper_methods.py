"""The methods of other papers: each is what its paper says, and plain sampling where its idea is off."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import tolerance
from host import Host

STEPS = 3


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules, with few steps."""
    found = {name: host.pack_module(f"lab.studies.{name}") for name in ("methods", "paper_methods", "studio")}
    schedule = found["studio"].schedule
    with pytest.MonkeyPatch.context() as patch:
        for name in ("methods", "paper_methods"):
            patch.setattr(found[name], "schedule", lambda tiny: schedule(tiny, 0.6, STEPS))
        yield SimpleNamespace(**found)


@pytest.fixture(scope="module")
def tiny(lab: Any) -> Any:
    """The studio."""
    return lab.studio.Studio.load()


@pytest.fixture(scope="module")
def batch(host: Host, lab: Any, tiny: Any) -> Any:
    """Two tuning cases of different types."""
    read = host.pack_module("lab.benchmark.layouts").read_cases
    cases = host.pack_module("lab.benchmark.cases").first_of_each_type(read("tiny-studio", None, "tuning"), 1)
    return lab.studio.Batch.of(tiny, [cases[0], cases[3]])


@torch.inference_mode()
def latents(method: Any, tiny: Any, batch: Any) -> torch.Tensor:
    return method.edit(tiny, batch)


def test_off(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: without what makes a method, it samples the inverted noise with the edit description, as the
    stock sampler does; with it, it does not; and no method leaves anything on the model.
    """
    rounding = 20 * tolerance(tiny.model.model.get_dtype_inference())
    papers = lab.paper_methods
    plain = latents(lab.methods.inverted(3.0), tiny, batch)
    for method in (
        papers.injected(3.0, 0.0, 0.0),
        papers.masactrl(3.0, "output", 1.0),
        papers.guide_and_rescale(3.0, 1e4, end=0.0),
    ):
        torch.testing.assert_close(latents(method, tiny, batch), plain, rtol=rounding, atol=rounding)
    for method in (
        papers.injected(3.0, 1.0, 0.0),
        papers.injected(3.0, 0.0, 1.0),
        papers.masactrl(3.0, "output", 0.0),
        papers.guide_and_rescale(3.0, 1e4),
        papers.pix2pix_zero(3.0, 0.1),
    ):
        assert not torch.allclose(latents(method, tiny, batch), plain, atol=1e-2), method.name
    assert torch.equal(latents(lab.methods.inverted(3.0), tiny, batch), plain)


def watched(tiny: Any, seen: list[Any]) -> Any:
    """The studio with a note of layer, queries, keys and values of each self-attention."""
    model = tiny.model.clone()

    def attend(function: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        block, number = kwargs["transformer_options"]["block"]
        if k.shape[1] == q.shape[1]:
            seen.append((f"{block}.{number}", q.clone(), k.clone(), v.clone()))
        return function(q, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = attend
    return replace(tiny, model=model)


def test_masactrl_reads_the_source(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: from its first step on the target's queries, with and without text, read the source's keys
    and values in the chosen layers, and its own in the others and before.
    """
    seen: list[Any] = []
    studio, size = watched(tiny, seen), len(batch)
    latents(lab.paper_methods.masactrl(3.0, "output", 1 / STEPS), studio, batch)
    calls = [call for call in seen if len(call[1]) == 4 * size]  # without the inversion's
    a_step, found = len(calls) // STEPS, set()
    for number, (layer, q, k, v) in enumerate(calls):
        mutual = number >= a_step and layer.startswith("output")
        found.add(mutual)
        for part in (0, 2 * size):
            source, target = slice(part, part + size), slice(part + size, part + 2 * size)
            assert torch.equal(k[source], k[target]) == torch.equal(v[source], v[target]) == mutual
            assert not torch.equal(q[source], q[target])
    assert found == {True, False}


def test_infedit_needs_no_inversion(lab: Any, tiny: Any, batch: Any) -> None:
    """Protects: with the source description for both, InfEdit gives every image back, with another it does
    not; and it takes one call a step.
    """
    same = replace(batch, edit_text=batch.source_text)
    back = latents(lab.paper_methods.infedit(1.0, 0.0, 0.0), tiny, same)
    rounding = 20 * tolerance(tiny.model.model.get_dtype_inference())
    torch.testing.assert_close(back, batch.latent, rtol=rounding, atol=rounding)
    seen: list[Any] = []
    made = latents(lab.paper_methods.infedit(2.0, 0.0, 0.0), watched(tiny, seen), batch)
    assert not torch.allclose(made, batch.latent, atol=0.1)
    assert len(seen) == STEPS * len({layer for layer, *_ in seen})


@pytest.mark.parametrize(("kind", "described"), [("cross", "edit"), ("self", "source")])
def test_gradients(lab: Any, tiny: Any, batch: Any, kind: str, described: str) -> None:
    """Protects: a small step along the gradient of pix2pix-zero's or of Guide-and-Rescale's attention changes
    the energy by what the gradient says.
    """
    found: list[tuple[float, float]] = []

    def energy(change: torch.Tensor) -> torch.Tensor:
        return change.square().sum((2, 3)).mean(1)

    def step(run: Any, x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        entries = run.guider.conds["positive"] if described == "edit" else run.source.entries
        sigma, start = run.source.sigmas[number], run.source.latent(number, x)
        wanted = run.read(run.source.entries, start, sigma, kind)

        def total(at: torch.Tensor) -> float:
            seen = run.read(entries, at, sigma, kind)
            changes = (seen[key].probabilities() - wanted[key].probabilities() for key in wanted)
            return sum(float(energy(change).sum()) for change in changes)

        x = start + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        gradient = run.gradient(number, x, entries, kind, energy)
        move = 0.02 * gradient / gradient.norm()
        found.append((total(x + move) - total(x - move), float(2 * (gradient * move).sum())))
        return x, x

    with torch.inference_mode():
        lab.paper_methods.along(tiny, batch, batch.no_text, step)
    assert len(found) == STEPS
    for change, expected in found:
        assert change == pytest.approx(expected, rel=0.05)


def test_rescaled(lab: Any, tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: what Guide-and-Rescale adds to the noise is from a third to three times as long as the
    guidance, image by image, whatever its scale; and nothing where the energy is 0, as at the first step.
    """
    papers, seen = lab.paper_methods, []
    original = papers.along

    def along(tiny: Any, batch: Any, negative: Any, step: Any) -> torch.Tensor:
        def spied(run: Any, x: torch.Tensor, number: int) -> Any:
            texts = run.texts(x, run.source.sigmas[number])
            seen.append((texts, step(run, x, number)[1]))
            return x, x

        return original(tiny, batch, negative, spied)

    monkeypatch.setattr(papers, "along", along)
    for scale, ratio in ((1e-6, 1 / 3), (1e9, 3.0)):
        seen.clear()
        latents(papers.guide_and_rescale(2.0, scale, end=1.0), tiny, batch)
        assert len(seen) == STEPS
        for number, ((text, negative), denoised) in enumerate(seen):
            guidance = 2.0 * (text - negative)
            lengths = [part.flatten(1).norm(dim=1) for part in (denoised - negative - guidance, guidance)]
            wanted = ratio * lengths[1] if number else torch.zeros_like(lengths[1])
            torch.testing.assert_close(lengths[0], wanted, rtol=1e-2, atol=1e-4)
