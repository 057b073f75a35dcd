"""The attention of the host's networks: its layers, slots and recorder."""
