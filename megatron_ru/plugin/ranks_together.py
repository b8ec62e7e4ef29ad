"""Decisions that all ranks of a run make together, over Megatron's default group."""

import torch.distributed


def ranks_have_met() -> bool:
    """Whether there is a process group to decide in."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_ranks() -> None:
    """Ends the process group where there is one; threads of gloo that outlive it abort the process now and then."""
    if ranks_have_met():
        torch.distributed.destroy_process_group()


class RanksTogether:
    """`checkpoints.ranks.Ranks` of this process; one process is alone."""

    def __init__(self) -> None:
        met = ranks_have_met()
        self.rank = torch.distributed.get_rank() if met else 0
        self.size = torch.distributed.get_world_size() if met else 1

    def first[Value](self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all[Value](self, value: Value) -> list[Value]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Value] = [value] * self.size
        torch.distributed.all_gather_object(values, value)
        return values
