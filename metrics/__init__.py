"""Image metrics and the networks that they look through."""
