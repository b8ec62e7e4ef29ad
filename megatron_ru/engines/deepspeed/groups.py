"""Megatron's process groups as DeepSpeed asks for them."""

from typing import Any

from megatron.core import parallel_state


class Groups:
    """What DeepSpeed calls `mpu`. Model parallel means tensor parallel here: there are no pipeline stages."""

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold the same weights and see other data."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """How many these are."""
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        """The place of this rank among them."""
        return self.get_data_parallel_group().rank()

    def get_data_parallel_src_rank(self) -> int:
        """The global rank of the first of them."""
        return self.get_data_parallel_group_ranks()[0]

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        import torch.distributed

        return torch.distributed.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold one model together."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """How many these are."""
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        """The place of this rank among them."""
        return self.get_model_parallel_group().rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
