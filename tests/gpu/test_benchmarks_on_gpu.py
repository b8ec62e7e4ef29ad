"""The clocks of the benchmark on a real GPU, and one op from end to end."""

import pytest
import torch

from megatron_ru.benchmarks.op_benchmark import Settings, run
from megatron_ru.benchmarks.result import OURS
from megatron_ru.benchmarks.timing import CLOCKS

pytestmark = pytest.mark.gpu


class Copies:
    """Copies of a quarter of a gigabyte into buffers taken in turn."""

    rotation, most = 2, 100

    def __init__(self):
        self.source = torch.zeros(2**26, dtype=torch.float32, device="cuda")
        self.targets = [torch.empty_like(self.source) for _ in range(self.rotation)]

    def steps(self, count):
        # A kernel, not a copy: inside a graph copies go another way.
        return [lambda target=target: torch.neg(self.source, out=target) for target in (self.targets * count)[:count]]


def test_clocks_agree_about_a_long_copy():
    found = {name: clock().measure(Copies(), seconds=0.1).microseconds for name, clock in CLOCKS.items()}
    assert max(found.values()) < 1.1 * min(found.values()), found
    assert 300 < 2 * 2**28 / found["queued"] / 1e3 < 10_000


@pytest.mark.parametrize("timing", sorted(CLOCKS))
def test_an_op_from_end_to_end(timing):
    settings = Settings(only=("rms_norm",), against=("torch",), tokens=(8192,), hidden=(2560,), timing=timing)
    ours, theirs = run(settings).rows
    assert (ours.contender, theirs.contender) == (OURS, "torch")
    for row in (ours, theirs):
        assert row.status == "ok", row.note
        assert row.timed == timing, row.note
        assert row.accuracy.good
        assert row.forward.microseconds < row.both.microseconds
    # Statistics, the weight and its gradient, and partial sums: a hundredth of the tensors.
    assert ours.extra_bytes < 8_000_000
    assert 0 < ours.host_microseconds < 1000
