import torch

from megatron_ru.benchmarks import ceiling


def test_bytes_read_and_written_over_the_fastest_copy(monkeypatch):
    monkeypatch.setattr(ceiling, "_CPU_BYTES", 1000)
    seconds = iter([4e-6, 1e-6, 2e-6])
    monkeypatch.setattr(ceiling, "_seconds", lambda source, target: next(seconds))
    assert ceiling.copy_ceiling("cpu", repeats=3) == 2 * 1000 / 1e-6 / 1e9


def test_what_is_timed_is_a_copy(monkeypatch):
    monkeypatch.setattr(ceiling, "_CPU_BYTES", 4096)
    assert 0.001 < ceiling.copy_ceiling("cpu", repeats=2) < 10_000
    source, target = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    assert ceiling._seconds(source, target) > 0
    assert torch.equal(source, target)
