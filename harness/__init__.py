"""Palimpsest: distributed fine-tuning that does not write over what the model already knew."""

__version__ = "0.1.0"
