"""Memory that the ranks of a node share: calls in one order, compared, and carried out in place."""
