"""The Tiny Flux: what is trained is what the host samples, and training makes it better."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import safetensors.torch
import torch
from host import Host


@pytest.fixture(scope="module")
def trained(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed weights of a training of six steps."""
    work = tmp_path_factory.mktemp("flux")
    _train(host, work, 6)
    path = work / "flux.safetensors"
    host.pack_module("lab.tiny_studio.train_flow").pack(work, path)
    return path


def _train(host: Host, work: Path, steps: int) -> None:
    """Train on fifty scenes until `steps`, eight at a time."""
    train_flow, scenes = (
        host.pack_module(name) for name in ("lab.tiny_studio.train_flow", "models.tiny_studio.scenes")
    )
    rng = np.random.default_rng(3)
    pool = [scenes.sample_scene(rng) for _ in range(50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_flow, "BATCH", 8)
        train_flow.train_two.encode_pool(work / "latents.pt", pool, train_flow.studio.FILE)
        train_flow.train(work, pool, steps, train_flow.studio.FILE)


def test_its_size(host: Host, trained: Path) -> None:
    """Protects: 6.2M parameters, and a file of at most 13 MB."""
    network = host.pack_module("models.tiny_studio.flux").new_network()
    count = sum(weight.numel() for weight in network.parameters())
    assert 6.1e6 < count < 6.3e6
    assert trained.stat().st_size < 13e6


def test_the_host_samples_what_was_trained(host: Host, trained: Path) -> None:
    """Protects: the stock sampler with the packed weights and the Tiny Studio's CLIP follows the velocity
    that the training saw for the same latent, time and words; it is not zero any more.
    """
    train_flow = host.pack_module("lab.tiny_studio.train_flow")
    flux, words, studio = (
        host.pack_module(f"models.tiny_studio.{name}") for name in ("flux", "words", "studio")
    )
    model, clip = flux.load_model(trained), studio.load_clip()
    (text,) = host.execute("CLIPTextEncode", clip=clip, text="a red circle")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([1.0, 0.0])
    found = comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, text, text, torch.zeros_like(noise)
    )
    reader = train_flow.train_diffusion.TextAndUNet(words.vocabulary())
    reader.load_state_dict(train_flow.train_diffusion.packed(studio.FILE))
    own = reader.context(words.padded(["a red circle"], reader.rows))[:, : flux.TOKENS]
    network = flux.new_network()
    network.load_state_dict({name: w.float() for name, w in safetensors.torch.load_file(trained).items()})
    with torch.no_grad():
        velocity = train_flow.predict(network, noise, torch.ones(1), own)
    expected = (noise - velocity) / 0.18215
    assert float(velocity.std()) > 0.01
    assert float((found - expected).abs().max()) < 0.02 * float(expected.std())


def test_it_learns(host: Host, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects: the loss falls within forty steps from what a network that predicts zero has, and training
    goes on from its checkpoint.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.pack_module("lab.tiny_studio.stage"), "LOG_EVERY", 10)
        _train(host, trained.parent, 46)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4  # at the steps 10, 20, 30 and 40: six were done
    assert losses[-1] < 0.9 * losses[0]


