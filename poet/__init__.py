"""Poet: an open autoregressive language model that writes video with sound. Importing this imports no torch."""

__version__ = "0.1.0"
