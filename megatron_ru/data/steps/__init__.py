"""The steps, one to a module; each registers itself in `megatron_ru.data.step.STEPS`."""
