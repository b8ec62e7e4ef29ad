"""Keeping pieces of a unigram model out of text."""

from typing import Any


def out_of_reach(vocabulary: list[list[Any]], pieces: set[str]) -> list[list[Any]]:
    """The vocabulary [[piece, score]] of a unigram model in which `pieces` score less than their characters one by one.

    tokenizers would find a piece such as `</s>` in a text and take it, for its score of 0 is the best there is.
    """
    lowest = min((score for text, score in vocabulary if text not in pieces), default=0.0)
    return [[text, lowest * (len(text) + 1) - 10.0 if text in pieces else score] for text, score in vocabulary]
