"""The version of the package, where every level may read it."""

__version__ = "0.1.0"
