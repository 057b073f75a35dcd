"""What a user wires: one module a family, each with its `NODES`."""

from . import bridge, describe, guidance, inversion, metrics, tiny_studio, training, unify, viewers

NODES = [
    *bridge.NODES,
    *guidance.NODES,
    *training.NODES,
    *inversion.NODES,
    *unify.NODES,
    *metrics.NODES,
    *viewers.NODES,
    *describe.NODES,
    *tiny_studio.NODES,
]
