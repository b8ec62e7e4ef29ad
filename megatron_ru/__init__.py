"""LLaMA-style pretraining and Russian adaptation on an unmodified Megatron-Core."""

__version__ = "0.1.0"
