"""Bridge files: the pack's format, and everything that is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import safetensors
import safetensors.torch
import small_models
import torch
from bridge_edit import LAYERS, random_bridge
from host import Host

SD15_LAYERS = [
    *(("input", number, 320) for number in (1, 2)),
    *(("input", number, 640) for number in (4, 5)),
    *(("input", number, 1280) for number in (7, 8)),
    ("middle", 0, 1280),
    *(("output", number, 1280) for number in (3, 4, 5)),
    *(("output", number, 640) for number in (6, 7, 8)),
    *(("output", number, 320) for number in (9, 10, 11)),
]
pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture(scope="module")
def model(memory_mode: str) -> Any:
    """A random UNet."""
    return small_models.small_unet()


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


def load(host: Host, name: str) -> Any:
    """ATTENTION_BRIDGE from a file in the folder."""
    return host.execute("DescEditLoadBridge", bridge_name=name)[0]


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ({}, 9),
        ({"direction": "reference_queries", "fusion": "add", "reference_self_bridge": True}, 8),
    ],
)
def test_round_trip(host: Host, model: Any, folder: Path, inputs: dict, parts: int) -> None:
    """Protects: a bridge that is saved and loaded is the same, weights and settings; the file holds the
    design's tensors and metadata, and nothing is left beside it.
    """
    bridge = random_bridge(host, model, **inputs)
    (name,) = host.execute("DescEditSaveBridge", bridge=bridge, name="first")
    assert name == "first_00001_.safetensors"
    assert [file.name for file in folder.iterdir()] == [name]
    again = load(host, name)
    assert again.model.settings == bridge.model.settings
    for (key, weight), other in zip(
        bridge.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), key
    with safetensors.safe_open(folder / name, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert len(names) == LAYERS * parts
    assert "output.3.0.out.up" in names
    assert ("middle.0.0.fuse" in names) == (parts == 9)
    assert metadata["format"] == "attention-bridge"
    assert metadata["base"] == "_SmallSD15"
    assert (metadata["rank"], metadata["alpha"], metadata["version"]) == ("4", "8.0", "1")
    assert metadata["layers"].split(",")[0] == "input.1.0"


def test_a_file_that_lists_sites(host: Host, model: Any, folder: Path) -> None:
    """Protects: the first files, whose metadata lists their layers as `sites`, still load."""
    bridge = random_bridge(host, model)
    host.execute("DescEditSaveBridge", bridge=bridge, name="new")
    with safetensors.safe_open(folder / "new_00001_.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    metadata["sites"] = metadata.pop("layers")
    safetensors.torch.save_file(tensors, folder / "old.safetensors", metadata=metadata)
    again = load(host, "old.safetensors").model
    assert again.settings == bridge.model.settings
    assert all(
        torch.equal(weight, tensors[name.removesuffix(".weight")])
        for name, weight in again.state_dict().items()
    )


def test_a_file_in_half_precision(host: Host, model: Any, folder: Path) -> None:
    """Protects: a file's precision is kept, so that it takes the memory of the file."""
    bridge = random_bridge(host, model)
    bridge.model.half()
    host.execute("DescEditSaveBridge", bridge=bridge, name="half")
    assert {weight.dtype for weight in load(host, "half_00001_.safetensors").model.state_dict().values()} == {
        torch.float16
    }


def test_sd15_counts(host: Host) -> None:
    """Protects: for SD1.5 at rank 64 a bridge has 16 layers and 18,780,160 learned parameters."""
    bridges, networks = host.pack_module("models.bridge"), host.pack_module("patches.attention.networks")
    with torch.device("meta"):
        widths = networks.network_of(full_width_unet()).widths
        bridge = bridges.AttentionBridge(bridges.BridgeSettings("SD15", widths))
    assert list(widths.items()) == [(f"{block}.{number}.0", width) for block, number, width in SD15_LAYERS]
    assert sum(weight.numel() for weight in bridge.parameters()) == 18_780_160


