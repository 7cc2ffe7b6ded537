"""Other public calculators on the published rows; `python -m benchmarks.peers` asks them."""
