"""Tensor parallelism: each rank has a part of the weights of a layer, and all work on a sample."""
