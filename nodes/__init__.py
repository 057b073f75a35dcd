"""What a user wires: one module a family, each with its `NODES`."""

from . import bridge, guidance, tiny_studio, training, unify

NODES = [*bridge.NODES, *guidance.NODES, *training.NODES, *unify.NODES, *tiny_studio.NODES]
