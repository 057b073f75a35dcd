"""Studies on the Tiny Studio's held-out edits."""
