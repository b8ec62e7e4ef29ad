import pytest

from megatron_ru.tokenizer.fertility import (
    Fertility,
    digit_pieces,
    has_one_token_per_digit,
    measure_fertility,
)
from megatron_ru.tokenizer.loading import load_tokenizer


class ByTwos:
    """Every two characters are a token."""

    path, eod, vocab_size = "", None, 1

    def encode_batch(self, texts):
        return [[0] * -(-len(text) // 2) for text in texts]


def test_the_two_figures_of_known_text():
    # 13 and 3 characters, 3 words and 1, 7 tokens and 2.
    found = measure_fertility(ByTwos(), iter(["раз два\nтри  ", "сто", ""]))
    assert found == Fertility(documents=3, characters=16, bytes=28, words=4, tokens=9)
    assert found.characters_per_token == pytest.approx(16 / 9)
    assert found.bytes_per_token == pytest.approx(28 / 9)
    assert found.tokens_per_word == pytest.approx(9 / 4)


def test_nothing_at_all_is_no_division_by_zero():
    found = measure_fertility(ByTwos(), [])
    assert (found.characters_per_token, found.bytes_per_token, found.tokens_per_word) == (0.0, 0.0, 0.0)


def test_longer_pieces_with_digits_are_found(hugging_face_file):
    apart = load_tokenizer(hugging_face_file())
    assert has_one_token_per_digit(apart)
    together = load_tokenizer(hugging_face_file(digits=False))
    assert not has_one_token_per_digit(together)
    assert set("0123456789") < set(digit_pieces(together))


def test_control_tokens_with_digits_do_not_count(hugging_face_file):
    path = hugging_face_file(special=("<|endoftext|>", "<|reserved_12|>"))
    assert has_one_token_per_digit(load_tokenizer(path))
