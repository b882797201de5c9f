"""The version of the package, in one place: a module that imports nothing."""

__version__ = "0.2.0"
