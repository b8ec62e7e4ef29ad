"""Who drives the step: Megatron-Core's training loop, around its own optimizer or around DeepSpeed's."""
