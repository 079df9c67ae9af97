"""Export: plain LoRA adapters on the original base, and merged checkpoints."""
