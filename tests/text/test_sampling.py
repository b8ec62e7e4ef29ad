import random

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.text.document import Document
from megatron_ru.text.sampling import SampleSettings, draw_sample, parse_characters, parse_weights


def documents(count=2000):
    generator = random.Random(1)
    return [
        Document(
            text=f"{number} " + "x" * generator.randrange(20, 200),
            file=f"/a/{'ru' if number % 3 else 'en'}_1.jsonl.gz",
            fields={"domain": "books" if number % 4 else "news"},
        )
        for number in range(count)
    ]  # fmt: skip


def test_domains_have_their_shares_of_characters():
    settings = SampleSettings(characters=20_000, weights={"books": 1, "news": 3})
    sample = draw_sample(documents(), settings)
    assert {domain: share.wanted for domain, share in sample.shares.items()} == {"books": 5000, "news": 15_000}
    for share in sample.shares.values():
        assert share.wanted <= share.drawn < share.wanted + 220
    assert sum(map(len, sample.texts)) == sum(share.drawn for share in sample.shares.values())
    assert len(sample.texts) == sum(share.documents for share in sample.shares.values())
    news = {document.text for document in documents() if document.fields["domain"] == "news"}
    assert sum(len(text) for text in sample.texts if text in news) == sample.shares["news"].drawn


def test_the_order_of_the_text_does_not_matter():
    shuffled = documents()
    random.Random(5).shuffle(shuffled)
    settings = SampleSettings(characters=20_000, weights={"books": 1, "news": 1})
    assert draw_sample(shuffled, settings).texts == draw_sample(documents(), settings).texts


def test_a_larger_sample_contains_the_smaller_and_another_seed_is_another_sample():
    small, large = (set(draw_sample(documents(), SampleSettings(characters=size)).texts) for size in (5000, 20_000))
    assert small < large
    other = set(draw_sample(documents(), SampleSettings(characters=5000, seed=2)).texts)
    assert len(small & other) < 0.3 * len(small)


def test_every_document_has_the_same_chance():
    drawn = [0] * 200
    texts = [f"{number:03} " + "x" * 96 for number in range(200)]
    for seed in range(300):
        settings = SampleSettings(characters=4000, seed=seed)
        for text in draw_sample((Document(text=text) for text in texts), settings).texts:
            drawn[int(text[:3])] += 1
    # 40 of 200, 300 times: 60 each on average, a standard deviation of 6.9.
    assert sum(drawn) == 300 * 40
    assert min(drawn) > 30
    assert max(drawn) < 95


def test_names_of_files_may_be_domains_and_others_are_left_out():
    sample = draw_sample(documents(), SampleSettings(characters=3000, weights={"ru_1": 0.5}, domain_field="file"))
    assert sample.left_out == 667
    assert all(int(text.split()[0]) % 3 for text in sample.texts)


def test_a_domain_that_is_too_small_gives_all_it_has():
    sample = draw_sample(documents(20), SampleSettings(characters=10**6, weights={"books": 1, "news": 1}))
    assert sorted(sample.texts) == sorted(document.text for document in documents(20))
    assert sample.shares["news"].drawn < sample.shares["news"].wanted


def test_a_domain_without_documents_is_a_mistake():
    with pytest.raises(UserError, match=r"no document has domain 'wiki', which has a weight \(others found: 'books'"):
        draw_sample(documents(), SampleSettings(characters=100, weights={"wiki": 1}))


def test_any_number_is_a_seed():
    drawn = [draw_sample(documents(), SampleSettings(characters=100, seed=seed)).texts for seed in (-1, 10**25)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"characters": 0}, "the sample has 0 characters"),
        ({"characters": 1, "weights": {"a": 0}}, "the weight of 'a' is 0; it must be a positive number"),
        ({"characters": 1, "weights": {"a": float("inf")}}, "the weight of 'a' is inf"),
    ],
)
def test_settings_check_themselves(wrong, message):
    with pytest.raises(UserError, match=message):
        SampleSettings(**wrong)


def test_sizes_and_weights_as_they_are_typed():
    assert [parse_characters(text) for text in ("500", "1.5K", "200m", "2G")] == [500, 1500, 2 * 10**8, 2 * 10**9]
    assert parse_weights("ru=0.7, en=3,") == {"ru": 0.7, "en": 3.0}
    assert parse_weights("a=b=1") == {"a=b": 1.0}
    for text in ("", "many", "1e999"):
        with pytest.raises(UserError, match="is no number of characters"):
            parse_characters(text)
    for text in ("ru", "ru=x", "=1", "a=1,a=2"):
        with pytest.raises(UserError, match="is not of the form DOMAIN=WEIGHT"):
            parse_weights(text)
