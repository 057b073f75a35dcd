"""The training command: what a run leaves, its checkpoints, many processes, and what stops it."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import comfy.model_management
import numpy as np
import pytest
import safetensors.torch
import small_models
import torch
from closeness import same_bits
from host import ROOT, Host, comfyui_path, device
from PIL import Image
from training_settings import settings, write


@pytest.fixture(scope="module")
def training(host: Host) -> Any:
    """The pack's training modules."""
    names = ("config", "command", "checkpoints", "trainer", "objective")
    return SimpleNamespace(**{name: host.pack_module(f"training.{name}") for name in names})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six edit pairs, and room for their encoded ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    for number in range(6):
        for role in ("source", "edit"):
            colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(colours).resize((64, 64))
            picture.save(folder / "pairs" / f"{number}_{role}.png")
        texts = {"source": f"a red circle {number}", "edit": f"a green square {number}"}
        (folder / "pairs" / f"{number}.json").write_text(json.dumps(texts))
    return folder


def make_run(training: Any, tmp_path: Path, data: Path, name: str = "run", **changes: Any) -> Any:
    """A run in this process, ready to train."""
    file = write(tmp_path / f"{name}.yaml", settings(data, tmp_path / name, **changes))
    config = training.config.read_config(file)
    return training.command.Run(config, training.command.accelerator_for(config))


def start(config: Path, log: Path, **environment: str) -> subprocess.Popen:
    """The command as a user gives it, from the pack's folder."""
    own = {"COMFYUI_PATH": str(comfyui_path()), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "training", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, **own, **environment},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / "bridge.safetensors")


