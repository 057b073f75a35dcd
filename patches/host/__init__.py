"""Doors of the host that several methods use."""
