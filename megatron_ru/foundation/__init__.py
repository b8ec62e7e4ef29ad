"""What every other room may use: the standard library and nothing else."""