def state(output: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    return torch.load(sorted((output / "checkpoints").glob("*.pt"))[-1], weights_only=True)


@pytest.fixture(scope="module")
def whole(training: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one process that nothing stops leaves, two forwards a step."""
    folder = tmp_path_factory.mktemp("whole")
    assert make_run(training, folder, data, train__accumulate=2).train()
    return folder / "run"


def test_what_a_run_leaves(host: Host, training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: a run leaves a bridge that the loader takes and that has learned, the last checkpoints only,
    curves and a picture for TensorBoard, and the picture as a file; the base's weights keep every bit.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes: dict[str, Any] = {"validation__every": 3, "validation__steps": 1, "validation__count": 2}
    run = make_run(training, tmp_path, data, logging__tensorboard=True, train__precision="bf16", **changes)
    before = {name: weight.clone() for name, weight in run.model.model.state_dict().items()}
    assert run.train()
    run.accelerator.end_training()
    for name, weight in run.model.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    output = tmp_path / "run"
    bridge = host.pack_module("models.bridge_file").load_bridge(output / "bridge.safetensors").model
    assert (bridge.settings.rank, bridge.settings.base) == (4, "TinySD15")
    assert any(weight.abs().max() > 0 for name, weight in bridge.named_parameters() if "fuse" in name)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000005.pt", "step-000006.pt"]
    pictures = sorted((output / "validation").iterdir())
    assert [path.name for path in pictures] == ["step-000003.png", "step-000006.png"]
    size = Image.open(pictures[0]).size
    assert size[0] > 3 * 64
    assert size[1] > 2 * 64
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    losses = run.trainer.losses
    assert points == [(step, pytest.approx(sum(losses[step - 2 : step]) / 2)) for step in (2, 4, 6)]
    assert {"gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("validation")] == [3, 6]


def test_validation_shows_the_edit(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: the picture has the source, the target and a sampled picture side by side, from a folder of
    its own where one is named, and the sampled one follows the bridge's weights and nothing else.
    """
    changes: dict[str, Any] = {"validation__every": 1, "validation__steps": 2, "validation__count": 1}
    run = make_run(training, tmp_path, data, validation__folder=str(data / "pairs"), **changes)
    first, again = (
        np.asarray(run.validation.picture(run.trainer, run.model, run.base)).astype(int) for _ in range(2)
    )
    assert (first == again).all()
    for column, role in enumerate(("source", "edit")):
        left = 6 + column * (64 + 6)
        wanted = np.asarray(Image.open(data / "pairs" / f"0_{role}.png")).astype(int)
        below = (first[top : top + 64, left : left + 64] for top in range(60))  # some lines of the label
        assert any(np.abs(shown - wanted).max() <= 1 for shown in below)
    with torch.no_grad():
        for weight in run.trainer.bridge.parameters():
            generator = torch.Generator().manual_seed(weight.numel())
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        run.trainer.average.update(run.trainer.bridge.state_dict(), 0.0)
    other = np.asarray(run.validation.picture(run.trainer, run.model, run.base)).astype(int)
    assert (other[:, :146] == first[:, :146]).all()
    assert np.abs(other[:, 146:210] - first[:, 146:210]).mean() > 1


def test_two_processes_are_one(tmp_path: Path, data: Path, whole: Path) -> None:
    """Protects: two processes with one forward a step each take the steps of one with two: the same samples
    and draws, so the same losses and weights but for the order of a sum; the command itself makes sure that
    both have the same weights, to the bit, at every checkpoint. All on the CPU: two processes cannot meet on
    one card.
    """
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if device().type != "cpu":
        changes = {"train__accumulate": 2, "cache": str(tmp_path / "encoded for one")}
        config = write(tmp_path / "one.yaml", settings(data, tmp_path / "one", **changes))
        log = tmp_path / "one.log"
        assert start(config, log, **on_cpu).wait(600) == 0, log.read_text()
        whole = tmp_path / "one"
    config = write(tmp_path / "two.yaml", settings(data, tmp_path / "two", cache=str(tmp_path / "encoded")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **on_cpu}
    processes = [
        start(config, tmp_path / f"{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **team)
        for rank in range(2)
    ]
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert len(list((tmp_path / "encoded").glob("index-*-of-2.json"))) == 2
    found, expected = state(tmp_path / "two"), state(whole)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, weight in tensors(whole).items():
        torch.testing.assert_close(tensors(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-5)
    moved = max(float(weight.abs().max()) for name, weight in tensors(whole).items() if "fuse" in name)
    assert moved > 1e-3  # F starts at zero: the tolerance is a hundredth of what was learned


def test_the_hosts_device(training: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a run learns on the device that the host computes on, whatever accelerate would choose; many
    processes that would meet on another one are refused.
    """

    class Elsewhere:
        device = torch.device("meta")
        num_processes = 1

        def __init__(self, **_: Any) -> None:
            self.there = training.command.accelerator_for(run.config)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.there, name)

    run = make_run(training, tmp_path, data, steps=1)
    elsewhere = Elsewhere()
    again = training.command.Run(run.config, elsewhere)
    assert again.train()
    assert {weight.device for weight in again.trainer.bridge.parameters()} == {device()}
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: elsewhere)
    training.command.accelerator_for(run.config)
    elsewhere.num_processes = 2
    with pytest.raises(ValueError, match=rf"computes on {device()} but accelerate's processes meet on meta"):
        training.command.accelerator_for(run.config)


def test_processes_that_differ_are_found(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: a process with other weights, or at another step, stops the run and is named."""
    run = make_run(training, tmp_path, data)
    marks: list[torch.Tensor] = []
    run.accelerator = SimpleNamespace(gather=lambda mark: marks.append(mark) or torch.cat([marks[0], mark]))
    run._check_same()
    run.trainer.step = 1
    with pytest.raises(ValueError, match="the processes 1 have other weights than process 0"):
        run._check_same()


def test_killed_at_any_moment(tmp_path: Path, data: Path, whole: Path) -> None:
    """Protects: a run that is killed without warning, while it writes a checkpoint where that can be caught,
    and is started again with the same command ends with the bits of one that was never stopped.
    """
    output = tmp_path / "killed"
    config = write(tmp_path / "killed.yaml", settings(data, output, train__accumulate=2))
    process = start(config, tmp_path / "first.log")
    end = time.monotonic() + 600
    try:
        while time.monotonic() < end and process.poll() is None:
            if any(output.glob("checkpoints/step-000003.pt*")):
                break
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    left = [path.name for path in output.glob("checkpoints/*.pt")]
    assert left
    assert "step-000006.pt" not in left
    assert start(config, tmp_path / "second.log").wait(600) == 0, (tmp_path / "second.log").read_text()
    assert "continuing from step-00000" in (tmp_path / "second.log").read_text()
    assert same_bits(*(torch.tensor(state(made)["losses"]) for made in (output, whole)))
    for name, weight in tensors(whole).items():
        assert same_bits(tensors(output)[name], weight), name
    assert not list(output.glob("checkpoints/*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(
    training: Any, tmp_path: Path, data: Path, whole: Path, capsys: Any, number: signal.Signals
) -> None:
    """Protects: Ctrl-C and SIGTERM end the step, save it and say so; the run then continues to the same end,
    and the process has its own handlers back.
    """
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    run = make_run(training, tmp_path, data, train__accumulate=2, checkpoint__every=100)
    step = run.trainer.run_step

    def told() -> float:
        if run.trainer.step == 1:
            os.kill(os.getpid(), number)
        return step()

    run.trainer.run_step = told
    assert not run.train()
    assert "stopped: step 2 is saved" in capsys.readouterr().out
    assert not (tmp_path / "run" / "bridge.safetensors").exists()
    again = make_run(training, tmp_path, data, train__accumulate=2, checkpoint__every=100)
    assert again.train()
    for name, weight in tensors(whole).items():
        assert same_bits(tensors(tmp_path / "run")[name], weight), name
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_broken_checkpoints(training: Any, tmp_path: Path, data: Path, caplog: Any) -> None:
    """Protects: a checkpoint that was cut off is skipped with a warning for the one before; where none can be
    read, the run stops instead of starting again.
    """
    assert make_run(training, tmp_path, data, steps=2).train()
    folder = tmp_path / "run" / "checkpoints"
    newest, before = folder / "step-000002.pt", folder / "step-000001.pt"
    newest.write_bytes(newest.read_bytes()[:-2000])
    run = make_run(training, tmp_path, data, steps=2)
    with caplog.at_level(logging.WARNING):
        assert run.checkpoints.resume(run.trainer) == before
    assert run.trainer.step == 1
    assert "step-000002.pt cannot be read as a checkpoint" in caplog.text
    before.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        run.checkpoints.resume(run.trainer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridge__rank": 2}, r"bridge\.rank 4 there, 2 here"),
        ({"train__objective__min_snr": 5.0}, r"objective\.min_snr 0\.0 there, 5\.0 here"),
        ({"train__accumulate": 3}, r"forwards a step 1 there, 3 here"),
        ({"data__limit": 4}, r"pairs 6 \(\w+\) there, 4 \(\w+\) here"),
    ],
)
def test_another_configuration(
    training: Any, tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    """Protects: a run does not continue from a checkpoint with other settings, and says what differs."""
    assert make_run(training, tmp_path, data, steps=1).train()
    with pytest.raises(ValueError, match=f"step-000001.pt is .* of another configuration: {message}"):
        make_run(training, tmp_path, data, **changes).train()


def test_what_may_change(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: a run continues with more steps, in a folder that was moved, with other logging, other
    pictures, and layers computed again instead of kept.
    """
    assert make_run(training, tmp_path, data, steps=1).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    changes = {"train__checkpointing": True, "logging__every": 1, "checkpoint__every": 5}
    run = make_run(training, tmp_path, data, "moved", steps=2, **changes)
    assert run.train()
    assert run.trainer.step == 2


def test_full_disk(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: where the system does not take a whole checkpoint, the run says so, the checkpoint before is
    still there and whole, and no part of the new one is left.
    """
    assert make_run(training, tmp_path, data, steps=1).train()
    run = make_run(training, tmp_path, data, steps=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-000002\.pt cannot be written .* is the disk full\?"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001.pt"]
    again = make_run(training, tmp_path, data, steps=3)
    again.checkpoints.resume(again.trainer)
    assert again.trainer.step == 1


@pytest.mark.parametrize(
    ("problem", "expected", "said"),
    [
        (None, FloatingPointError, "the loss of step 3 is nan"),
        (ValueError("a pair is gone"), ValueError, "a pair is gone"),
    ],
    ids=["not finite", "error"],
)
def test_what_stops_a_run(
    training: Any,
    tmp_path: Path,
    data: Path,
    problem: Exception | None,
    expected: type[Exception],
    said: str,
) -> None:
    """Protects: a loss that is not finite stops the run and names its step; whatever stops a run, the state
    before that step is saved.
    """
    run = make_run(training, tmp_path, data, checkpoint__every=100)
    losses = run.trainer.loss

    def loss(forward: int) -> torch.Tensor:
        if forward == 2 and problem is not None:
            raise problem
        return losses(forward) * (float("nan") if forward == 2 else 1.0)

    run.trainer.loss = loss
    with pytest.raises(expected, match=said):
        run.train()
    assert state(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("cuda:99", torch.float32, "float32 on cuda:99"),
        ("cpu", torch.bool, "bool on cpu"),
    ],
)
def test_what_torch_cannot_do(training: Any, device: str, dtype: torch.dtype, said: str) -> None:
    """Protects: a card that this torch cannot use, and a dtype that it has not, are named in one line."""
    training.command.check_device(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match=rf"torch .* cannot compute in {said} \(.*\): install a torch"):
        training.command.check_device(torch.device(device), dtype)


def without_memory(run: Any, forward: int) -> Any:
    """The run, in whose forward of this index memory runs out."""
    losses = run.trainer.loss

    def loss(index: int) -> torch.Tensor:
        if index == forward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return losses(index)

    run.trainer.loss = loss
    return run


def test_no_memory_left(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: where memory runs out the run says in which step and what to do, the steps before are saved,
    and what it says helps: with checkpointing the same command continues.
    """
    run = without_memory(make_run(training, tmp_path, data, steps=3, checkpoint__every=100), 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory left in step 3, .* Set train.checkpointing"):
        run.train()
    assert state(tmp_path / "run")["step"] == 2
    again = make_run(training, tmp_path, data, steps=3, train__checkpointing=True)
    assert again.train()
    assert len(again.trainer.losses) == 3


def test_no_memory_in_the_first_step(training: Any, tmp_path: Path, data: Path) -> None:
    """Protects: a first step that fails leaves no checkpoint, so the run can start with other settings."""
    run = without_memory(make_run(training, tmp_path, data, steps=1), 0)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left in step 1, with nothing learned yet"):
        run.train()
    assert make_run(training, tmp_path, data, steps=1, train__batch=1).train()


def test_command_says_what_is_wrong(
    training: Any, tmp_path: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: what stops the command is one line: no GPU where one is asked for, a library that is not
    installed, a base that is not there or is no checkpoint, a wrong setting.
    """
    picture = data / "pairs" / "0_source.png"
    # No GPU even where there is one, and accelerate has not chosen one yet.
    monkeypatch.setattr(comfy.model_management, "cpu_mode", lambda: True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    cases = [
        ({"device": "cuda"}, "device is cuda but torch finds no GPU here"),
        ({"base": "nothing.safetensors"}, "base is 'nothing.safetensors' but must be a checkpoint file"),
        ({"base": str(picture)}, "0_source.png cannot be loaded as a checkpoint"),
        ({"stepz": 1}, "no setting stepz; the nearest is steps"),
        ({}, "training needs the library accelerate: install it with "),
    ]
    for changes, message in cases:
        if not changes:
            monkeypatch.setitem(sys.modules, "accelerate", None)
        changes = {"cache": str(tmp_path / "none"), **changes}
        file = write(tmp_path / "wrong.yaml", settings(data, tmp_path / "out", **changes))
        monkeypatch.setattr(sys, "argv", ["training", "--config", str(file)])
        with pytest.raises(SystemExit) as stopped:
            training.command.main()
        assert stopped.value.code == 1
        said = capsys.readouterr().err.strip()
        assert said.startswith("training: ")
        assert message in said
        assert len(said.splitlines()) == 1, said


def test_base_from_a_checkpoint(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the UNet of a checkpoint file comes through the host's loader, frozen, in the wanted dtype
    and with the file's weights; parts that the file does not hold are named.
    """
    path = tmp_path / "base.safetensors"
    weights = small_models.unet_state_dict()
    prefix = "model.diffusion_model."
    safetensors.torch.save_file({f"{prefix}{name}": weight for name, weight in weights.items()}, path)
    families = [small_models._SmallSD15, *small_models.comfy.supported_models.models]
    monkeypatch.setattr(small_models.comfy.supported_models, "models", families)
    base = host.pack_module("training.base_model").BaseModelLoader(str(path))
    unet = base.network(torch.bfloat16).model.diffusion_model
    for name, weight in unet.named_parameters():
        assert torch.equal(weight.cpu(), weights[name].bfloat16()), name
        assert not weight.requires_grad
    for load, part in ((base.encoders, "text encoder"), (base.vae, "VAE")):
        with pytest.raises(ValueError, match=rf"base\.safetensors has no {part}: take a whole checkpoint"):
            load()
    assert base.fingerprint().startswith("base.safetensors ")


def test_tiny_base_in_the_dtype(host: Host) -> None:
    """Protects: the Tiny Studio comes in the dtype that is asked for, as a checkpoint's UNet does, wherever
    the host would choose another, and so does what the host loads in its place.
    """
    base = host.pack_module("training.base_model").BaseModelLoader("tiny_studio")
    for dtype in (torch.float32, torch.bfloat16):
        model = base.network(dtype)
        load, arguments = model.cached_patcher_init
        for made in (model, load(*arguments, disable_dynamic=True)):
            weights = made.model.diffusion_model.parameters()
            assert {weight.dtype for weight in weights} == {dtype}


FILES: dict[str, dict[str, Any]] = {
    "Flux.1 dev": {
        "hidden_size": 128,
        "num_heads": 1,
        "axes_dim": [16, 56, 56],
        "depth": 1,
        "depth_single_blocks": 1,
        "context_in_dim": 128,
        "vec_in_dim": 128,
    },
    "SD3.5": {
        "depth": 2,
        "num_blocks": 2,
        "x_block_self_attn_layers": [0],
        "adm_in_channels": 128,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 128, "out_features": 128},
        },
    },
}


def dit_file(path: Path, family: str) -> None:
    """A file of a small DiT alone, in bf16, of shapes from which the host's loader tells the family."""
    weights = small_models.small_dits.state_dict(family, **FILES[family])
    safetensors.torch.save_file({name: weight.bfloat16() for name, weight in weights.items()}, path)


class _FluxVae:
    """What the cache needs of a VAE: 16 channels at an eighth of the size."""

    def __init__(self) -> None:
        self.first_stage_model = torch.nn.Linear(1, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return small.repeat(1, 6, 1, 1)[:, :16]


@pytest.mark.parametrize(("family", "base"), [("Flux.1 dev", "Flux"), ("SD3.5", "SD3")])
def test_a_dit_from_its_own_file(
    host: Host,
    training: Any,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    base: str,
) -> None:
    """Protects: the command trains a Flux.1 or SD3.5 from a file of the network alone, with another file's
    text encoder and VAE, blocks computed again, and an F of low rank; the loss falls, and the bridge is for
    that family.
    """
    dit_file(tmp_path / "dit.safetensors", family)
    base_model = host.pack_module("training.base_model")
    clip = host.execute("DescEditTinyStudio")[1]
    monkeypatch.setattr(base_model.BaseModelLoader, "encoders", lambda _: (_FluxVae(), clip))
    changes: dict[str, Any] = {
        "bridge__fuse_rank": 2,
        "train__checkpointing": True,
        "train__learning_rate": 5e-3,
        "train__objective__dropout": "none",
        "cache": str(tmp_path / "encoded"),
        "steps": 20,
    }
    run = make_run(training, tmp_path, data, base=str(tmp_path / "dit.safetensors"), **changes)
    before = {name: weight.clone() for name, weight in run.model.model.state_dict().items()}
    assert run.train()
    assert all(torch.equal(w, before[name]) for name, w in run.model.model.state_dict().items())
    bridge = host.pack_module("models.bridge_file").load_bridge(tmp_path / "run" / "bridge.safetensors").model
    assert (bridge.settings.base, bridge.settings.fuse_rank) == (base, 2)
    with torch.no_grad():
        again = [float(run.trainer.loss(forward).mean()) for forward in range(20)]
    assert sum(again) < 0.99 * sum(run.trainer.losses)
