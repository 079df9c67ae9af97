"""Methods: one file per system. A new method is one new file here, or an entry point in ``harness.methods``."""
