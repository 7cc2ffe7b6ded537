"""Compares estimates with published measurements; `python -m benchmarks.accuracy` writes the page."""
