"""Training a bridge: the objective, the loop, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bridge_edit
import pytest
import safetensors.torch
import small_models
import torch
from host import Host, device
from training_settings import batch_of

TOKENS, WIDTH = 7, small_models.CONTEXT_WIDTH


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


def batch(host: Host, pairs: int = 3) -> Any:
    """Random encoded pairs."""
    generator = torch.Generator().manual_seed(0)
    latents, texts = (pairs, 4, 16, 16), (pairs, TOKENS, WIDTH)
    shapes = latents, latents, texts, texts, (1, *texts[1:]), (1, *latents[1:])
    return batch_of(host, *(torch.randn(*shape, generator=generator).to(device()) for shape in shapes))


def encoded(training: Any, folder: Path, pairs: int = 5) -> Any:
    """EDIT_PAIRS of random latents on disk, of two sizes."""
    generator = torch.Generator().manual_seed(1)

    def stored(name: str, value: torch.Tensor) -> str:
        safetensors.torch.save_file({"value": value}, folder / name)
        return name

    files, sizes = [], []
    for number in range(pairs):
        size = (16, 16) if number < 3 else (8, 24)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("source", "edit"), (1, 4, *size))
        shapes |= dict.fromkeys(("source_text", "edit_text"), (1, TOKENS, WIDTH))
        files.append(
            tuple(
                stored(f"{number}_{name}", torch.randn(*shape, generator=generator))
                for name, shape in shapes.items()
            )
        )
        sizes.append(size)
    whites = tuple((size, stored(f"white{size[0]}", torch.ones(1, 4, *size))) for size in sorted(set(sizes)))
    empty = stored("empty", torch.zeros(1, TOKENS, WIDTH))
    return training.cache.EncodedPairs(folder, tuple(files), tuple(sizes), whites, empty)


def cache(host: Host, model: Any, bridge: Any) -> Any:
    """What the objective works with."""
    made = host.pack_module("patches.bridge.core").ReferenceCache
    return made(bridge.model.to(device()), host.network(model))


def fresh_bridge(host: Host, model: Any) -> Any:
    """A bridge that changes nothing yet."""
    return host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)[0]


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


def test_rate_falls_along_a_cosine(training: Any) -> None:
    """Protects: `decay` takes the rate from its peak down half a cosine and starts again; 0 keeps it."""
    settings = training.trainer.TrainSettings(learning_rate=0.2, decay=100)
    assert [settings.rate(step) for step in (0, 25, 50, 75, 100, 150)] == pytest.approx(
        [0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5, 0.2, 0.1]
    )
    assert training.trainer.TrainSettings(learning_rate=0.2).rate(150) == 0.2


def trainer(host: Host, training: Any, model: Any, pairs: Any, **settings: Any) -> Any:
    """A trainer of a new bridge."""
    defaults = {"batch": 2, "learning_rate": 1e-3, **settings}
    bridge = fresh_bridge(host, model).model.to(device())
    return training.trainer.Trainer(
        model.model, bridge, pairs, training.trainer.TrainSettings(**defaults), device()
    )


def mean_loss(learning: Any) -> float:
    """The loss over the first eight forwards of a run, as the weights are now."""
    with torch.no_grad():
        return float(torch.cat([learning.loss(index) for index in range(8)]).mean())


def test_only_the_bridge_learns(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any
) -> None:
    """Protects: training lowers the loss, every weight of the bridge learns, and the base model's weights
    keep every bit.
    """
    pairs = encoded(training, tmp_path, pairs=2)
    before = small_models.fingerprint(model)
    learning = trainer(
        host,
        training,
        model,
        pairs,
        objective=training.objective.Objective(dropout="none"),
        learning_rate=5e-3,
    )
    start = {name: weight.clone() for name, weight in learning.bridge.state_dict().items()}
    with gradients():
        first = mean_loss(learning)
        for _ in range(25):
            learning.run_step()
        last = mean_loss(learning)
    assert last < 0.97 * first
    assert small_models.fingerprint(model) == before
    for name, weight in learning.bridge.state_dict().items():
        assert not torch.equal(weight, start[name]), name


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2, "ema": 0.9, "precision": "bf16"}, {"optimiser": "muon", "decay": 8}],
)
def test_resume(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any, settings: dict
) -> None:
    """Protects: a run that stops and continues from its checkpoint takes the same steps, to the last bit."""
    pairs = encoded(training, tmp_path)
    whole = trainer(host, training, model, pairs, **settings)
    part = trainer(host, training, model, pairs, **settings)
    with gradients():
        for _ in range(6):
            whole.run_step()
        for _ in range(3):
            part.run_step()
        part.save(tmp_path / "state.pt")
        again = trainer(host, training, model, pairs, **settings)
        again.load(tmp_path / "state.pt")
        for _ in range(3):
            again.run_step()
    assert again.losses == whole.losses
    for name, weight in whole.bridge.state_dict().items():
        assert torch.equal(weight, again.bridge.state_dict()[name]), name
    learned = again.learned().state_dict()
    for name, weight in whole.learned().state_dict().items():
        assert torch.equal(weight, learned[name]), name
    assert not list(tmp_path.glob("*.part"))
    other = trainer(host, training, model, pairs, **{**settings, "learning_rate": 2e-3})
    with pytest.raises(ValueError, match=r"another configuration: learning_rate 0.001 there, 0.002 here"):
        other.load(tmp_path / "state.pt")


@pytest.mark.parametrize("seed", [0, 281_470_000, 0xFFFFFFFF, 2**64 - 1])
def test_every_seed_trains(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any, seed: int
) -> None:
    """Protects: every seed that the node or a configuration can have trains."""
    learning = trainer(host, training, model, encoded(training, tmp_path), seed=seed)
    with gradients():
        learning.run_step()
    assert math.isfinite(learning.losses[0])


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


@pytest.mark.parametrize("version", [None, 99])
def test_a_checkpoint_of_another_version(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any, version: int | None
) -> None:
    """Protects: a checkpoint of an older or newer version of the pack is refused, with what to do."""
    path = tmp_path / "state.pt"
    learning = trainer(host, training, model, encoded(training, tmp_path))
    learning.save(path)
    learning.load(path)
    torch.save({**torch.load(path, weights_only=True), "format": version}, path)
    with pytest.raises(ValueError, match=r"state\.pt is a checkpoint of another version .* move the check"):
        learning.load(path)


@pytest.mark.parametrize(("stored", "cast"), [(torch.float16, None), (torch.bfloat16, torch.float16)])
def test_fp16_models_are_scaled(
    host: Host, training: Any, gradients: Any, tmp_path: Path, stored: torch.dtype, cast: torch.dtype | None
) -> None:
    """Protects: with a network that computes in fp16, because its weights are or because it is cast, the
    setting fp32 has the gradient that the network has in fp32: small ones are not lost.
    """
    pairs = encoded(training, tmp_path, pairs=2)
    model = small_models.loaded(small_models.small_unet(dtype=stored))
    for layer in model.model.modules():  # where the card knows fp16 the host has layers that do not cast
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    found = []
    for compute in (cast, torch.float32):
        model.model.manual_cast_dtype = compute
        learning = trainer(host, training, model, pairs, clip=1e9)

        def keep(*_: Any, learning: Any = learning) -> None:
            found.append(torch.cat([weight.grad.flatten() for weight in learning._weights]))

        learning._optimiser.register_step_pre_hook(keep)
        # As in a batch of 128 rows, whose mean divides each row's gradient.
        whole = learning.loss
        learning.loss = lambda index, whole=whole: whole(index) / 64
        with gradients():
            learning.run_step()
    assert float(torch.nn.functional.cosine_similarity(*found, dim=0)) > 0.999


def test_accumulation_is_a_larger_batch(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any
) -> None:
    """Protects: two forwards of two pairs a step give the gradient of all four."""
    pairs = encoded(training, tmp_path)
    learning = trainer(host, training, model, pairs, accumulate=2)
    expected = trainer(host, training, model, pairs, accumulate=2)
    with gradients():
        learning.run_step()
        (torch.cat([expected.loss(0), expected.loss(1)]).mean()).backward()
    grads = [weight.grad for weight in expected.bridge.parameters()]
    torch.nn.utils.clip_grad_norm_(list(expected.bridge.parameters()), 1.0)
    optimiser = torch.optim.AdamW(expected.bridge.parameters(), lr=1e-3, weight_decay=0.01)
    optimiser.step()
    assert grads
    for name, weight in learning.bridge.state_dict().items():
        torch.testing.assert_close(weight, expected.bridge.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any
) -> None:
    """Protects: training stops at such a loss, says the step, and keeps the weights of the step before."""
    pairs = encoded(training, tmp_path, pairs=2)
    learning = trainer(host, training, model, pairs)
    with gradients():
        learning.run_step()
        kept = {name: weight.clone() for name, weight in learning.bridge.state_dict().items()}
        for _, edit, *_ in pairs.files:
            latent = safetensors.torch.load_file(tmp_path / edit)["value"]
            latent[0, 0, 0, 0] = float("nan")
            safetensors.torch.save_file({"value": latent}, tmp_path / edit)
        with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
            learning.run_step()
    assert all(torch.equal(weight, kept[name]) for name, weight in learning.bridge.state_dict().items())
    assert learning.step == 1


def test_a_gradient_that_is_not_finite(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any
) -> None:
    """Protects: a finite loss with a gradient that is not finite stops the training as well."""
    learning = trainer(host, training, model, encoded(training, tmp_path, pairs=2))
    kept = {name: weight.clone() for name, weight in learning.bridge.state_dict().items()}
    first = next(learning.bridge.parameters())
    learning.loss = lambda index: (first * 0).sum().sqrt() + 1  # whose derivative is 0 / 0
    with gradients(), pytest.raises(FloatingPointError, match="the gradient of step 1 is nan"):
        learning.run_step()
    assert all(torch.equal(weight, kept[name]) for name, weight in learning.bridge.state_dict().items())


def test_no_image_at_all(host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any) -> None:
    """Protects: a step whose every image is dropped, in which the bridge has no part, is taken: it teaches
    nothing, and weight decay continues.
    """
    learning = trainer(host, training, model, encoded(training, tmp_path), batch=1, weight_decay=0.1)
    start = {name: weight.clone() for name, weight in learning.bridge.state_dict().items()}
    sample_noise = training.objective.sample_noise

    def without(*args: Any) -> Any:
        sample = sample_noise(*args)
        sample.no_image[:] = [True] * len(sample.no_image)
        return sample

    training.trainer.sample_noise = without
    try:
        with gradients():
            learning.run_step()
    finally:
        training.trainer.sample_noise = sample_noise
    for name, weight in learning.bridge.state_dict().items():
        torch.testing.assert_close(weight, start[name] * (1 - 1e-3 * 0.1), rtol=1e-6, atol=0)


def test_checkpointing_takes_the_same_steps(
    host: Host, training: Any, gradients: Any, tmp_path: Path, model: Any
) -> None:
    """Protects: layers that are computed again give the training that keeps them, also where a step has
    several forwards.
    """
    pairs = encoded(training, tmp_path)
    found = []
    for checkpointing in (False, True):
        learning = trainer(host, training, model, pairs, accumulate=2, checkpointing=checkpointing)
        with gradients():
            for _ in range(3):
                learning.run_step()
            found.append(learning)
            # Two forwards whose gradients are asked for together: each has what it read for itself.
            loss = torch.cat([learning.loss(20), learning.loss(21)]).mean()
            found[-1].both = torch.autograd.grad(loss, list(learning.bridge.parameters()))
    plain, again = found
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    for name, weight in plain.bridge.state_dict().items():
        torch.testing.assert_close(again.bridge.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    for first, second in zip(plain.both, again.both, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("TrainSettings", {"precision": "fp64"}, "precision\n.*'fp32', 'bf16' or 'fp16'.*'fp64'"),
        ("TrainSettings", {"batch": 0}, "batch\n.*greater than or equal to 1.*0"),
        ("TrainSettings", {"ema": 1.0}, "ema\n.*less than 1.*1.0"),
        ("Objective", {"dropout": "all"}, "dropout\n.*'paper', 'release' or 'none'.*'all'"),
        ("Objective", {"drop_rate": 0.5}, "drop_rate\n.*less than or equal to 0.33.*0.5"),
    ],
)
def test_wrong_settings(training: Any, name: str, settings: dict, message: str) -> None:
    """Protects: settings that cannot be are refused by name."""
    kind = getattr(training.trainer if name == "TrainSettings" else training.objective, name)
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_batches(training: Any) -> None:
    """Protects: every batch is of one size, an epoch uses no pair twice where there are enough, epochs
    differ, and the same seed gives the same order.
    """
    sizes = [(16, 16)] * 7 + [(8, 24)] * 4 + [(24, 8)]
    first = training.pairs.batches(sizes, 2, seed=1, epoch=0)
    assert first == training.pairs.batches(sizes, 2, seed=1, epoch=0)
    assert first != training.pairs.batches(sizes, 2, seed=1, epoch=1)
    assert all(len({sizes[number] for number in numbers}) == 1 for numbers in first)
    used = [number for numbers in first for number in numbers if sizes[number] != (24, 8)]
    assert len(used) == len(set(used)) == 10
    assert [11, 11] in first
