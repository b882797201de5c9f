"""Tools that work on checkpoints without ranks: verify, prune, reshard, export."""
