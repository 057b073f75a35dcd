"""Training in the graph: what it makes, keeps and asks for, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import memory_modes
import pytest
import small_models
import torch
from bridge_edit import apply_bridge
from host import Host
from live_bytes import LiveBytes
from test_training_data import encode, write_pair


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """An empty folder inside the host's input folder."""
    path = Path(folder_paths.get_input_directory()) / "pairs"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    assert path.is_relative_to(host.base)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def studio(host: Host) -> Any:
    """The Tiny Studio's MODEL, CLIP and VAE."""
    return host.execute("DescEditTinyStudio")[:3]


def test_train_in_the_graph(host: Host, folder: Path, studio: Any) -> None:
    """Protects: a graph trains a bridge on a folder, shows progress and the loss, gives it to the next node,
    and leaves the bridge that came in as it was.
    """
    for name in ("a", "b", "c"):
        write_pair(folder, name, seed=ord(name))
    model = studio[0]
    (start,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
    before = {name: weight.clone() for name, weight in start.model.state_dict().items()}
    pairs = encode(host, folder, studio)
    inputs = {"model": model, "bridge": start, "pairs": pairs, "batch": 2, "learning_rate": 1e-3}
    trained, plot = host.execute("DescEditTrainBridge", steps=4, **inputs)
    again, _ = host.execute("DescEditTrainBridge", steps=4, **inputs)
    learned = trained.model.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in start.model.state_dict().items())
    assert all(torch.equal(weight, learned[name]) for name, weight in again.model.state_dict().items())
    assert not torch.equal(learned["middle.0.0.fuse.weight"], before["middle.0.0.fuse.weight"])
    assert not any(weight.requires_grad for weight in trained.model.parameters())
    assert plot.shape[-1] == 3
    patched = apply_bridge(
        host, model, trained, torch.randn(1, 4, 8, 8), source=studio_text(host, studio, "a red circle")
    )
    (output,) = host.execute(
        "KSampler",
        model=patched,
        positive=studio_text(host, studio, "a blue circle"),
        negative=studio_text(host, studio, ""),
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        seed=1,
        steps=2,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    assert output["samples"].isfinite().all()


def studio_text(host: Host, studio: Any, text: str) -> Any:
    """CONDITIONING of a text."""
    return host.execute("CLIPTextEncode", clip=studio[1], text=text)[0]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (None, comfy.model_management.InterruptProcessingException),
        (comfy.model_management.OOM_EXCEPTION("CUDA out of memory"), comfy.model_management.OOM_EXCEPTION),
        (RuntimeError("of another kind"), RuntimeError),
    ],
    ids=["interrupt", "memory", "other"],
)
def test_what_was_learned_is_kept(
    host: Host, folder: Path, studio: Any, problem: Exception | None, expected: type[BaseException]
) -> None:
    """Protects: whatever stops a training, it leaves a bridge file of the steps it took, beside one of the
    same name from before; with no memory left it says so, where the file is and what to do; the next training
    runs.
    """
    for name in ("a", "b"):
        write_pair(folder, name, seed=ord(name))
    model = studio[0]
    (start,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6 and problem is not None:
            raise problem
        if calls == 6:
            comfy.model_management.interrupt_current_processing()

    inputs = {"model": model, "bridge": start, "pairs": encode(host, folder, studio), "batch": 2}
    kept_in = Path(folder_paths.get_folder_paths("attention_bridges")[0])
    kept_in.mkdir(exist_ok=True)
    (kept_in / "stopped-step2_00001_.safetensors").write_bytes(b"older")
    handle = model.model.diffusion_model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(expected) as raised:
            host.execute("DescEditTrainBridge", **inputs, steps=50, name="stopped")
    finally:
        handle.remove()
    if expected is comfy.model_management.OOM_EXCEPTION:
        said = str(raised.value)
        assert "Train Attention Bridge: no memory left in step 3" in said
        assert "kept as stopped-step2_00002_.safetensors. Lower batch" in said
    path = kept_in / "stopped-step2_00002_.safetensors"
    (kept,) = host.execute("DescEditLoadBridge", bridge_name=path.name)
    assert (kept_in / "stopped-step2_00001_.safetensors").read_bytes() == b"older"
    for file in kept_in.glob("stopped*"):
        file.unlink()
    host.execute("DescEditTrainBridge", **inputs, steps=2)
    expected_weights = host.execute("DescEditTrainBridge", **inputs, steps=2)[0].model.state_dict()
    assert float(expected_weights["middle.0.0.fuse.weight"].abs().max()) > 0
    for name, weight in kept.model.state_dict().items():
        assert torch.equal(weight, expected_weights[name]), name


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_the_host_is_asked_for_memory(
    host: Host, folder: Path, studio: Any, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Protects: training asks the host for what a step takes at its most, to a fifth, in two precisions, kept
    or computed again; with the copies that autograd keeps of weights that are cast, or that the host streams:
    for a dynamic model all at once.
    """
    for name in ("a", "b"):
        write_pair(folder, name, seed=ord(name))
    pairs, asked, load = encode(host, folder, studio), [], comfy.model_management.load_models_gpu

    def note(models: list[Any], memory_required: float = 0, **rest: Any) -> None:
        asked.append(memory_required)
        load(models, memory_required=memory_required, **rest)

    def train(**inputs: Any) -> float:
        asked.clear()
        host.execute("DescEditTrainBridge", model=model, bridge=start, pairs=pairs, batch=2, **inputs)
        return asked[-1]

    with memory_modes.streamed() if streamed else memory_modes.resident():
        (model,) = host.execute("DescEditTinyStudio")[:1]
        (start,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
        small_models.loaded(model)
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
        for precision in ("fp32",) if streamed else ("bf16", "fp32"):
            for checkpointing in (False, True):
                with LiveBytes() as live:
                    found = train(steps=2, precision=precision, checkpointing=checkpointing)
                assert 0.8 < found / live.peak < 1.2, (precision, checkpointing)
                assert len(asked) == 1 + streamed
        monkeypatch.setattr(model, "is_dynamic", lambda: True)
        dynamic = train(steps=1, precision="fp32", checkpointing=True)
    assert asked == [dynamic]
    assert dynamic == found if streamed else dynamic > found


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting model"), (8, "an instruct-pix2pix model")])
def test_models_with_more_channels(host: Host, folder: Path, studio: Any, channels: int, kind: str) -> None:
    """Protects: inpainting and instruct-pix2pix models are refused by name, before anything is loaded."""
    write_pair(folder, "a")
    model = small_models.small_unet(layout={"in_channels": channels})
    (bridge,) = host.execute("DescEditNewBridge", model=model, rank=4, alpha=4.0)
    message = rf"Train Attention Bridge: this _SmallSD15 takes {channels} channels .*: it is {kind}"
    with pytest.raises(ValueError, match=message):
        host.execute(
            "DescEditTrainBridge", model=model, bridge=bridge, pairs=encode(host, folder, studio), steps=1
        )


@pytest.mark.parametrize("sampling", ["lcm", "x0", "img_to_img"])
def test_samplings_that_cannot_be_trained(host: Host, folder: Path, studio: Any, sampling: str) -> None:
    """Protects: a MODEL whose sampling predicts neither noise nor v at its own timesteps is refused."""
    write_pair(folder, "a")
    (bridge,) = host.execute("DescEditNewBridge", model=studio[0], rank=4, alpha=4.0)
    (model,) = host.execute("ModelSamplingDiscrete", model=studio[0], sampling=sampling, zsnr=False)
    with pytest.raises(ValueError, match=r"Train Attention Bridge: the sampling of this MODEL .* cannot be"):
        host.execute(
            "DescEditTrainBridge", model=model, bridge=bridge, pairs=encode(host, folder, studio), steps=1
        )


def test_wrong_inputs(host: Host, folder: Path, studio: Any) -> None:
    """Protects: a bridge for another base, and a name that leads out of its folder, are refused at once."""
    write_pair(folder, "a")
    pairs = encode(host, folder, studio)
    other = small_models.small_unet()
    (bridge,) = host.execute("DescEditNewBridge", model=other, rank=4, alpha=4.0)
    inputs = {"model": studio[0], "pairs": pairs, "steps": 1}
    with pytest.raises(ValueError, match=r"Train Attention Bridge: the bridge is for _SmallSD15"):
        host.execute("DescEditTrainBridge", bridge=bridge, **inputs)
    with pytest.raises(ValueError, match=r"Train Attention Bridge: name is '../x'"):
        host.execute("DescEditTrainBridge", bridge=bridge, name="../x", **inputs)
