"""Training on every kind of network: what is learned is what is sampled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bridge_edit
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import safetensors.torch
import small_dits
import small_models
import torch
from host import Host, device
from live_bytes import LiveBytes
from training_settings import batch_of

DITS = *small_dits.FAMILIES, *small_dits.OTHERS
TOKENS, PAIRS, SIZE = 10, 2, (8, 12)


@pytest.fixture(scope="module")
def training(host: Host) -> Any:
    """The pack's modules."""
    names = ("objective", "trainer", "settings", "texts")
    found = {name: host.pack_module(f"training.{name}") for name in names}
    found["core"] = host.pack_module("patches.bridge.core")
    return SimpleNamespace(**found, gradients=host.pack_module("patches.host.autograd").gradients)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks, by kind."""
    return {name: small_models.loaded(make()) for name, make in small_models.KINDS.items()}


def random_batch(host: Host, model: Any, tokens: int = TOKENS) -> Any:
    """Pairs of random latents and texts."""
    generator = torch.Generator().manual_seed(1)
    latents = PAIRS, *small_models.latent(size=SIZE, model=model).shape[1:]
    texts = PAIRS, tokens, small_models.CONTEXT_WIDTH
    shapes = latents, latents, texts, texts, (1, *texts[1:]), (1, *latents[1:])
    return batch_of(host, *(torch.randn(*shape, generator=generator).to(device()) for shape in shapes))


def random_noise(training: Any, model: Any, batch: Any) -> Any:
    """A sample of noise that drops nothing."""
    schedule = None if training.objective.is_flow(model.model) else 1000
    plain = training.settings.Objective(dropout="none")
    return training.objective.sample_noise(plain, [5, 6], batch.edit.shape[1:], schedule)


def losses(
    host: Host, training: Any, model: Any, bridge: Any, batch: Any, sample: Any, checkpointing: bool = False
) -> torch.Tensor:
    """The objective, dropping nothing."""
    cache = training.core.ReferenceCache(bridge.model.to(device()), host.network(model))
    plain = training.settings.Objective(dropout="none")
    return training.objective.losses(model.model, cache, batch, sample, plain, checkpointing)


@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_training_sees_what_sampling_sees(
    host: Host, training: Any, models: dict[str, Any], kind: str, direction: str
) -> None:
    """Protects: the loss is that of what the host predicts when it samples with the bridge: the same text,
    pooled text, sizes, guidance, timestep and reference; a flow learns noise - image, the others the noise.
    """
    model = models[kind]
    bridge = bridge_edit.random_bridge(host, model, direction=direction)
    batch = random_batch(host, model)
    sample = random_noise(training, model, batch)
    with training.gradients():
        found = losses(host, training, model, bridge, batch, sample).detach().cpu()
    sampling, out = model.model.model_sampling, model.model.process_latent_out
    flow = kind in DITS
    for row in range(PAIRS):
        image, noise = batch.edit[row : row + 1].cpu(), sample.noise[row : row + 1]
        time = sample.timesteps[row]
        sigma = time if flow else sampling.sigmas[time].cpu()
        source, edit = (texts[row].conditioning() for texts in (batch.source_text, batch.edit_text))
        if kind == "Flux.1 dev":
            edit[0][1]["guidance"] = 1.0
        patched = bridge_edit.apply_bridge(
            host, model, bridge, out(batch.source[row : row + 1].cpu()), source=source
        )
        denoised = comfy.sample.sample_custom(
            patched,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([float(sigma), 0.0]),
            edit,
            edit,
            out(image),
        )
        start = sigma * noise + (1 - sigma) * image if flow else image + sigma * noise
        predicted = (start - model.model.process_latent_in(denoised)) / sigma
        expected = (predicted - (noise - image if flow else noise)).square().mean()
        torch.testing.assert_close(found[row], expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("direction", ["edit_queries", "reference_queries"])
@pytest.mark.parametrize("kind", DITS)
def test_gradient(host: Host, training: Any, models: dict[str, Any], kind: str, direction: str) -> None:
    """Protects: the gradient through a DiT's blocks, kept or computed again, is the slope of the loss."""
    model = models[kind]
    bridge = bridge_edit.random_bridge(host, model, direction=direction, fuse_rank=6, gain=1.0)
    batch = random_batch(host, model)
    sample = random_noise(training, model, batch)
    weights = [weight.requires_grad_() for weight in bridge.model.to(device()).parameters()]

    def loss(checkpointing: bool = False) -> torch.Tensor:
        return losses(host, training, model, bridge, batch, sample, checkpointing).mean()

    with training.gradients():
        slopes = torch.autograd.grad(loss(), weights)
        again = torch.autograd.grad(loss(checkpointing=True), weights)
        length = torch.stack([slope.norm() for slope in slopes]).norm()
        found = []
        for step in (0.004, -0.008):
            with torch.no_grad():
                for weight, slope in zip(weights, slopes, strict=True):
                    weight.add_(slope / length, alpha=step)
                found.append(float(loss().double()))
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    torch.testing.assert_close(again, slopes, rtol=1e-4, atol=1e-6 * float(length))
    assert float(length) == pytest.approx((found[0] - found[1]) / 0.008, rel=0.01)


