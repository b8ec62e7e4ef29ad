"""What a training run wrote, as one page that needs nothing else."""
