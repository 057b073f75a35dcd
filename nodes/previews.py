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
    pictures = [image[..., None].expand(-1, -1, -1, 3) if image.ndim == 3 else image for image in images]
    shown = [ui.PreviewImage(picture, cls=node).as_dict()["images"] for picture in pictures]
    return {"images": [entry for entries in shown for entry in entries]}


def show_text(text: str) -> None:
    """Show a text on the node that is running, in the place of its last one."""
    running, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if running is not None and server is not None:
        server.send_progress_text(text, running.node_id)
