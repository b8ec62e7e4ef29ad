"""What the words of a command line say before a parser has read them."""

from collections.abc import Sequence


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, as `--flag VALUE` or `--flag=VALUE`; None where it is not given."""
    found = None
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found
