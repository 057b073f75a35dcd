"""The template with an IP-Adapter, with a node of ours in the pack's place that does what the pack's does."""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar

import comfy.cli_args
import pytest
import torch
from host import ROOT, Host
from test_guidance_rows import adapted
from test_workflows import IP_ADAPTER, write_files

import nodes


class _Loader:
    """Stands for the pack's loader."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"model": ("MODEL",), "preset": ("STRING", {})}})
    RETURN_TYPES: ClassVar = ("MODEL", "IPADAPTER")
    FUNCTION, CATEGORY = "load", "test"

    def load(self, model: Any, preset: str) -> tuple[Any, str]:
        """Pass the model on."""
        return model, preset


class _Adapter:
    """Stands for the pack's node: adds one of two, by index, to each row."""

    INPUT_TYPES = classmethod(
        lambda _: {
            "required": {
                "model": ("MODEL",),
                "ipadapter": ("IPADAPTER",),
                "image": ("IMAGE",),
                "weight": ("FLOAT", {}),
                "start_at": ("FLOAT", {}),
                "end_at": ("FLOAT", {}),
                "weight_type": ("STRING", {}),
            }
        }
    )
    RETURN_TYPES: ClassVar = ("MODEL",)
    FUNCTION, CATEGORY = "apply", "test"

    def apply(self, model: Any, **_: Any) -> tuple[Any]:
        """The model with the adapter's patches."""
        return (adapted(model),)


def test_template_by_number(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the template's first step is dual guidance's formula of rows that were sampled one by one by
    the stock guider, each with what the adapter gives it there.
    """
    # Guidance multiplies what a card's own choice, fp16, rounds.
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", True)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "IPAdapterUnifiedLoader", _Loader)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "IPAdapter", _Adapter)
    prompt = json.loads((ROOT / "workflows/api" / f"{IP_ADAPTER}.json").read_text())
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    prompt[by_class["CheckpointLoaderSimple"]].update(class_type="DescEditTinyStudio", inputs={})
    prompt[by_class["DescEditCrop"]]["inputs"]["side"] = 128
    prompt[by_class["KSampler"]]["inputs"]["steps"] = 1
    pictures = [node for node in prompt.values() if node["class_type"] == "LoadImage"]
    for node in pictures:
        node["inputs"]["image"] = "template.png"
    files = {prompt[key]["class_type"]: prompt[key] for key in by_class.values()}
    write_files(host, {**files, **_NO_FILES})
    sampler = by_class["KSampler"]

    def sampled(graph: dict[str, Any]) -> torch.Tensor:
        return host.run_graph(graph)[sampler][0]["samples"].double()

    def row(model: list[Any], cfg: float) -> torch.Tensor:
        """One row as the stock guider computes it: the edit's at cfg 1, the unconditional one at cfg 0."""
        graph = copy.deepcopy(prompt)
        graph[sampler]["inputs"].update(model=model, cfg=cfg)
        return sampled(graph)

    guidance = prompt[by_class["DescEditDualGuidance"]]["inputs"]
    bridged, plain = guidance["model"], [by_class["IPAdapter"], 0]
    both, seen, neither = row(bridged, 1.0), row(bridged, 0.0), row(plain, 0.0)
    image, text = (guidance[f"{name}_guidance"] for name in ("image", "text"))
    expected = neither + image * (seen - neither) + text * (both - seen)
    found = sampled(prompt)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4
    assert float((row(bridged, 1.0) - row(plain, 1.0)).abs().max()) > 1e-3


_NO_FILES = {
    "LoraLoader": {"inputs": {"lora_name": "template_lora.safetensors"}},
    "ControlNetLoader": {"inputs": {"control_net_name": "template_control.safetensors"}},
}
