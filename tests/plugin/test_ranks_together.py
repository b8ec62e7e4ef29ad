"""Leaving the process group."""

import pytest
import torch.distributed

from megatron_ru.plugin.ranks_together import leave_ranks


@pytest.mark.parametrize("there", [True, False])
def test_a_process_group_is_left_where_there_is_one(monkeypatch, there):
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: there)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    leave_ranks()
    assert left == [True] * there
