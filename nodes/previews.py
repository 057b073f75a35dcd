"""What a node shows of its results on itself: pictures, and a line of text."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from server import PromptServer


def show_images(node: type[io.ComfyNode], *images: torch.Tensor) -> dict[str, Any]:
    """The `ui` of a NodeOutput that shows images, [images, height, width, 3], and masks, [masks, height,
    width], on the node.
    """
    shown = []
    for image in images:
        kind = ui.PreviewMask if image.ndim == 3 else ui.PreviewImage
        shown += kind(image, cls=node).as_dict()["images"]
    return {"images": shown}


def show_text(text: str) -> None:
    """Show a text on the node that is running, in the place of its last one."""
    running = get_executing_context()
    if running is not None:
        PromptServer.instance.send_progress_text(text, running.node_id)
