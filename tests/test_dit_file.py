"""Bridge files of version 2: of DiTs, and with an F of low rank."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bridge_edit
import folder_paths
import pytest
import safetensors
import safetensors.torch
import small_dits
import small_models
import torch
from host import Host

pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """models/attention_bridges of the test's host, empty."""
    path = Path(folder_paths.get_folder_paths("attention_bridges")[0])
    assert path.is_relative_to(host.base)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)
    path.mkdir()


def _contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


LORA = [f"{name}.{part}" for name in "qkv" for part in ("down", "up")]
OUT = ["out.down", "out.up"]
CASES = [
    ("SD1.5", {}, "1", [*LORA, *OUT, "fuse"]),
    ("SD1.5", {"fuse_rank": 6}, "2", [*LORA, *OUT, "fuse.down", "fuse.up"]),
    ("Flux.1 dev", {}, "2", [*LORA, "fuse"]),
    ("Flux.2", {"fuse_rank": 6}, "2", [*LORA, "fuse.down", "fuse.up"]),
    ("Chroma", {"fusion": "add"}, "2", [*LORA, *OUT]),
    ("SD3.5", {"fuse_rank": 6}, "2", [*LORA, "fuse.down", "fuse.up"]),
]


@pytest.mark.parametrize(("kind", "inputs", "version", "parts"), CASES)
def test_round_trip(
    host: Host, folder: Path, kind: str, inputs: dict[str, Any], version: str, parts: list[str]
) -> None:
    """Protects: a saved bridge is the same when it is loaded, and edits as before; a UNet's with a full F is
    of version 1, which older packs read, and all others are of version 2, which they refuse.
    """
    model = small_models.KINDS[kind]()
    bridge = bridge_edit.random_bridge(host, model, **inputs)
    (name,) = host.execute("DescEditSaveBridge", bridge=bridge, name="first")
    tensors, metadata = _contents(folder / name)
    settings = bridge.model.settings
    assert set(tensors) == {f"{key}.{part}" for key in settings.widths for part in parts}
    assert (metadata["version"], metadata["fuse_rank"]) == (version, str(inputs.get("fuse_rank", 0)))
    (again,) = host.execute("DescEditLoadBridge", bridge_name=name)
    assert again.model.settings == settings
    reference, found = small_models.latent(9, model=model), []
    for which in (bridge, again):
        patched = bridge_edit.apply_bridge(host, model, which, reference)
        found.append(bridge_edit.sample(host, patched, steps=1))
    assert torch.equal(*found)


def test_what_a_file_of_version_2_must_say(host: Host, folder: Path) -> None:
    """Protects: a version that is not known asks for an update of the pack, and a version 2 without its rank,
    or with another one than its tensors have, is refused with what is wrong.
    """
    model = small_dits.small_dit("Flux.1 dev")
    host.execute(
        "DescEditSaveBridge", bridge=bridge_edit.random_bridge(host, model, fuse_rank=6), name="good"
    )
    tensors, metadata = _contents(folder / "good_00001_.safetensors")
    lacking = {name: value for name, value in metadata.items() if name != "fuse_rank"}
    for changed, message in (
        (
            {**metadata, "version": "3"},
            "of version '3', but this pack reads versions 1 and 2: update the pack",
        ),
        (lacking, "damaged metadata: no or wrong entry 'fuse_rank'"),
        (
            {**metadata, "fuse_rank": "5"},
            r"misshapen: double_block.0.0.fuse.down \[6, 64\] instead of \[5, 64\]",
        ),
        ({**metadata, "fuse_rank": "0"}, r"missing: .*fuse.* unexpected: .*fuse.down"),
        ({**metadata, "fuse_rank": "-2"}, "fuse_rank is -2 but must be"),
    ):
        safetensors.torch.save_file(tensors, folder / "bad.safetensors", metadata=changed)
        with pytest.raises(ValueError, match=message):
            host.execute("DescEditLoadBridge", bridge_name="bad.safetensors")


def test_sizes(host: Host) -> None:
    """Protects: at full width F is a full matrix where the file stays below 300 MB, as on SD1.5 and SDXL, and
    of rank 256 on Flux.1, whose bridge then has 156,893,184 parameters.
    """
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    bridges, networks = host.pack_module("models.bridge"), host.pack_module("patches.attention.networks")
    sdxl = host.pack_module("lab.bench.sdxl_memory")
    full = {"hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "context_in_dim": 4096}
    config = {**small_dits.FAMILIES["Flux.1 dev"][1], **full, "depth": 19, "depth_single_blocks": 38}
    with torch.device("meta"):
        flux = Flux(**config, operations=comfy.ops.disable_weight_init)
        modules = {"Flux": flux, "SDXL": sdxl.unet()}
        settings = {
            family: bridges.BridgeSettings(family, networks.network_of(module).widths)
            for family, module in modules.items()
        }
        counts = {
            family: sum(weight.numel() for weight in bridges.AttentionBridge(each).parameters())
            for family, each in settings.items()
        }
    assert (settings["Flux"].fuse_rank, counts["Flux"]) == (256, 156_893_184)
    assert settings["SDXL"].fuse_rank == 0
    assert 2 * counts["SDXL"] < 300_000_000
    assert all(each.parameters() == counts[family] for family, each in settings.items())
