"""What a user wires: one module a family, each with its `NODES`."""

from . import bridge, guidance, tiny_studio, unify

NODES = [*bridge.NODES, *guidance.NODES, *unify.NODES, *tiny_studio.NODES]
