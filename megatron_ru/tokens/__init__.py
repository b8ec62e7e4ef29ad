"""From documents to token ids on disk, in the format that Megatron reads."""
