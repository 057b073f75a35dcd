"""The authors' release layout of a bridge: in one file or two, whole or half."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import safetensors
import safetensors.torch
import torch
from host import Host
from test_bridge_file import SD15_LAYERS, load

pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """models/attention_bridges of the test's host, empty, and emptied afterwards."""
    path = Path(folder_paths.get_folder_paths("attention_bridges")[0])
    assert path.is_relative_to(host.base)
    shutil.rmtree(path, ignore_errors=True)  # what other files' tests left
    path.mkdir(parents=True)
    yield path
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


DIFFUSERS = {
    "input": lambda number: f"down_blocks.{(number - 1) // 3}.attentions.{(number - 1) % 3}",
    "middle": lambda number: "mid_block.attentions.0",
    "output": lambda number: f"up_blocks.{number // 3}.attentions.{number % 3}",
}


def write_release(folder: Path, down: str, up: str, rank: int = 2) -> dict[str, torch.Tensor]:
    """The authors' two files with random weights; returns what a bridge must hold, by this pack's names."""
    generator = torch.Generator().manual_seed(0)
    lora, fuse, expected = {}, {}, {}
    for block, number, width in SD15_LAYERS:
        place = f"{DIFFUSERS[block](number)}.transformer_blocks.0"
        for name, projection in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            for part, ending, shape in (("down", down, (rank, width)), ("up", up, (width, rank))):
                weight = torch.randn(shape, generator=generator)
                lora[f"unet.{place}.attn1n.{projection}.{ending}.weight"] = weight
                expected[f"{block}.{number}.0.{name}.{part}.weight"] = weight
        weight = torch.randn(width, width, generator=generator)
        fuse[f"{place}.conv1n.weight"] = weight
        fuse[f"{place}.norm1.weight"] = torch.ones(width)
        expected[f"{block}.{number}.0.fuse.weight"] = weight
    (folder / "xy_lora").mkdir(parents=True)
    safetensors.torch.save_file(lora, folder / "xy_lora" / "pytorch_lora_weights.safetensors")
    safetensors.torch.save_file(fuse, folder / "model.safetensors")
    return expected


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_release_layout(host: Host, folder: Path, down: str, up: str) -> None:
    """Protects: the authors' layout is read from either of its files, every weight at its layer, whatever
    diffusers called the LoRA's halves; it belongs to SD1.5 and its reference passes through the bridge.
    """
    expected = write_release(folder / "release", down, up)
    for name in ("release/model.safetensors", "release/xy_lora/pytorch_lora_weights.safetensors"):
        bridge = load(host, name).model
        state = bridge.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert (bridge.settings.base, bridge.settings.rank, bridge.settings.alpha) == ("SD15", 2, 2.0)
        assert bridge.settings.reference_self_bridge
        assert bridge.settings.direction == "edit_queries"


@pytest.mark.parametrize("half", ["model.safetensors", "xy_lora/pytorch_lora_weights.safetensors"])
def test_half_a_release(host: Host, folder: Path, half: str) -> None:
    """Protects: one half of a release says which other half is missing."""
    write_release(folder / "release", "lora_A", "lora_B")
    other = {"model.safetensors", "xy_lora/pytorch_lora_weights.safetensors"} - {half}
    (folder / "release" / other.pop()).unlink()
    with pytest.raises(ValueError, match=r"Load Attention Bridge: .* is one half of a DescriptiveEdit"):
        load(host, f"release/{half}")


LORA, MODEL = "xy_lora/pytorch_lora_weights.safetensors", "model.safetensors"


def write_whole(folder: Path) -> dict[str, torch.Tensor]:
    """A release whose model.safetensors has the whole UNet and the LoRA too, as the authors' training saves
    it; returns what a bridge must hold.
    """
    expected = write_release(folder, "lora_A", "lora_B")
    whole = safetensors.torch.load_file(folder / MODEL)
    for name, weight in safetensors.torch.load_file(folder / LORA).items():
        inside = (
            name.removeprefix("unet.").replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
        )
        whole[inside] = weight
        whole[inside.partition(".lora_")[0] + ".base_layer.weight"] = torch.ones(3)
    whole["conv_in.weight"] = torch.ones(4)
    whole["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"] = torch.ones(3)
    safetensors.torch.save_file(whole, folder / MODEL)
    return expected


