"""Sharded data parallelism: each rank keeps a slice of what training needs."""
