"""Learning and measuring the Tiny Studio."""
