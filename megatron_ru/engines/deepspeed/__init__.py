"""A DeepSpeedEngine inside Megatron's training loop (`--engine deepspeed`); nothing here is imported without it."""
