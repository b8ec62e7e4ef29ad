"""Files that come to a GPU, and a benchmark of starts there."""

import pytest
import torch

from megatron_ru.benchmarks.restart import Settings, run
from megatron_ru.benchmarks.restart_case import find_size
from megatron_ru.plugin.file_copies import CHUNK_BYTES, FilePart, copy_parts
from megatron_ru.plugin.warm_up import warm_up

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("threads", [1, 4])
def test_parts_of_files_come_to_the_device(tmp_path, threads):
    numbers = torch.randint(0, 255, (3 * CHUNK_BYTES + 12_345,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(numbers.numpy().tobytes())
    targets = {first: torch.empty(size, dtype=torch.uint8, device="cuda")
               for first, size in ((0, numbers.numel()), (17, 3), (CHUNK_BYTES - 1, 2 * CHUNK_BYTES))}  # fmt: skip
    parts = [FilePart(path=tmp_path / "file", first=first, target=target) for first, target in targets.items()]
    copy_parts(parts, threads=threads)
    for first, target in targets.items():
        assert torch.equal(target.cpu(), numbers[first : first + target.numel()])


def test_the_random_state_of_the_device_is_left_alone():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    warm_up(torch.cuda.current_device())
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.slow
def test_starts_are_measured(tmp_path):
    settings = Settings(size=find_size("4x1024x2816"), device="cuda", optimizer="adamw", folder=tmp_path)
    results = run(settings, "", print)
    for case in results.cases:
        assert 0 < case["built"]["gpu_bytes"] <= case["stepped"]["gpu_bytes"]
    assert results.load_ratio is not None
