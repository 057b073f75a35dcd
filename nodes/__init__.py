"""What a user wires: one module a family, each with its `NODES`; and the extension that lists them all."""

from comfy_api.latest import ComfyExtension, io

from . import (
    bridge,
    describe,
    guidance,
    inversion,
    metrics,
    pairs,
    photo,
    settings,
    tiny_studio,
    training,
    unify,
    viewers,
)
from .errors import named

_FAMILIES = (
    *(bridge, guidance, pairs, training, unify, photo, settings),
    *(inversion, metrics, viewers, describe, tiny_studio),
)
NODES = [named(node) for family in _FAMILIES for node in family.NODES]


class DescriptiveEdit(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DescriptiveEdit:
    return DescriptiveEdit()
