"""The edit benchmark: methods (ComfyUI workflows) on cases with texts, masks and true edits."""
