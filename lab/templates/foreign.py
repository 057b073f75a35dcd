"""Nodes of the one other pack that a template needs, as it describes them to the page."""

from __future__ import annotations

from typing import Any

_FRACTION = ["FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}]
# ComfyUI_IPAdapter_plus
FOREIGN: dict[str, dict[str, Any]] = {
    "IPAdapterUnifiedLoader": {
        "display_name": "IPAdapter Unified Loader",
        "input": {
            "required": {"model": ["MODEL"], "preset": [["PLUS (high strength)"]]},
            "optional": {"ipadapter": ["IPADAPTER"]},
        },
        "output": ["MODEL", "IPADAPTER"],
        "output_name": ["model", "ipadapter"],
    },
    "IPAdapter": {
        "display_name": "IPAdapter",
        "input": {
            "required": {
                "model": ["MODEL"],
                "ipadapter": ["IPADAPTER"],
                "image": ["IMAGE"],
                "weight": ["FLOAT", {"default": 1.0}],
                "start_at": _FRACTION,
                "end_at": _FRACTION,
                "weight_type": [["standard", "prompt is more important", "style transfer"]],
            },
            "optional": {"attn_mask": ["MASK"]},
        },
        "output": ["MODEL"],
        "output_name": ["MODEL"],
    },
}
