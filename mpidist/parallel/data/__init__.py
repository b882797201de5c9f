"""Data parallelism: gradients in buckets, averaged over the ranks during the backward pass."""
