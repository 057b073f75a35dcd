"""The objective of training a bridge: its loss, what is dropped, weights and noise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bridge_edit
import pytest
import small_models
import torch
from host import Host, device
from test_training import batch, cache, encoded, fresh_bridge, trainer


@pytest.fixture(scope="module")
def training(host: Host) -> Any:
    """The pack's training modules."""
    names = ("objective", "trainer", "cache", "pairs")
    return SimpleNamespace(**{name: host.pack_module(f"training.{name}") for name in names})


@pytest.fixture(scope="module")
def gradients(host: Host) -> Any:
    """The region in which the host's weights can be differentiated through."""
    return host.pack_module("patches.host.autograd").gradients


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.loaded(small_models.small_unet())


@pytest.mark.parametrize("sampling", ["eps", "v_prediction"])
def test_first_loss_is_the_base_models(host: Host, training: Any, gradients: Any, sampling: str) -> None:
    """Protects: with a new bridge the loss is the base model's own, bit for bit, and that is the plain
    formula: the mean square of the predicted noise, or v, against the true one.
    """
    model = small_models.loaded(small_models.small_unet())
    (model,) = host.execute("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)
    base = model.model
    base.model_sampling = model.get_model_object("model_sampling")
    objective = training.objective.Objective(dropout="none")
    pairs = batch(host)
    sample = training.objective.sample_noise(objective, [1, 2, 3], (4, 16, 16), 1000)
    with gradients():
        found = training.objective.losses(
            base, cache(host, model, fresh_bridge(host, model)), pairs, sample, objective
        )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[sample.timesteps].view(-1, 1, 1, 1)
    noised = (kept.sqrt() * pairs.edit.cpu() + (1 - kept).sqrt() * sample.noise).float().to(device())
    with torch.no_grad(), gradients():
        context = torch.cat([text.embedding for text in pairs.edit_text])
        output = base.diffusion_model(noised, sample.timesteps.float().to(device()), context=context)
    target = sample.noise.double()
    if sampling == "v_prediction":
        target = kept.sqrt() * sample.noise - (1 - kept).sqrt() * pairs.edit.cpu()
    expected = (output.double().cpu() - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=0)
    off = training.objective.NoiseSample(
        sample.timesteps, sample.noise, sample.no_text, [True] * 3, sample.no_edit
    )
    with gradients():
        without = training.objective.losses(
            base, cache(host, model, fresh_bridge(host, model)), pairs, off, objective
        )
    assert torch.equal(found, without)


def test_dropped_rows(host: Host, model: Any, training: Any, gradients: Any) -> None:
    """Protects: a dropped image is a row without the bridge, or one with a white reference; a dropped text is
    the empty one; and only these rows differ.
    """
    objective = training.objective.Objective(dropout="none")
    white = training.objective.Objective(dropout="none", dropped_image="white")
    pairs = batch(host)
    learned = cache(host, model, bridge_edit.random_bridge(host, model))
    no, never = [False, True, False], [False] * 3
    sample = training.objective.sample_noise(objective, [1, 2, 3], (4, 16, 16), 1000)

    def run(which: Any, how: Any, **changes: list[bool]) -> torch.Tensor:
        parts = {"no_text": never, "no_image": never, "no_edit": never, **changes}
        drawn = training.objective.NoiseSample(sample.timesteps, sample.noise, **parts)
        with gradients():
            return training.objective.losses(model.model, learned, which, drawn, how).detach()

    def replaced(**changes: Any) -> Any:
        return training.objective.Batch(**{**vars(pairs), **changes})

    def second(name: str, value: Any) -> Any:
        found = getattr(pairs, name)
        found = found.clone() if isinstance(found, torch.Tensor) else list(found)
        found[1] = value
        return found

    whole = run(pairs, objective)
    dropped = run(pairs, objective, no_image=no)
    torch.testing.assert_close(dropped[[0, 2]], whole[[0, 2]], rtol=1e-5, atol=0)
    assert abs(float(dropped[1] - whole[1])) > 1e-4
    text = second("edit_text", pairs.empty_text)
    torch.testing.assert_close(run(pairs, objective, no_text=no), run(replaced(edit_text=text), objective))
    blank = replaced(
        source=second("source", pairs.white[0]), source_text=second("source_text", pairs.empty_text)
    )
    torch.testing.assert_close(run(pairs, white, no_image=no), run(blank, objective))
    same = replaced(edit=second("edit", pairs.source[1]))
    torch.testing.assert_close(run(pairs, objective, no_edit=no), run(same, objective))


def test_dropout_rates(training: Any) -> None:
    """Protects: `paper` drops text and image in 5% each, independently; `release` has three bands of 5% that
    exclude one another; `none` drops nothing.
    """
    count = 20_000
    found = {}
    for name in ("paper", "release", "none"):
        objective = training.objective.Objective(dropout=name)
        sample = training.objective.sample_noise(objective, range(count), (1, 1, 1), 1000)
        flags = torch.tensor([sample.no_text, sample.no_image, sample.no_edit]).T.int()
        found[name] = {
            tuple(row): float((flags == torch.tensor(row)).all(1).float().mean())
            for row in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1))
        }
    expected = {
        "paper": (0.9025, 0.0475, 0.0475, 0.0025, 0.0),
        "release": (0.85, 0.0, 0.05, 0.05, 0.05),
        "none": (1.0, 0.0, 0.0, 0.0, 0.0),
    }
    for name, shares in expected.items():
        assert list(found[name].values()) == pytest.approx(shares, abs=0.006), name
        assert sum(found[name].values()) == pytest.approx(1.0)


