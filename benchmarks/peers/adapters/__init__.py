"""One file for each peer: a case in its own words. Nothing here imports this project's engines."""
