"""How much memory a GPU has left for the activations of a stage, before the first step."""

from typing import Any

import torch

from megatron_ru.ops.backend import selected

_RESERVE = 0.08
"""Of the whole memory: fragments, NCCL's buffers, what the first steps choose as workspaces."""
_STATE_BYTES = {"sgd": 4}
_ADAM_STATE_BYTES = 8


def free_for_activations(args: Any, optimizer: Any, *, beyond: int, computes_loss: bool) -> dict[str, int]:
    """Bytes that are free on this GPU, and with negative signs what will still be taken of them; their sum is left for
    activations. `beyond` is what a layer's backward pass takes for itself."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    taken = {
        "optimizer": optimizer_bytes(optimizer, _STATE_BYTES.get(args.optimizer, _ADAM_STATE_BYTES)),
        "loss": loss_bytes(args) if computes_loss else 0,
        "backward of a layer": beyond,
        "kept back": int(_RESERVE * total),
    }
    return {"free": free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()} | {
        name: -size for name, size in taken.items()
    }


def optimizer_bytes(optimizer: Any, state_bytes: int) -> int:
    """What the first step will allocate for state: `state_bytes` for each parameter that has none yet."""
    return sum(
        parameter.numel() * state_bytes
        for each in getattr(optimizer, "chained_optimizers", [optimizer])
        # Megatron's optimizers hold torch's.
        if (held := getattr(each, "optimizer", None)) is not None
        for group in held.param_groups
        for parameter in group["params"]
        if parameter not in held.state
    )


def loss_bytes(args: Any) -> int:
    """Logits of a micro-batch and what the loss makes of them, on one rank."""
    logits: int = args.micro_batch_size * args.seq_length * args.padded_vocab_size // args.tensor_model_parallel_size
    size: int = args.params_dtype.itemsize
    # Our op writes the gradient over the logits, which are then read once more in the product; otherwise there are a
    # copy in fp32, its exponentials and their gradient.
    return logits * (2 * size if "cross_entropy" in selected() else size + 12)