@pytest.mark.parametrize("kind", ["Flux.1 dev", "Chroma", "Qwen-Image"])
def test_texts_of_any_length(host: Host, training: Any, models: dict[str, Any], kind: str) -> None:
    """Protects: a pair's loss does not depend on the length of the other pairs' texts."""
    model = models[kind]
    bridge = bridge_edit.random_bridge(host, model)
    batch = random_batch(host, model)
    sample = random_noise(training, model, batch)
    short = [batch.edit_text[0]._replace(embedding=batch.edit_text[0].embedding[:, :3]), batch.edit_text[1]]
    with training.gradients():
        whole = losses(host, training, model, bridge, replace(batch, edit_text=short), sample).detach()
        for row in range(PAIRS):
            part = slice(row, row + 1)
            alone = training.objective.Batch(
                batch.source[part],
                batch.edit[part],
                batch.source_text[part],
                short[part],
                batch.empty_text,
                batch.white,
            )
            drawn = training.objective.NoiseSample(
                sample.timesteps[part], sample.noise[part], [False], [False], [False]
            )
            found = losses(host, training, model, bridge, alone, drawn).detach()
            torch.testing.assert_close(found[0], whole[row], rtol=1e-4, atol=0)


def test_texts_of_one_length(host: Host, training: Any, models: dict[str, Any]) -> None:
    """Protects: SD3.5, which has no such mask, refuses a batch of texts of several lengths."""
    model = models["SD3.5"]
    batch = random_batch(host, model)
    short = [batch.edit_text[0]._replace(embedding=batch.edit_text[0].embedding[:, :3]), batch.edit_text[1]]
    with (
        training.gradients(),
        pytest.raises(
            ValueError, match=r"several lengths \(3, 10 tokens\), and Stable Diffusion 3 cannot hide"
        ),
    ):
        losses(
            host,
            training,
            model,
            bridge_edit.random_bridge(host, model),
            replace(batch, edit_text=short),
            random_noise(training, model, batch),
        )


def test_time_of_a_flow(training: Any) -> None:
    """Protects: a flow's share of noise is the sigmoid of a standard normal value."""
    plain = training.settings.Objective()
    sample = training.objective.sample_noise(plain, range(4000), (1, 1, 1), None)
    normal = torch.logit(sample.timesteps.double())
    assert float(normal.mean()) == pytest.approx(0, abs=0.05)
    assert float(normal.std()) == pytest.approx(1, abs=0.05)


