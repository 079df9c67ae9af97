"""Adapters in the model: attaching them, loading their tensors, and reaching the original model through them."""
