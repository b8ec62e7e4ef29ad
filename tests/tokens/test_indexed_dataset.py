import errno
import os
import struct

import numpy as np
import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.tokens import indexed_dataset
from megatron_ru.tokens.indexed_dataset import (
    DatasetSummary,
    IndexedDataset,
    check_dataset,
    max_token,
    token_dtype,
    write_dataset,
)

DOCUMENTS = [[5, 6, 2], [], [7, 2], [319, 8, 9, 2], []]


def write(prefix, documents=DOCUMENTS, vocab_size=320):
    with write_dataset(prefix, vocab_size) as writer:
        # In two calls, as the batches of a pipeline come.
        for part in (documents[:2], documents[2:]):
            ids = np.array([token for document in part for token in document], dtype=writer.dtype)
            writer.add_documents(ids, np.array([len(document) for document in part], dtype=np.int32))
    return prefix


def test_what_a_killed_run_left_is_cleared_away_and_nothing_else(tmp_path):
    for name in (".a.bin.x1.partial", ".a.idx.x2.partial", ".ab.bin.x3.partial", "a.bin.partial"):
        (tmp_path / name).write_bytes(b"1")
    write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".ab.bin.x3.partial", "a.bin", "a.bin.partial", "a.idx",
    ]  # fmt: skip


def edit(path, offset: int, content: bytes):
    changed = bytearray(path.read_bytes())
    changed[offset : offset + len(content)] = content
    path.write_bytes(changed)


def test_the_bytes_are_those_of_the_format(tmp_path):
    write(tmp_path / "a")
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<9H", 5, 6, 2, 7, 2, 319, 8, 9, 2)
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 6) + struct.pack("<3i", 3, 2, 4)
        + struct.pack("<3q", 0, 6, 10) + struct.pack("<6q", 0, 1, 1, 2, 3, 3)
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [320, 100_000])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[1]], [[], [3, 2]]])
def test_megatron_writes_the_same_files_and_reads_ours(tmp_path, documents, vocab_size):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours", documents, vocab_size)
    dtype = theirs.DType.optimal_dtype(vocab_size)
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = theirs.IndexedDataset(str(tmp_path / "ours"))
    assert [read[index].tolist() for index in range(len(read))] == [document for document in documents if document]


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 256_000])
def test_the_dtype_is_megatrons_choice(vocab_size):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert token_dtype(vocab_size) == np.dtype(theirs.DType.optimal_dtype(vocab_size))


def test_what_is_written_can_be_read(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "a"))
    assert len(dataset) == 3
    assert dataset.documents == 5
    assert [dataset.document(number).tolist() for number in range(5)] == DOCUMENTS
    assert dataset[1].tolist() == [7, 2]
    assert dataset.dtype == np.uint16


def test_pieces_smaller_than_the_dataset_change_nothing(tmp_path, monkeypatch):
    documents = [[number % 300] * (number % 4) for number in range(50)]
    write(tmp_path / "a", documents)
    monkeypatch.setattr(indexed_dataset, "_CHUNK", 3)
    write(tmp_path / "b", documents)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert check_dataset(tmp_path / "b", 300).tokens == sum(map(len, documents))
    edit(tmp_path / "b.idx", 34 + 4 * 37 + 8 * 20, struct.pack("<q", 1))
    with pytest.raises(UserError, match="its sequences do not follow one another"):
        check_dataset(tmp_path / "b")


def test_a_whole_dataset_is_summed_up(tmp_path):
    write(tmp_path / "a")
    whole = DatasetSummary(documents=5, sequences=3, tokens=9, dtype="uint16", bytes=18, max_token=None)
    assert check_dataset(tmp_path / "a") == whole
    assert check_dataset(tmp_path / "a", 320).max_token == 319


def test_modes_of_a_multimodal_dataset_are_accepted(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes() + b"\0" * 3)
    assert check_dataset(tmp_path / "a").tokens == 9