def test_what_a_flow_has_not(host: Host, training: Any, models: dict[str, Any], tmp_path: Path) -> None:
    """Protects: min-SNR weights on a flow, and a sampling that another node put in its place, are refused."""
    model = models["Flux.1 dev"]
    settings = training.settings.TrainSettings(objective=training.settings.Objective(min_snr=5.0))
    bridge = bridge_edit.random_bridge(host, model)
    with pytest.raises(ValueError, match=r"min_snr is 5 but Flux is a flow"):
        training.trainer.Trainer(model.model, bridge.model, None, settings, device())
    (changed,) = host.execute("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False)
    with pytest.raises(ValueError, match=r"cannot be trained: it must predict the velocity of a flow"):
        training.objective.check_trainable(changed)
    wide = small_models.small_dits.small_dit("Flux.1 dev", in_channels=32)
    with pytest.raises(ValueError, match=r"this Flux takes 32 channels where a latent has 16: it is a Canny"):
        training.objective.check_trainable(wide)


def encoded(host: Host, model: Any, folder: Path, pairs: int = 3) -> Any:
    """EDIT_PAIRS of random latents and texts on disk, with pooled texts."""
    generator = torch.Generator().manual_seed(4)
    latent = small_models.latent(size=SIZE, model=model).shape
    number = itertools.count()

    def stored(*shape: int, pooled: int = 0) -> str:
        found = {"value": torch.randn(*shape, generator=generator)}
        if pooled:
            found["pooled"] = torch.randn(1, pooled, generator=generator)
        safetensors.torch.save_file(found, folder / (name := str(next(number))))
        return name

    width = small_models.CONTEXT_WIDTH
    files = [
        (*(stored(*latent) for _ in range(2)), *(stored(1, TOKENS, width, pooled=width) for _ in range(2)))
        for _ in range(pairs)
    ]
    white, empty = stored(*latent), stored(1, TOKENS, width, pooled=width)
    made = host.pack_module("training.cache").EncodedPairs
    return made(folder, tuple(files), (SIZE,) * pairs, ((SIZE, white),), empty)


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("SDXL", False),
        ("SDXL", True),
        ("Flux.1 dev", True),
        ("Flux.2", True),
        ("Chroma", False),
        ("SD3.5", False),
    ],
)
def test_the_node_trains(
    host: Host, training: Any, models: dict[str, Any], kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Protects: the node trains a bridge of every kind for twenty steps: the same pairs and noise then have a
    lower loss, and the base keeps every bit.
    """
    model = models[kind]
    pairs, before = encoded(host, model, tmp_path), small_models.fingerprint(model)
    (bridge,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
    inputs = {"dropout": "none", "batch": 2, "learning_rate": 1e-2, "checkpointing": checkpointing}
    trained, _ = host.execute(
        "DescEditTrainBridge", model=model, bridge=bridge, pairs=pairs, steps=20, **inputs
    )
    assert small_models.fingerprint(model) == before
    settings = training.settings.TrainSettings(batch=2, objective=training.settings.Objective(dropout="none"))
    found = []
    for each in (bridge, trained):
        with training.gradients():
            learning = training.trainer.Trainer(
                model.model, each.model.to(device()), pairs, settings, device()
            )
            with torch.no_grad():
                found.append(sum(float(learning.loss(forward).mean()) for forward in range(6)))
    assert found[1] < 0.99 * found[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bases_of_small_numbers(host: Host, training: Any, dtype: torch.dtype, checkpointing: bool) -> None:
    """Protects: a base whose weights stay in fp8 or bf16 trains with the gradient of the same weights in
    float32, however the host holds them.
    """
    model = small_models.loaded(small_dits.small_dit("Flux.1 dev", dtype=dtype))
    weights = {name: w.float() for name, w in model.model.diffusion_model.state_dict().items()}
    plain = small_models.loaded(small_dits.small_dit("Flux.1 dev"))
    with torch.inference_mode():
        plain.model.diffusion_model.load_state_dict(weights)
    bridge = bridge_edit.random_bridge(host, model)
    learned = [weight.requires_grad_() for weight in bridge.model.to(device()).parameters()]
    batch = random_batch(host, model)
    sample = random_noise(training, model, batch)
    found = []
    for base, streamed in ((plain, False), (model, False), (model, True)):
        with training.gradients(streamed):
            loss = losses(host, training, base, bridge, batch, sample, checkpointing).mean()
            found.append(torch.autograd.grad(loss, learned))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_dit(
    host: Host,
    models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    checkpointing: bool,
) -> None:
    """Protects: training a DiT asks the host for what a step takes at its most, to a fifth."""
    model = models["Flux.2"]
    pairs, asked, load = encoded(host, model, tmp_path), [], comfy.model_management.load_models_gpu
    (bridge,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)

    def note(models: list[Any], memory_required: float = 0, **rest: Any) -> None:
        asked.append(memory_required)
        load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    with LiveBytes() as live:
        host.execute(
            "DescEditTrainBridge",
            model=model,
            bridge=bridge,
            pairs=pairs,
            steps=2,
            batch=2,
            precision=precision,
            checkpointing=checkpointing,
        )
    assert len(asked) == 1
    assert asked[0] == pytest.approx(live.peak, rel=0.2), asked[0] / live.peak
