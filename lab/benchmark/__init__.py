"""The edit benchmark: methods, which are ComfyUI workflows, on cases with texts, masks and true edits."""
