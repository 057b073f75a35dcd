"""InstructPix2Pix of the lab: how it starts, what it learns from, and its guidance."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Host


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    studies = {name: host.pack_module(f"lab.studies.{name}") for name in ("instruct", "studio", "study")}
    trained = {
        name: host.pack_module(f"lab.tiny_studio.{name}") for name in ("train_bridge", "train_instruct")
    }
    return SimpleNamespace(
        **studies,
        **trained,
        layouts=host.pack_module("lab.benchmark.layouts"),
        state=host.pack_module("training.state"),
        models=host.pack_module("models.tiny_studio.studio"),
        scenes=host.pack_module("models.tiny_studio.scenes"),
    )


@pytest.fixture(scope="module")
def file(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed network that has not learned anything, but sees the source in its first layer."""
    folder = tmp_path_factory.mktemp("instruct")
    torch.manual_seed(0)
    network = lab.train_instruct.new_network()
    with torch.no_grad():
        network.unet.input_blocks[0][0].weight[:, 4:].normal_(std=0.02)
    lab.state.write_state(folder / "instruct.pt", {"average": network.state_dict(), "step": 0})
    lab.train_instruct.pack(folder, folder / "packed.safetensors")
    return folder / "packed.safetensors"


def test_start(lab: Any) -> None:
    """Protects the fair start: before its first step the network predicts what the shipped studio does,
    whatever the source, and it knows every word of an instruction.
    """
    trained = lab.train_instruct
    network = trained.new_network().eval()
    model, clip = lab.models.load_model(dtype=torch.float32), lab.models.load_clip()
    generator = torch.Generator().manual_seed(1)
    noised, source = torch.randn(2, 2, 4, 16, 16, generator=generator)
    text = "a small red circle on grass"
    times = torch.tensor([100, 700])
    rows = trained.words.padded([text] * 2, network.rows)
    with torch.inference_mode():
        found = network(torch.cat([noised, 5 * source], dim=1), times, rows)
        lab.studio.comfy.model_management.load_model_gpu(model)
        context = clip.encode_from_tokens(clip.tokenize(text)).expand(2, -1, -1)
        wanted = model.model.diffusion_model(noised, times.float(), context=context)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    pairs = (
        lab.scenes.sample_edit(kind, 10_000 + n) for kind in lab.train_bridge.EDIT_TYPES for n in range(60)
    )
    used = {token for pair in pairs for token in trained.words.tokens(lab.scenes.instruction(pair))}
    assert used <= set(network.rows)


def test_dropout(lab: Any) -> None:
    """Protects the paper's conditioning dropout: the text alone, the image alone, and both, 5% each."""
    text, image = lab.train_instruct.dropped(torch.arange(1000) / 1000)
    counts = [int(rows.sum()) for rows in (text & ~image, image & ~text, text & image)]
    assert counts == [50, 50, 50]


def test_guidance(lab: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the comparison: an edit is made with equation 3 of the paper, by hand the sum of the three
    predictions, and with the instruction, not the description.
    """
    tiny = lab.studio.Studio.load()
    cases = lab.layouts.read_cases("tiny-studio", None, "tuning")[::25][:2]
    batch = lab.studio.Batch.of(tiny, cases)
    image, text = 1.7, 4.0
    sigmas = lab.studio.schedule(tiny, steps=4)
    monkeypatch.setattr(lab.instruct, "schedule", lambda _: sigmas)
    with torch.inference_mode():
        found = lab.instruct.instructed(image, text, file).edit(tiny, batch)
        model = lab.instruct.load_instruct(file).model
        clip = lab.models.load_clip(file)
        told, none = (
            torch.cat([clip.encode_from_tokens(clip.tokenize(words)) for words in texts])
            for texts in ([case.instruction for case in cases], ["", ""])
        )
        hidden = torch.zeros_like(batch.latent)
        x = model.model_sampling.noise_scaling(sigmas[0], batch.noise, hidden, True)
        for now, below in pairwise(sigmas):
            nothing, shown, both = (
                model.apply_model(x, now.expand(2), c_concat=seen, c_crossattn=words)
                for seen, words in ((hidden, none), (batch.latent, none), (batch.latent, told))
            )
            denoised = nothing + image * (shown - nothing) + text * (both - shown)
            x = x + (x - denoised) / now * (below - now)
        wanted = model.process_latent_out(x)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


def test_training_resumes(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a training that was stopped goes on as if it had not been, and what it packs has learned to
    look at the source and holds no VAE.
    """
    monkeypatch.setattr(lab.train_bridge, "PAIRS_A_TYPE", 1)
    monkeypatch.setattr(lab.train_instruct, "BATCH", 4)
    file, packed = tmp_path / "packed.safetensors", []
    monkeypatch.setattr(lab.train_instruct, "PACKED", file)
    for steps in ((2,), (1, 2)):
        for count in steps:
            lab.train_instruct.train(tmp_path, count)
        packed.append(file.read_bytes())
        tmp_path.joinpath("instruct.pt").unlink()
    assert packed[0] == packed[1]
    state = lab.train_instruct.safetensors.torch.load(packed[0])
    assert state["unet.input_blocks.0.0.weight"][:, 4:].abs().max() > 0
    assert not any(name.startswith("vae.") for name in state)
