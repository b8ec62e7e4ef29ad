"""How we enter a checkout of Megatron-LM or Megatron-DeepSpeed that nobody has touched."""
