"""What we add to a Megatron training run, the same for our own entry and for somebody else's script."""
