"""The stages of a run. Each reads and writes the run directory and nothing else."""
