"""Edit an image by describing the result: a ComfyUI node pack."""

import logging

try:
    from comfyui_version import __version__ as host_version
except ImportError:
    host_version = "0.0"

WEB_DIRECTORY = "web"

if tuple(int(number) for number in host_version.split(".")[:2]) >= (0, 30):
    from .nodes import comfy_entrypoint as comfy_entrypoint
else:
    # An empty old-style mapping: the host starts, with this one line in place of a traceback.
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
    logging.warning(
        f"Descriptive Edit needs ComfyUI 0.30.0 or newer, and this is {host_version}: update ComfyUI"
    )
