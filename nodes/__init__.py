"""What a user wires: one module a family, each with its `NODES`."""

from . import tiny_studio, unify

NODES = [*unify.NODES, *tiny_studio.NODES]
