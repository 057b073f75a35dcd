"""The training command: the bases that it takes, and what stops it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import comfy.model_management
import pytest
import safetensors.torch
import small_models
import torch
from host import Host
from test_training_run import make_run, state
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
