"""Who drives the step: Megatron-Core's training loop."""
