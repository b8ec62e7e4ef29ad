"""Datasets, batches and the loss of GPT pretraining, as Megatron's loop asks for them."""

from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin.nan_gradients import current_nan_gradients


class Batch(NamedTuple):
    """One micro-batch; every tensor is [batch, sequence] but the mask, and all are None on middle stages."""

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    """[batch, 1, sequence, sequence], True hides; None means causal."""


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The training, validation and test datasets with the given numbers of samples."""
    args = get_args()
    config = _dataset_config(args)
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, partial(_builds_datasets, vp_stage), config).build()


def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """(output of this stage, the loss function that the last stage applies to it)."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels, loss_mask=batch.loss_mask
    )
    return output, partial(loss_of, batch.loss_mask)


def loss_of(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses of real tokens, their number, the pair for the log).

    losses: [batch, sequence]; Megatron divides the sum by the number, over all data-parallel ranks in the log.
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejects, word in ((torch.isnan, "NaN"), (torch.isinf, "an infinity")):
            get_rerun_state_machine().validate_result(
                result=total, rejection_func=rejects, message=f"the loss of this rank is {word}",
                tolerance=0.0, fatal=True,
            )  # fmt: skip
    nan_gradients = current_nan_gradients()
    if nan_gradients is not None and torch.is_grad_enabled():
        return total, tokens, {"lm loss": nan_gradients.finite_loss(total, tokens)}
    return total, tokens, {"lm loss": torch.stack((total.detach(), tokens.to(total.dtype)))}


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> Batch:
    """The next micro-batch of this stage; tensor-parallel rank 0 reads it and tells the others."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return Batch()
    args = get_args()
    shape = (args.micro_batch_size, args.seq_length)
    device = torch.device("cuda", torch.cuda.current_device())
    reads = mpu.get_tensor_model_parallel_rank() == 0
    # Token ids, labels, mask and positions travel as one integer tensor: one broadcast instead of four.
    packed = torch.empty((4, *shape), dtype=torch.int64, device=device)
    mask = None
    if args.create_attention_mask_in_dataloader:
        mask = torch.empty((shape[0], 1, shape[1], shape[1]), dtype=torch.bool, device=device)
    if reads:
        sample = next(data_iterator)
        _check_vocabulary(sample["tokens"], sample["labels"], args.padded_vocab_size)
        for row, key in enumerate(("tokens", "labels", "loss_mask", "position_ids")):
            packed[row].copy_(sample[key], non_blocking=True)
        if mask is not None:
            mask.copy_(sample["attention_mask"], non_blocking=True)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(packed, source, group=group)
        if mask is not None:
            torch.distributed.broadcast(mask, source, group=group)
    tokens, labels, loss_mask, position_ids = packed.unbind()
    return Batch(tokens, labels, loss_mask.float(), position_ids, mask)


def _check_vocabulary(tokens: Tensor, labels: Tensor, vocab_size: int) -> None:
    """Raises `UserError` for an id that has no row in the embedding. With tensor parallelism Megatron would take a
    row of zeros for it and go on. The tensors are still in main memory: this costs microseconds."""
    highest = max(int(tokens.max()), int(labels.max()))
    if highest >= vocab_size:
        raise UserError(
            f"the data holds the token id {highest}, but the model has {vocab_size} ids (0 to {vocab_size - 1}): it "
            "was made with another tokenizer; tokenise it again with the one of --tokenizer-model"
        )


def _builds_datasets(vp_stage: int | None) -> bool:
    """Whether this rank reads data: tensor-parallel rank 0 of the first and of the last stage."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
