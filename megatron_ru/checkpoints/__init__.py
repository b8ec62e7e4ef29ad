"""Checkpoints on disk: what is whole, which one to load, which to remove. No torch, and no Megatron but for reading
the index of a checkpoint that has no manifest of ours."""
