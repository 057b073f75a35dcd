"""Training and measuring the Tiny Studio."""
