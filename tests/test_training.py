"""Training a bridge: the loop, its checkpoints, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
