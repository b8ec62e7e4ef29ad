"""Train a GPT model: Megatron-LM's arguments, plus --ru-variant, on GPUs or on the CPU."""

SUMMARY = "train a model with Megatron-LM's arguments"


def run_raw(words: list[str]) -> int:
    """Trains; returns the exit code."""
    from megatron_ru.engines.megatron_core import main

    return main(words)
