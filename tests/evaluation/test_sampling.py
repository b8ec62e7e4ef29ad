import pytest
import torch

from megatron_ru.evaluation.sampling import (
    SamplingSettings,
    choose_token,
    continue_text,
    decode_continuation,
    draw_tokens,
)
from megatron_ru.foundation.errors import UserError
from megatron_ru.tokenizer.loading import load_tokenizer
from megatron_ru.tokenizer.training import TokenizerSettings, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "ru.model"
    train_tokenizer(["берёза — дерево", "дуб — дерево"] * 20, path, TokenizerSettings(vocab_size=300))
    return load_tokenizer(path)


def drawn(probabilities, count=2000, **settings):
    """The ids that come up in many draws, with their frequencies."""
    generator = torch.Generator().manual_seed(3)
    chosen = SamplingSettings(**settings)
    logits = torch.tensor(probabilities).log()
    counts = torch.bincount(
        torch.tensor([choose_token(logits, chosen, generator) for _ in range(count)]), minlength=len(probabilities)
    )
    return (counts / count).tolist()


def test_temperature_one_draws_from_the_model():
    assert drawn([0.5, 0.3, 0.2], temperature=1.0, top_p=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_temperature_sharpens():
    # Squared and normalised: 0.25, 0.09, 0.04 of 0.38.
    assert drawn([0.5, 0.3, 0.2], temperature=0.5, top_p=1.0) == pytest.approx([0.658, 0.237, 0.105], abs=0.04)


def test_temperature_zero_takes_the_likeliest():
    assert drawn([0.2, 0.45, 0.35], count=20, temperature=0.0) == [0.0, 1.0, 0.0]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert drawn([0.2, 0.5, 0.3], temperature=1.0, top_p=0.6) == pytest.approx([0.0, 0.625, 0.375], abs=0.04)
    assert drawn([0.2, 0.5, 0.3], count=50, temperature=1.0, top_p=0.01) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "--tokens is 0, expected at least 1"),
        ({"temperature": -1.0}, "--temperature is -1.0, expected 0 (the likeliest token) or more"),
        ({"top_p": 0.0}, "--top-p is 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p is 1.5, expected more than 0 and at most 1"),
    ],
)
def test_impossible_settings(wrong, message):
    with pytest.raises(UserError) as raised:
        SamplingSettings(**wrong)
    assert str(raised.value) == message


def counting(seen):
    """A model that says the id after the last one, and notes what it saw."""

    def next_logits(tokens):
        seen.append(tokens[0].tolist())
        return torch.nn.functional.one_hot((tokens[0, -1] + 1) % 12, 12).float() * 100

    return next_logits


def test_the_model_sees_the_last_tokens_of_its_context():
    seen = []
    ids = draw_tokens(counting(seen), [4, 5, 6], 3, 12, None, SamplingSettings(tokens=3, temperature=0))
    assert ids == [7, 8, 9]
    assert seen == [[4, 5, 6], [5, 6, 7], [6, 7, 8]]


def test_the_end_token_ends_it_and_is_left_out():
    assert draw_tokens(counting([]), [4], 8, 12, 7, SamplingSettings(tokens=9, temperature=0)) == [5, 6]


def test_padding_rows_are_never_drawn():
    # After 5 the model wants 6, which is no id of a vocabulary of 6; all others are equally unlikely.
    assert max(draw_tokens(counting([]), [5], 8, 6, None, SamplingSettings(tokens=20, temperature=1.0))) < 6


def test_the_same_seed_draws_the_same():
    def flat(tokens):
        return torch.zeros(50)

    one, same, other = (
        draw_tokens(flat, [1], 8, 50, None, SamplingSettings(tokens=20, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_continuation_keeps_the_space_before_its_first_word(tokenizer):
    before, whole = tokenizer.encode("берёза —"), tokenizer.encode("берёза — дерево")
    assert whole[: len(before)] == before
    assert decode_continuation(tokenizer, before, whole[len(before) :]) == " дерево"


def test_half_a_character_is_left_out(tokenizer):
    # Ж is not in this vocabulary: two bytes, of which the second has not been drawn yet.
    start, letter = tokenizer.encode("дуб"), tokenizer.encode("дубЖ")
    assert len(letter) == len(start) + 2
    assert decode_continuation(tokenizer, start, letter[len(start) :]) == "Ж"
    assert decode_continuation(tokenizer, start, letter[len(start) : -1]) == ""


def test_text_is_continued(tokenizer):
    target = [*tokenizer.encode("берёза — дерево"), tokenizer.eod]

    def recite(tokens):
        return torch.nn.functional.one_hot(torch.tensor(target[tokens.shape[1]]), tokenizer.vocab_size).float() * 100

    greedy = SamplingSettings(temperature=0)
    assert continue_text(recite, tokenizer, "берёза", 64, greedy) == " — дерево"
    # The model would see another token for the space than the one that begins a word.
    assert continue_text(recite, tokenizer, "берёза — ", 64, greedy) == "дерево"


def test_an_empty_prompt_begins_a_document(tokenizer):
    seen = []

    def ends_at_once(tokens):
        seen.append(tokens.tolist())
        return torch.nn.functional.one_hot(torch.tensor(tokenizer.eod), tokenizer.vocab_size).float() * 100

    assert continue_text(ends_at_once, tokenizer, "", 64, SamplingSettings(temperature=0)) == ""
    assert seen == [[[tokenizer.eod]]]
