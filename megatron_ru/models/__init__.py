"""What a model is (variants) and how it is put together."""