def test_ids_beyond_the_vocabulary_are_found(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(UserError, match=r"a\.bin holds the token id 319, but the vocabulary has 319 ids"):
        check_dataset(tmp_path / "a", 319)


def test_negative_ids_are_found(tmp_path):
    write(tmp_path / "a", [[1, 2]], vocab_size=100_000)
    edit(tmp_path / "a.bin", 0, struct.pack("<i", -5))
    with pytest.raises(UserError, match="holds the token id -5; ids begin at 0"):
        max_token(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, suffix):
    write(tmp_path / "a")
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(UserError, match=rf"there is no \S*a{suffix}; a dataset is a pair"):
        check_dataset(tmp_path / "a")


def test_two_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no \S*a\.bin and no \S*a\.idx"):
        check_dataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"TNTIDX", "is no index of a Megatron dataset: it begins with b'TNTIDXX"),
        (9, struct.pack("<Q", 2), "has the index version 2; only version 1"),
        (17, b"\x09", "has the dtype code 9; known are 1 to 8"),
        (17, b"\x07", r"its elements are float32; token ids are whole numbers"),
        (
            18,
            struct.pack("<Q", 4),
            r"is truncated: 4 sequences and 6 document boundaries take 130 bytes, .* 118",
        ),
        (18, struct.pack("<Q", 1 << 63), "is truncated"),
        (18, struct.pack("<Q", 2), "is damaged: 2 sequences"),
        (34, struct.pack("<i", -3), "its sequences do not follow one another"),
        (46, struct.pack("<q", 2), "its sequences do not follow one another"),
        (70, struct.pack("<q", 1), "document boundaries do not rise from 0 to the 3 sequences"),
        (78, struct.pack("<q", 3), "document boundaries do not rise"),
        (110, struct.pack("<q", 4), "document boundaries do not rise"),
    ],
)
def test_a_damaged_index_is_found(tmp_path, offset, content, message):
    write(tmp_path / "a")
    edit(tmp_path / "a.idx", offset, content)
    if content == b"\x07":
        # So that the size agrees.
        (tmp_path / "a.bin").write_bytes(bytes(36))
        edit(tmp_path / "a.idx", 46, struct.pack("<3q", 0, 12, 20))
    with pytest.raises(UserError, match=message):
        check_dataset(tmp_path / "a", 320)


@pytest.mark.parametrize("size", [0, 20, 33, 34, 60, 117])
def test_a_truncated_index_is_found(tmp_path, size):
    write(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:size])
    with pytest.raises(UserError, match=rf"a\.idx is truncated: .*{size}"):
        check_dataset(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 1, 17])
def test_a_truncated_bin_is_found(tmp_path, size):
    write(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", size)
    with pytest.raises(UserError, match=rf"a\.bin is truncated: its index promises 18 bytes .* has {size};"):
        check_dataset(tmp_path / "a")


def test_a_bin_of_another_index_is_found(tmp_path):
    write(tmp_path / "a")
    with (tmp_path / "a.bin").open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(UserError, match=r"does not belong to its index: the index promises 18 bytes .* has 20"):
        check_dataset(tmp_path / "a")


def test_the_prefix_has_no_suffix(tmp_path):
    for suffix in (".bin", ".idx"):
        with pytest.raises(UserError, match=r"give their common prefix \S*/a$"):
            check_dataset(f"{tmp_path}/a{suffix}")
    with pytest.raises(UserError, match="is no prefix of a dataset"):
        check_dataset(f"{tmp_path}/")


def test_a_failure_leaves_nothing_new_and_the_old_untouched(tmp_path):
    write(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail():
        with write_dataset(tmp_path / "a", 320) as writer:
            writer.add_documents(np.ones(3, np.uint16), np.array([3], np.int32))
            raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_older_dataset_is_replaced(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "a", [[1, 2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert check_dataset(tmp_path / "a").tokens == 2


def test_a_crash_between_the_two_files_leaves_no_index(tmp_path, monkeypatch):
    write(tmp_path / "a")
    replace = os.replace

    def crash(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[1, 2]])
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space is left for \S*a\.bin .*nothing was kept: free some space in"):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write \S*file/a\.bin: (Not a directory|File exists)"):
        write(tmp_path / "file" / "a")
