"""Formats of quantized weights made real: one file for each library's layer."""
