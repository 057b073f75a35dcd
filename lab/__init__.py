"""Metrics, benchmarks and reports, and the real server they run on."""
