"""UnifyEdit (arXiv 2504.05594)."""
