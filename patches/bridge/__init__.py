"""Applies the attention bridge to a model, and dual guidance."""
