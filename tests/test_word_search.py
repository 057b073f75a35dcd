"""The search for UnifyEdit's alignment loss: what it tries and is no setting of the pack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import tolerance
from einops import rearrange
from host import Host
from torch.nn.functional import conv2d


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = ("methods", "studio", "word_search")
    return SimpleNamespace(
        **{name: host.pack_module(f"lab.studies.{name}") for name in names},
        losses=host.pack_module("patches.unify.losses"),
        words=host.pack_module("patches.unify.words"),
        recorder=host.pack_module("patches.attention.recorder"),
    )


def attention(lab: Any, heads: int = 4) -> Any:
    """Queries of a grid of 8x8, and keys of 7 tokens, of two images."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, count, heads * 5, generator=generator) for count in (64, 7))
    return lab.recorder.Projections(q.requires_grad_(), k.requires_grad_(), heads)


def words(lab: Any) -> Any:
    """One word of two tokens in each image."""
    tokens, description = torch.zeros(2, 1, 7), torch.zeros(2, 7)
    tokens[:, :, 2:4], description[:, 1:6] = 1, 1
    return lab.words.Words(tokens, description, torch.ones(2, 1))


def test_heads(lab: Any) -> None:
    """Protects: the loss of some heads reads these alone, and only they get a gradient."""
    whole, mask = attention(lab), torch.rand(2, 64)
    edit = lab.word_search.Tried(heads=(("a", (1, 3)),))
    found = edit.loss({"a": whole}, words(lab), {"a": mask}, "absolute")
    attended = whole.probabilities()[:, [1, 3], :, 2:4].sum(-1)
    inside = (attended * mask[:, None]).sum(-1) / mask.sum(-1)[:, None]
    torch.testing.assert_close(found.values, (1 - inside).square().mean(1).detach())
    (slope, _) = lab.recorder.loss_gradients([found], [whole.q, whole.k])
    parts = rearrange(slope, "b n (h d) -> h (b n d)", h=4).abs().amax(1)
    assert (parts > 0).tolist() == [False, True, False, True]


def test_smoothing(lab: Any) -> None:
    """Protects: the loss with a smoothed mask is that of maps that an independent filter smoothed."""
    whole, mask = attention(lab), torch.rand(2, 64)
    found = lab.word_search.Tried(smoothing=1.0).loss({"a": whole}, words(lab), {"a": mask}, "spatial_ratio")
    line = torch.exp(-torch.arange(-3, 4).float().square() / 2)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    maps = rearrange(whole.probabilities()[..., 2:4].sum(-1), "b h (y x) -> (b h) 1 y x", y=8)
    smooth = rearrange(conv2d(maps, kernel, padding=3), "(b h) 1 y x -> b h (y x)", b=2)
    share = (smooth * mask[:, None]).sum(-1) / rearrange(maps, "(b h) 1 y x -> b h (y x)", b=2).sum(-1)
    torch.testing.assert_close(found.values, (3 - 4 * share).mean(1).detach())


def test_early(lab: Any) -> None:
    """Protects: words have the balance's weight before the end and 0 after it; structure keeps its own."""
    balance = lab.methods.Balance(beta1=2.0, k1=1.5, beta2=0.4, k2=3.0)
    drawn = lab.word_search.early(balance, 0.5)
    for progress in (0.0, 0.2, 0.49, 0.8, 1.0):
        structure, words = balance.weights(progress)
        wanted = (structure, words if progress < 0.5 else 0.0)
        assert drawn.weights(progress) == pytest.approx(wanted, rel=1e-3)


def test_each_row_is_another_edit(host: Host, lab: Any) -> None:
    """Protects the search: with nothing changed it is UnifyEdit, every other row makes other images, and the
    pack's own loss is back after an edit.
    """
    tiny = lab.studio.Studio.load()
    read = host.pack_module("lab.benchmark.layouts").read_cases
    batch = lab.studio.Batch.of(tiny, read("tiny-studio-two", None, "tuning")[:1])
    own = host.pack_module("patches.unify.target").alignment_loss

    def made(edit: Any, *changes: Any) -> torch.Tensor:
        with torch.inference_mode():
            return lab.word_search.tried(replace(edit, steps=3), *changes).edit(tiny, batch)

    base = lab.word_search.Tried()
    values = {name: getattr(base, name) for name in lab.methods.Edit.__dataclass_fields__}
    with torch.inference_mode():
        plain = lab.methods.unify_latents(tiny, batch, lab.methods.Edit(**{**values, "steps": 3}))
    rounding = 20 * tolerance(tiny.model.model.get_dtype_inference())
    torch.testing.assert_close(made(base), plain, rtol=rounding, atol=rounding)
    heads = tuple(lab.word_search.HEADS.items())
    for change in ({"heads": heads}, {"smoothing": 1.0}, {"inner_steps": 2}, {"alignment": "absolute"}):
        assert not torch.allclose(made(replace(base, **change)), plain, atol=1e-3), change
    for change in (lab.word_search.UNBOUNDED, lab.word_search.SOURCE_STEP):
        assert not torch.allclose(made(base, change), plain, atol=1e-3), change
    assert host.pack_module("patches.unify.target").alignment_loss is own
    torch.testing.assert_close(made(base), plain, rtol=rounding, atol=rounding)
    assert len({method.label for method in lab.word_search.search().values()}) == len(
        lab.word_search.search()
    )
