"""The tests of mpidist; the tree mirrors the package."""
