"""How we enter a Megatron-LM checkout that nobody has touched."""