@pytest.mark.parametrize("parts", [(LORA, MODEL), (MODEL,)], ids=["both files", "one file"])
def test_a_release_with_everything_in_one_file(host: Host, folder: Path, parts: tuple[str, ...]) -> None:
    """Protects: the authors' model.safetensors with UNet, LoRA and conv1n is a whole bridge, alone, beside
    its LoRA file, and asked for by that.
    """
    expected = write_whole(folder / "release")
    if LORA not in parts:
        (folder / "release" / LORA).unlink()
    for name in parts:
        state = load(host, f"release/{name}").model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_the_other_half_is_the_releases_own(host: Host, folder: Path) -> None:
    """Protects: half a release never takes its other half from another folder or another release: of two that
    fit, or one whose LoRA is another, it says so by name.
    """
    write_release(folder / "release", "lora_A", "lora_B")
    (folder / "release" / "other.safetensors").write_bytes((folder / "release" / MODEL).read_bytes())
    for name in (MODEL, LORA):
        with pytest.raises(ValueError, match=r"model.safetensors and other.safetensors all have the conv1n"):
            load(host, f"release/{name}")
    (folder / "release" / "other.safetensors").unlink()
    (folder / "release" / "xy_lora" / "b.safetensors").write_bytes((folder / "release" / LORA).read_bytes())
    for name in (MODEL, LORA):
        with pytest.raises(ValueError, match=r"b.safetensors and pytorch_lora_weights.safetensors all have"):
            load(host, f"release/{name}")
    (folder / "release" / "xy_lora" / "b.safetensors").unlink()
    (folder / "release" / "loras").mkdir()
    (folder / "release" / LORA).rename(folder / "release" / "loras" / "lora.safetensors")
    for name in (MODEL, "loras/lora.safetensors"):
        with pytest.raises(ValueError, match="is one half of a DescriptiveEdit"):
            load(host, f"release/{name}")
    write_whole(folder / "whole")
    lora = safetensors.torch.load_file(folder / "whole" / LORA)
    name = next(iter(lora))
    safetensors.torch.save_file({**lora, name: lora[name] + 1}, folder / "whole" / LORA)
    with pytest.raises(ValueError, match=r"weights.safetensors and model.safetensors are of two releases"):
        load(host, f"whole/{LORA}")


def test_two_loras_in_one_file(host: Host, folder: Path) -> None:
    """Protects: of a file with two LoRAs none is taken by chance."""
    write_whole(folder)
    whole = safetensors.torch.load_file(folder / MODEL)
    more = {
        name.replace(".default.", ".second."): weight + 1 for name, weight in whole.items() if "lora" in name
    }
    safetensors.torch.save_file(whole | more, folder / MODEL)
    with pytest.raises(ValueError, match=r"is there a second time: keep one LoRA in the file"):
        load(host, MODEL)


@pytest.mark.parametrize(("asked", "other"), [(MODEL, LORA), (LORA, MODEL)])
def test_the_other_half_is_watched(host: Host, folder: Path, asked: str, other: str) -> None:
    """Protects: the load node's fingerprint follows the other file of a release too, and a later one."""
    write_release(folder / "release", "lora_A", "lora_B")
    node, name = host.node("DescEditLoadBridge"), f"release/{asked}"
    first = node.fingerprint_inputs(bridge_name=name)
    assert node.fingerprint_inputs(bridge_name=name) == first
    os.utime(folder / "release" / other, (1, 1))
    changed = node.fingerprint_inputs(bridge_name=name)
    assert changed != first
    (folder / "release" / other).with_name("second.safetensors").write_bytes(b"")
    assert node.fingerprint_inputs(bridge_name=name) != changed