def test_min_snr(host: Host, model: Any, training: Any, gradients: Any) -> None:
    """Protects: min-SNR weighs a pair's loss by min(SNR, limit) / SNR."""
    plain = training.objective.Objective(dropout="none")
    weighed = training.objective.Objective(dropout="none", min_snr=5.0)
    sample = training.objective.sample_noise(plain, [1, 2, 3], (4, 16, 16), 1000)
    sample.timesteps.copy_(torch.tensor([10, 300, 900]))
    found = []
    for objective in (plain, weighed):
        with gradients():
            found.append(
                training.objective.losses(
                    model.model,
                    cache(host, model, fresh_bridge(host, model)),
                    batch(host),
                    sample,
                    objective,
                ).detach()
            )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[sample.timesteps]
    snr = kept / (1 - kept)
    torch.testing.assert_close(
        (found[1] / found[0]).double().cpu(), snr.clamp(max=5) / snr, rtol=1e-4, atol=0
    )


def test_offset_noise(training: Any) -> None:
    """Protects: offset noise adds one number of the given deviation to a channel and changes nothing else
    that is drawn.
    """
    plain = training.objective.sample_noise(training.objective.Objective(), range(500), (4, 8, 8), 1000)
    offset = training.objective.sample_noise(
        training.objective.Objective(offset_noise=0.5), range(500), (4, 8, 8), 1000
    )
    difference = offset.noise - plain.noise
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert float(difference[..., 0, 0].std()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(offset.timesteps, plain.timesteps)
    for name in ("no_text", "no_image", "no_edit"):
        assert getattr(offset, name) == getattr(plain, name), name


def test_no_two_rows_share_their_noise(
    host: Host, training: Any, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: other seeds, steps and rows have other random numbers, also where seed and step make up for
    each other.
    """
    pairs = encoded(training, tmp_path)
    seen: list[tuple[float, ...]] = []

    def note(objective: Any, seeds: list[int], shape: Any, schedule: int) -> Any:
        sample = training.objective.sample_noise(objective, seeds, shape, schedule)
        seen.extend(tuple(noise.flatten()[:4].tolist()) for noise in sample.noise)
        return sample

    monkeypatch.setattr(training.trainer, "sample_noise", note)
    monkeypatch.setattr(training.trainer, "losses", lambda *_: torch.zeros(2))
    for seed in (0, 1, 2, 65_536, 2**32, 2**32 + 1):
        learning = trainer(host, training, model, pairs, seed=seed)
        for index in (0, 1, 2, 65_537, 1_000_003, 1_000_004):
            learning.loss(index)
    assert len(seen) == 6 * 6 * 2
    assert len(set(seen)) == len(seen)
