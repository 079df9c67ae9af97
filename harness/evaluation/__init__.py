"""Evaluation: lm-eval tasks on vLLM or transformers, and what the scores say about keeping and learning."""
