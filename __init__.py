"""Edit an image by describing the result: a ComfyUI node pack."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES


class DescriptiveEdit(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DescriptiveEdit:
    return DescriptiveEdit()
