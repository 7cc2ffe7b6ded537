"""Estimates beside published measurements; `python -m benchmarks.accuracy` writes the page."""
