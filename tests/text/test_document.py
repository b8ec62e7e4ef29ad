import dataclasses

import pytest

from megatron_ru.text.document import Document


def test_a_document_tells_its_place_and_cannot_be_changed():
    document = Document(text="слово", file="a/ru.jsonl.gz", line=7)
    assert document.place == "a/ru.jsonl.gz:7"
    assert document.fields == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.text = "другое"
