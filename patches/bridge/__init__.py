"""The attention bridge at work in a model, and dual guidance."""
