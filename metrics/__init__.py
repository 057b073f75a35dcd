"""Image metrics and their networks: for the node Measure Edit and for the lab."""
