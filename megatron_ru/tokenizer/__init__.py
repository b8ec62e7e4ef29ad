"""Training, loading and judging tokenizers."""
