"""Run the real training step on fake tensors or on a GPU, to check and calibrate estimates."""
