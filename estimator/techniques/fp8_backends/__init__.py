"""The libraries that train in 8-bit floats: one file for each."""
