"""Flags read before a parser has read them."""

from megatron_ru.foundation.words import value_of


def test_the_last_value_counts():
    words = ["--load", "a", "--lr", "1", "--load=b", "--save"]
    assert value_of(words, "--load") == "b"
    assert value_of(words, "--save") is None
    assert value_of(words, "--tp") is None
