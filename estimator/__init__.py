"""Estimate and explain the GPU memory of LLM fine-tuning, without a GPU and without torch."""

__version__ = "0.1.0"