def full_width_unet() -> torch.nn.Module:
    """SD1.5's module tree."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        operations=comfy.ops.disable_weight_init,
    )


def _edit(name: str) -> Any:
    """How each broken file comes from a good one: (tensors, metadata) -> (tensors, metadata)."""

    def change(tensors: dict, metadata: dict) -> tuple[dict, dict]:
        match name:
            case "missing":
                del tensors["middle.0.0.q.down"]
            case "unexpected":
                tensors["extra"] = torch.zeros(1)
            case "misshapen":
                tensors["input.1.0.fuse"] = torch.zeros(3, 3)
            case "nan":
                tensors["input.1.0.fuse"][0, 0] = float("nan")
            case "version":
                metadata["version"] = "99"
            case "metadata":
                metadata["direction"] = "sideways"
            case "no rank":
                del metadata["rank"]
            case "no layers":
                del metadata["layers"]
            case "names of the module's own":
                metadata["layers"] += ",double.3.0"
        return tensors, metadata

    return change


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("missing", r"not a whole attention bridge: missing: middle.0.0.q.down"),
        ("unexpected", r"unexpected: extra"),
        ("misshapen", r"misshapen: input.1.0.fuse \[3, 3\] instead of \[32, 32\]"),
        ("nan", r"not finite: input.1.0.fuse"),
        ("version", r"version '99'"),
        ("metadata", r"damaged metadata: direction is 'sideways'"),
        ("no rank", r"damaged metadata: no or wrong entry 'rank'"),
        ("no layers", r"damaged metadata: no or wrong entry 'layers'"),
        ("names of the module's own", r"damaged metadata: a layer is called 'double.3.0'"),
    ],
)
def test_broken_files(host: Host, model: Any, folder: Path, broken: str, message: str) -> None:
    """Protects: a bridge file with a fault is refused with the fault named."""
    host.execute("DescEditSaveBridge", bridge=random_bridge(host, model), name="good")
    with safetensors.safe_open(folder / "good_00001_.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors, metadata = _edit(broken)(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / "bad.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"Load Attention Bridge: bridge_name: bad.safetensors .*" + message):
        load(host, "bad.safetensors")


def test_files_that_are_something_else(host: Host, model: Any, folder: Path) -> None:
    """Protects: a LoRA, a checkpoint, a file cut off and a pickle are refused, and told apart from a
    bridge by what they hold.
    """
    lora = {"lora_unet_down_blocks_0_attentions_0.lora_up.weight": torch.zeros(2, 2)}
    plain = {
        f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{half}.weight": torch.zeros(
            2, 2
        )
        for half in "AB"
    }
    for tensors in (lora, plain):
        safetensors.torch.save_file(tensors, folder / "lora.safetensors")
        with pytest.raises(ValueError, match="not an attention bridge but a LoRA"):
            load(host, "lora.safetensors")
    safetensors.torch.save_file(
        {"model.diffusion_model.out.2.bias": torch.zeros(4)}, folder / "sd.safetensors"
    )
    with pytest.raises(ValueError, match="not an attention bridge but something else"):
        load(host, "sd.safetensors")
    host.execute("DescEditSaveBridge", bridge=random_bridge(host, model), name="good")
    whole = (folder / "good_00001_.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"a": torch.zeros(1)}, folder / "pickle.safetensors")
    (folder / "empty.safetensors").write_bytes(b"")
    for name in ("cut", "pickle", "empty"):
        with pytest.raises(ValueError, match=f"{name}.safetensors cannot be read as a safetensors file"):
            load(host, f"{name}.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("", "  ", ".safetensors", "../outside", "/outside", "a/b", "a\\b", ".hidden", "a.", "a ", " a"),
        *("CON", "nul", "com1", "LPT9.soft", "aux.safetensors", "conin$", "a:b", "a?", "a*", "a<b", "a>b"),
        *('a"b', "a|b", "a\tb", "a\x00b", "a\x7fb", "a" * 300, "\ud800"),
    ],
)
def test_names_that_are_no_file_names(host: Host, model: Any, folder: Path, name: str) -> None:
    """Protects: a name with a folder in it, or that Windows or any file system cannot write, is refused by
    both nodes that write, before anything is learned or made.
    """
    bridge = random_bridge(host, model)
    with pytest.raises(ValueError, match=r"Save Attention Bridge: name is"):
        host.execute("DescEditSaveBridge", bridge=bridge, name=name)
    with pytest.raises(ValueError, match=r"Train Attention Bridge: name is"):
        host.execute("DescEditTrainBridge", model=model, bridge=bridge, pairs=None, steps=1, name=name)
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize("name", ["console", "com10", "v1.2", "soft portraits", "绿色", "100%", "a_00001_"])
def test_names_that_are(host: Host, model: Any, folder: Path, name: str) -> None:
    """Protects: other names are kept as they are, and Load Attention Bridge lists them."""
    (found,) = host.execute("DescEditSaveBridge", bridge=random_bridge(host, model), name=name)
    assert found == f"{name}_00001_.safetensors"
    assert found in host.pack_module("nodes.bridge").bridge_files()


def test_saving_counts_up(host: Host, model: Any, folder: Path) -> None:
    """Protects: no file is ever replaced: each save has the next number, also after a gap, with the ending
    given or not, and beside files of other names.
    """
    bridge = random_bridge(host, model)
    (folder / "kept.safetensors").write_bytes(b"by hand")
    (folder / "kept_00007_.safetensors").write_bytes(b"older")
    names = [
        host.execute("DescEditSaveBridge", bridge=bridge, name=name)[0]
        for name in ("kept", "kept.safetensors", "kept.SAFETENSORS", "other")
    ]
    assert names == [
        *(f"kept_{number:05}_.safetensors" for number in (8, 9, 10)),
        "other_00001_.safetensors",
    ]
    assert (folder / "kept.safetensors").read_bytes() == b"by hand"
    assert (folder / "kept_00007_.safetensors").read_bytes() == b"older"
    assert len(list(folder.iterdir())) == 6


def test_a_failed_save_leaves_nothing(
    host: Host, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: when writing fails, no half file is left and the older file is whole."""
    bridge = random_bridge(host, model)
    host.execute("DescEditSaveBridge", bridge=bridge, name="kept")
    before = (folder / "kept_00001_.safetensors").read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        host.execute("DescEditSaveBridge", bridge=bridge, name="kept")
    assert (folder / "kept_00001_.safetensors").read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["kept_00001_.safetensors"]


def test_a_replaced_file_is_loaded_again(host: Host, model: Any, folder: Path) -> None:
    """Protects: the load node's fingerprint follows the file, so a re-queue sees a newer bridge."""
    bridge = random_bridge(host, model)
    host.execute("DescEditSaveBridge", bridge=bridge, name="b")
    node = host.node("DescEditLoadBridge")
    first = node.fingerprint_inputs(bridge_name="b_00001_.safetensors")
    assert node.fingerprint_inputs(bridge_name="b_00001_.safetensors") == first
    os.utime(folder / "b_00001_.safetensors", (1, 1))
    assert node.fingerprint_inputs(bridge_name="b_00001_.safetensors") != first
