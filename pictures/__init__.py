"""Pictures that are drawn: plots, contact sheets, labels."""
