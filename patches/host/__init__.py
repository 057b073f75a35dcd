"""Access to the host that several methods share."""
