"""Saving a checkpoint: plan, write, commit."""
