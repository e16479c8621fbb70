"""The version of the package. It is defined here only."""

__version__ = "0.1.0"
