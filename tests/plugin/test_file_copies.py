"""Parts of files in tensors."""

import threading

import pytest
import torch

from megatron_ru.plugin import file_copies
from megatron_ru.plugin.file_copies import FilePart, copy_parts, in_threads


@pytest.fixture
def written(tmp_path):
    """A file of 10 000 numbers, and they."""
    numbers = torch.arange(10_000, dtype=torch.int32)
    (tmp_path / "numbers").write_bytes(numbers.numpy().tobytes())
    return tmp_path / "numbers", numbers


@pytest.mark.parametrize("threads", [1, 3])
def test_each_target_holds_its_part(written, threads, monkeypatch):
    path, numbers = written
    # Parts that are no multiple of a chunk, and one smaller than it.
    monkeypatch.setattr(file_copies, "CHUNK_BYTES", 1000)
    places = {0: (7, 11), 4001: (123,), 9_999: ()}
    targets = {first: torch.full(shape, -1, dtype=torch.int32) for first, shape in places.items()}
    weight = torch.nn.Parameter(torch.zeros(500))
    parts = [FilePart(path=path, first=4 * first, target=target) for first, target in targets.items()]
    parts += [FilePart(path=path, first=400, target=weight), FilePart(path=path, first=0, target=torch.empty(0, 3))]
    copy_parts(parts, threads=threads)
    for first, target in targets.items():
        assert torch.equal(target.flatten(), numbers[first : first + target.numel()])
    assert torch.equal(weight.detach().view(torch.int32), numbers[100:600])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_whatever_the_numbers(tmp_path, dtype):
    numbers = (torch.randn(33, 17) > 0).to(dtype)
    (tmp_path / "file").write_bytes(numbers.view(torch.uint8).numpy().tobytes())
    target = torch.empty(33, 17, dtype=dtype)
    copy_parts([FilePart(path=tmp_path / "file", first=0, target=target)], threads=2)
    assert torch.equal(target, numbers)


def test_a_file_that_ends_too_early_is_an_error(written):
    path, _ = written
    with pytest.raises(OSError, match=r"numbers ends at byte 40000, expected 4 more"):
        copy_parts([FilePart(path=path, first=39_600, target=torch.empty(101))], threads=2)
    with pytest.raises(FileNotFoundError):
        copy_parts([FilePart(path=path.with_name("other"), first=0, target=torch.empty(1))], threads=2)


def test_threads_work_at_once():
    barrier, passed = threading.Barrier(3, timeout=20), []
    in_threads(lambda: passed.append(barrier.wait()), 3)
    assert sorted(passed) == [0, 1, 2]
    in_threads(lambda: passed.append(3), 1)
    assert passed[3:] == [3]
