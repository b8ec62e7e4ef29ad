"""Cross entropy over a vocabulary that two gloo processes share, against one process that has it all."""

import multiprocessing

import pytest
import torch

VOCAB, ROWS, HIDDEN = 38, (5, 3), 16


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, VOCAB, ROWS, generator=generator)
    target[0, 0], target[1, 1] = -100, VOCAB - 1
    upstream = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return x, weight, bias, target, upstream


SETTINGS = {"label_smoothing": 0.1, "z_loss": 1e-3}


def run(dtype, group, rank, ranks, words):
    """(losses, gradient of the logits, loss and gradients of the linear layer and x), of this rank's columns."""
    from megatron_ru.ops import backend
    from megatron_ru.ops.cross_entropy import vocab_parallel_cross_entropy
    from megatron_ru.ops.linear_cross_entropy import linear_cross_entropy

    x, weight, bias, target, upstream = inputs(dtype)
    mine = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)
    found = {}
    with backend.only(words):
        for in_place in (False, True):
            logits = torch.nn.functional.linear(x, weight, bias)[..., mine].clone().requires_grad_()
            losses = vocab_parallel_cross_entropy(logits, target, group, in_place=in_place, **SETTINGS)
            (gradient,) = torch.autograd.grad(losses, logits, upstream.to(losses.dtype))
            found[f"losses {in_place}"], found[f"gradient {in_place}"] = losses.detach(), gradient
        leaves = [x.requires_grad_(), weight[mine].clone().requires_grad_(), bias[mine].clone().requires_grad_()]
        loss, tokens = linear_cross_entropy(
            leaves[0], leaves[1], target, bias=leaves[2], group=group, rows_per_chunk=4,
            token_weights=upstream.abs().to(torch.promote_types(dtype, torch.float32)), **SETTINGS,
        )  # fmt: skip
        (loss * 3).backward()
    found |= {"loss": loss.detach(), "tokens": tokens, "x": leaves[0].grad, "weight": leaves[1].grad}
    return found | {"bias": leaves[2].grad}


def one_rank(rank, store, dtype, words, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        answers.put(
            (
                rank,
                {
                    name: tensor.numpy()
                    for name, tensor in run(dtype, torch.distributed.group.WORLD, rank, 2, words).items()
                },
            )
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("words", ["all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_processes_give_what_one_gives(tmp_path, dtype, words):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=one_rank, args=(rank, tmp_path / "store", dtype, words, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    parts = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    whole = run(dtype, None, 0, 1, words)
    # Sums over columns are taken in another order.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, expected in whole.items():
        halves = [torch.from_numpy(parts[rank][name]) for rank in range(2)]
        if name in ("gradient False", "gradient True"):
            found = torch.cat(halves, dim=-1)
        elif name in ("weight", "bias"):
            found = torch.cat(halves, dim=0)
        else:
            assert torch.equal(*halves)
            found = halves[0]
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance * max(1, expected.abs().max().item())
        )
