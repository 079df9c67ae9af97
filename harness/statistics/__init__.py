"""What data says about layers. Real tokens only; the same numbers for any batch size and any number of ranks."""
