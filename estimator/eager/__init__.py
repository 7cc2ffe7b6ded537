"""What eager PyTorch keeps alive: symbolic tensors, operators and the backward engine.

A model's forward pass is written once in these operators, in the order of the real code. Running
it costs milliseconds, because a tensor here is a shape and a width, and tells which tensors are
alive at every instant of a training step, for every micro-batch and length at once.
"""
