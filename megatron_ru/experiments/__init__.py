"""Whole experiments on small models: the demo and the ladder, each from text to figure.

Training happens in processes of their own (`python -m megatron_ru.pretrain_gpt`), so nothing here imports torch.
"""
