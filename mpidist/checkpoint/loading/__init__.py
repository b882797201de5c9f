"""Loading a checkpoint: which parts to read, and which rank reads them."""
