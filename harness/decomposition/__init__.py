"""Linear algebra with no model in it."""
