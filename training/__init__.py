"""Learning an attention bridge from edit pairs."""
