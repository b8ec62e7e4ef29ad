"""Where torch.save puts the numbers of a tensor."""

import os

import pytest
import torch

from megatron_ru.plugin.tensor_archives import UnknownArchive, locate


def placed(tmp_path, saved, before=b"something else"):
    """The archive of `saved` behind other bytes in a file: (open descriptor, first byte, length)."""
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.write(before)
        torch.save(saved, stream)
        end = stream.tell()
        stream.write(b"and more")
    return os.open(path, os.O_RDONLY), len(before), end - len(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (2, 3, 4)])
def test_the_numbers_lie_where_it_says(tmp_path, dtype, shape):
    numbers = (10 * torch.randn(shape)).to(dtype)
    place = placed(tmp_path, numbers)
    found = locate(*place)
    assert (found.dtype, found.shape) == (dtype, shape)
    read = os.pread(place[0], numbers.numel() * dtype.itemsize, found.first)
    assert torch.equal(torch.frombuffer(bytearray(read), dtype=dtype).view(shape), numbers)
    os.close(place[0])


def test_a_view_of_more_is_found_at_its_place(tmp_path):
    numbers = torch.arange(24.0).view(4, 6)
    descriptor, first, length = placed(tmp_path, numbers[2:])
    read = os.pread(descriptor, 48, locate(descriptor, first, length).first)
    assert torch.frombuffer(bytearray(read), dtype=torch.float32).tolist() == list(range(12, 24))


@pytest.mark.parametrize(
    "saved",
    [torch.zeros(3, 4).t(), torch.zeros(4, 6)[:, :3], torch.nn.Parameter(torch.zeros(3)), {"a": 1},
     torch.zeros(3).to_sparse(), torch.zeros(2, dtype=torch.float8_e4m3fn)],
    ids=["transposed", "columns", "parameter", "dictionary", "sparse", "float8"],
)  # fmt: skip
def test_the_rest_is_torch_s(tmp_path, saved):
    with pytest.raises(UnknownArchive):
        locate(*placed(tmp_path, saved))


def test_no_archive(tmp_path):
    (tmp_path / "file").write_bytes(b"PK" + bytes(500))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(UnknownArchive):
        locate(descriptor, 0, 502)


def test_a_pickle_calls_nothing(tmp_path):
    class Calling:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(UnknownArchive, match="mkdir"):
        locate(*placed(tmp_path, Calling()))
    assert not (tmp_path / "made").exists()