def test_a_bridge_of_it(host: Host, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a bridge with an F of low rank is learned on the packed network, goes on from its checkpoint,
    and its file is one for the Tiny Flux that changes what is sampled.
    """
    train_bridge = host.pack_module("lab.tiny_studio.train_bridge")
    name = "flux_reference_queries_16"
    small = replace(train_bridge.VARIANTS[name], batch=4)
    monkeypatch.setitem(train_bridge.VARIANTS, name, small)
    monkeypatch.setattr(train_bridge, "PAIRS_A_TYPE", 1)
    monkeypatch.setattr(train_bridge, "COMPARED", tmp_path)
    for steps in (2, 3):
        train_bridge.train(name, tmp_path, trained, steps)
    assert len(torch.load(tmp_path / f"{name}.pt", weights_only=True)["losses"]) == 3
    bridge = host.pack_module("models.bridge_file").load_bridge(tmp_path / f"{name}.safetensors")
    assert (bridge.model.settings.base, bridge.model.settings.fuse_rank) == ("TinyFlux", 16)
    model = host.pack_module("models.tiny_studio.flux").load_model(trained)
    clip = host.pack_module("models.tiny_studio.studio").load_clip()
    (text,) = host.execute("CLIPTextEncode", clip=clip, text="a red circle")
    reference = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))}
    (patched,) = host.execute(
        "DescEditApplyBridge", model=model, bridge=bridge, reference=reference, source=text
    )
    found = []
    for each in (model, patched):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
        found.append(
            comfy.sample.sample_custom(each, noise, 1.0, euler, sigmas, text, text, torch.zeros_like(noise))
        )
    assert not torch.equal(*found)


def test_unify_edit_on_it(host: Host, trained: Path) -> None:
    """Protects: the study's methods run on the Tiny Flux and are measured: one row each, with a success and
    similarities.
    """
    flow, studies = (host.pack_module(f"lab.studies.{name}") for name in ("flow_study", "studio"))
    flux, studio = (host.pack_module(f"models.tiny_studio.{name}") for name in ("flux", "studio"))
    tiny = studies.Studio(flux.load_model(trained), studio.load_clip(), studio.load_vae())
    cases = host.pack_module("lab.benchmark.layouts").read_cases("tiny-studio", None, "tuning")[:1]
    rows = {
        "text": flow.text_only(),
        "path": flow.edited(0.0, 0.0, steps=1),
        "edit": flow.edited(steps=1, structure_layers="single_block.2", word_layers="single_block.3"),
        "bridge": flow.bridged(flow.BRIDGES / "flux_edit_queries.safetensors", flow.GUIDANCE),
    }
    lines = [*flow.table(tiny, cases, rows)][2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {label}" for label in rows]
    number = r"[+-]?(?:\d+\.\d\d|nan)"
    change = rf"(?: \({number}, {number} to {number}\))?"
    cells = rf"\| \w+ \| (?:0|100)\.0%{change} \| \d+\.\d\d{change} \| \d+\.\d\d{change} \| \d+\.\d \|"
    for line in lines:
        assert re.fullmatch(cells, line), line
    assert len({line.split(" | ")[2] for line in lines}) == len(rows)


@torch.inference_mode()
def test_the_repositorys_weights(host: Host) -> None:
    """Protects: the trained Tiny Flux follows prompts of combinations that it never saw (aim 85% of 300; here
    of 20), and an image that was inverted comes back.
    """
    report = host.pack_module("lab.tiny_studio.report")
    flux, studio = (host.pack_module(f"models.tiny_studio.{name}") for name in ("flux", "studio"))
    tiny = flux.load_model(flux.FILE), studio.load_clip(), studio.load_vae()
    assert report.prompts(tiny, count=20).accuracy >= 0.8
    assert report.inversion_psnr(*tiny, report.held_scenes(2, 11)) > 35


@torch.inference_mode()
def test_papers_for_flows(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: with the source's description for the edit's, FlowEdit with one scale gives the image back,
    and RF-Edit nearly; with the edit's both change it; RF-Edit without sharing is
    another edit.
    """
    methods, studies = (host.pack_module(f"lab.studies.{name}") for name in ("flow_methods", "studio"))
    flux, studio = (host.pack_module(f"models.tiny_studio.{name}") for name in ("flux", "studio"))
    schedule = studies.schedule
    monkeypatch.setattr(methods, "schedule", lambda tiny: schedule(tiny, 1.0, 8))
    tiny = studies.Studio(flux.load_model(flux.FILE), studio.load_clip(), studio.load_vae())
    cases = host.pack_module("lab.benchmark.layouts").read_cases("tiny-studio", None, "tuning")[:1]
    batch = studies.Batch.of(tiny, cases)
    same = replace(batch, edit_text=batch.source_text)
    torch.testing.assert_close(
        methods.flow_edit(2.0, 2.0, 2).edit(tiny, same), batch.latent, rtol=0, atol=1e-3
    )
    back = methods.rf_edit(1.0, 2, 1.0).edit(tiny, same)
    assert (back - batch.latent).norm() < 0.05 * batch.latent.norm()  # eight steps
    assert not torch.allclose(methods.flow_edit(1.5, 3.0, 2).edit(tiny, batch), batch.latent, atol=0.1)
    found = [methods.rf_edit(2.0, 4, share).edit(tiny, batch) for share in (0.0, 0.5)]
    assert not torch.allclose(*found, atol=1e-2)


def sampled(host: Host, model: Any, clip: Any, text: str = "a red circle", steps: int = 2) -> torch.Tensor:
    """A latent from a few steps of the stock sampler."""
    (positive,), (negative,) = (host.execute("CLIPTextEncode", clip=clip, text=each) for each in (text, ""))
    settings = {"seed": 5, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    given = {"positive": positive, "negative": negative, "latent_image": latent}
    return host.execute("KSampler", model=model, **given, **settings)[0]["samples"]


def test_the_node_gives_the_network_that_is_chosen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: graphs saved without a choice have the UNet, for which no file of Flux is needed; with Flux
    the stock sampler runs it with the same CLIP and VAE, and a missing file is an error that names it.
    """
    flux = host.pack_module("models.tiny_studio.flux")
    models = {name: host.execute("DescEditTinyStudio", network=name)[:3] for name in ("UNet", "Flux")}
    families = {name: type(model.model.model_config).__name__ for name, (model, *_) in models.items()}
    assert families == {"UNet": "TinySD15", "Flux": "TinyFlux"}
    for one, other in zip(*(found[1:] for found in models.values()), strict=True):
        weights = [part.patcher.model.state_dict() for part in (one, other)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    model, clip, _ = models["Flux"]
    assert torch.equal(sampled(host, model, clip), sampled(host, flux.load_model(), clip))
    monkeypatch.setattr(flux.load_model, "__defaults__", (Path("gone.safetensors"), False, None))
    prompt = {"1": {"class_type": "DescEditTinyStudio", "inputs": {}}}
    prompt["2"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    prompt["3"] = {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}}
    prompt["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    family = host.run_graph(prompt)["1"][0].model.model_config
    assert type(family).__name__ == "TinySD15"
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing.*reinstall"):
        host.execute("DescEditTinyStudio", network="Flux")


def test_its_structure_is_kept_where_it_was_measured(host: Host) -> None:
    """Protects: UnifyEdit's default layers for this network are those of the study's search; another Flux
    has those of the literature, and names come first.
    """
    model = host.pack_module("models.tiny_studio.flux").load_model()
    network = host.network(model)

    def chosen(kind: str, names: str = "") -> list[str]:
        return [layer.key for layer in network.structure_layers(16, 16, 32, names, kind)]

    family = type(model.model.model_config).__name__
    assert chosen(family) == [f"single_block.{number}.0" for number in (2, 3, 4, 5)]
    assert chosen("Flux") == ["double_block.1.0"] == chosen(family, "double_block.1")


def test_its_own_bridge(host: Host) -> None:
    """Protects: each network comes with its own bridge, which is refused on the other; with Flux's and dual
    guidance an edit comes nearer to the true one than the source is.
    """
    networks = {name: host.execute("DescEditTinyStudio", network=name) for name in ("UNet", "Flux")}
    source, true, _, was, then = host.execute("DescEditTinyScene", edit_type="background", seed=3)
    model, clip, vae, bridge = networks["Flux"]
    (reference,) = host.execute("VAEEncode", pixels=source, vae=vae)
    given = {"reference": reference, "source": host.execute("CLIPTextEncode", clip=clip, text=was)[0]}
    with pytest.raises(ValueError, match=r"the bridge is for TinySD15.*MODEL is TinyFlux"):
        host.execute("DescEditApplyBridge", model=model, bridge=networks["UNet"][3], **given)
    with pytest.raises(ValueError, match=r"the bridge is for TinyFlux.*MODEL is TinySD15"):
        host.execute("DescEditApplyBridge", model=networks["UNet"][0], bridge=bridge, **given)
    (bridged,) = host.execute("DescEditApplyBridge", model=model, bridge=bridge, **given)
    scales = {"image_guidance": 4.0, "text_guidance": 2.0}
    (guided,) = host.execute("DescEditDualGuidance", model=bridged, **scales)
    (image,) = host.execute("VAEDecode", samples={"samples": sampled(host, guided, clip, then, 8)}, vae=vae)
    assert (image - true).square().mean() < 0.5 * (source - true).square().mean()


def test_a_long_description_is_refused(host: Host) -> None:
    """Protects: words behind the last token that the network reads are an error, not words without effect;
    a text that just fits is read.
    """
    model, clip, *_ = host.execute("DescEditTinyStudio", network="Flux")
    assert sampled(host, model, clip, "red " * 31).isfinite().all()
    with pytest.raises(ValueError, match=r"more than 31 tokens.*shorten it"):
        sampled(host, model, clip, "red " * 32)


def test_it_is_loaded_again(host: Host) -> None:
    """Protects: where the host wants a MODEL with weights of its own it gets the same network anew."""
    model = host.execute("DescEditTinyStudio", network="Flux")[0]
    load, arguments = model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    own, others = again.model.state_dict(), model.model.state_dict()
    assert own.keys() == others.keys()
    for name, weight in own.items():
        assert torch.equal(weight, others[name])
        assert weight.data_ptr() != others[name].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(host: Host, dtype: torch.dtype) -> None:
    """Protects: a card, on which the host takes half precision, draws the same image."""
    flux, studio = (host.pack_module(f"models.tiny_studio.{name}") for name in ("flux", "studio"))
    clip = studio.load_clip()
    half, whole = (sampled(host, flux.load_model(dtype=kind), clip) for kind in (dtype, torch.float32))
    assert (half - whole).norm() < 0.05 * whole.norm()


def test_a_bridge_learns_on_it_by_the_nodes(host: Host) -> None:
    """Protects: the tiny pairs and the training node serve this network too, what is learned is applied
    to it, and dual guidance takes it for what it is: not distilled.
    """
    model, clip, vae, _ = host.execute("DescEditTinyStudio", network="Flux")
    (pairs,) = host.execute("DescEditTinyPairs", vae=vae, clip=clip, edit_type="colour", pairs=2)
    (bridge,) = host.execute("DescEditNewBridge", model=model, rank=4)
    trained, *_ = host.execute("DescEditTrainBridge", model=model, bridge=bridge, pairs=pairs, steps=2)
    assert trained.model.settings.base == "TinyFlux"
    reference = {"samples": torch.ones(1, 4, 16, 16)}
    (patched,) = host.execute("DescEditApplyBridge", model=model, bridge=trained, reference=reference)
    assert not torch.equal(sampled(host, patched, clip), sampled(host, model, clip))
    guided = {}
    for formula in ("automatic", "paper", "image"):
        (each,) = host.execute("DescEditDualGuidance", model=patched, formula=formula)
        guided[formula] = sampled(host, each, clip)
    assert torch.equal(guided["automatic"], guided["paper"])
    assert not torch.equal(guided["automatic"], guided["image"])


def test_by_the_studios_command(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: `dev.py studio --flux` is about the Tiny Flux, and hands on its arguments."""
    report, train_flow = (host.pack_module(f"lab.tiny_studio.{name}") for name in ("report", "train_flow"))
    seen: list[list[str]] = []
    monkeypatch.setattr(train_flow, "main", seen.append)
    monkeypatch.setattr(sys, "argv", ["studio", "--flux", "--threads", "1", "--report"])
    report.main()
    assert seen == [["--threads", "1", "--report"]]
