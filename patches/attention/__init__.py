"""Attention in the host's networks: layers, slots and recorder."""
