"""A run of the training command: what it leaves, its checkpoints, and many processes."""

from __future__ import annotations

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
import numpy as np
import pytest
import safetensors.torch
import torch
from closeness import same_bits
from host import ROOT, Host, comfyui_path, device
from PIL import Image
from training_settings import settings, write, write_pairs


@pytest.fixture(scope="module")
def training(host: Host) -> Any:
    """The pack's training modules."""
    names = ("config", "command", "checkpoints", "trainer", "objective")
    return SimpleNamespace(**{name: host.pack_module(f"training.{name}") for name in names})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with edit pairs, and room for their encoded ones."""
    return write_pairs(tmp_path_factory.mktemp("data"))


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
