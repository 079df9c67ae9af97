"""Training: transformers' Trainer on DeepSpeed, penalties, projections, checkpoints."""
