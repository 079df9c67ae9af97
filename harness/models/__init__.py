"""Base models: loading, target layers, groups of layers that read the same input."""
