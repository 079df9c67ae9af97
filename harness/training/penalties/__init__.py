"""Penalties that any method can carry. A new one is a file here, or an entry point in ``harness.penalties``."""
