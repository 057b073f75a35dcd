"""Speed and memory against the stock host."""
