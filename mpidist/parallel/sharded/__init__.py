"""Sharded data parallelism: each rank keeps a slice of the optimizer's state."""
