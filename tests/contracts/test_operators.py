"""Each operator of the library as torch wants it: schema, gradients, fake tensors, tracing with dynamic sizes."""

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.ops.build import find_compiler
from megatron_ru.ops.op import OPS
from megatron_ru.ops.rope import rope_table
from tests.contracts.op_checks import same_bits


@pytest.fixture(autouse=True)
def _compiled():
    if backend.library_status().path is None:
        if find_compiler() is None:
            pytest.skip("no C++ compiler: the plain forms are all there is")
        pytest.fail(f"the compiled ops are not loaded: {backend.library_status().reason}")


def rows(*shape, seed=0, leaf=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(leaf)


def norm(name, dtype):
    x, residual, weight, bias = (
        rows(*shape, seed=n, dtype=dtype) for n, shape in enumerate(((3, 7), (3, 7), (7,), (7,)))
    )
    head = (x, residual) if name.startswith("add_") else (x,)
    tail = (weight, bias) if "layer" in name else (weight,)
    return [(*head, *tail, 1e-5, False), (*head, *tail[:1], *((None,) if "layer" in name else ()), 1e-5, True)]


def rope(name, dtype):
    q, k = rows(5, 2, 4, 8, dtype=dtype), rows(5, 2, 2, 8, seed=1, dtype=dtype)
    table = rope_table(16, 8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    positions = torch.arange(10).reshape(5, 2)
    tensors = {"rope": (q,), "rope_qk": (q, k), "rope_qk_": (q.detach(), k.detach())}[name]
    return [(*tensors, *table, None, 3, False, False), (*tensors, *table, positions, 1, True, True)]


def joined(name, dtype):
    q, k, v = (rows(5, 2, heads, 8, seed=heads, dtype=dtype, leaf=False) for heads in (4, 2, 2))
    table = rope_table(16, 8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [(q, k, v, *table, False, True), (q, k, v, *table, True, False)]


def embedding(name, dtype):
    ids = torch.tensor([3, 0, 3])
    return [(rows(4, 6, leaf=False), rows(3, 6, seed=1, dtype=dtype, leaf=False), ids)]


def activation(name, dtype):
    x, bias = rows(3, 10, dtype=dtype), rows(10, seed=1, dtype=dtype)
    return [(x, None, 6), (x, bias, 5), (x, bias, 1)]


def cross_entropy_settings(name, dtype):
    logits, target = rows(3, 2, 9, dtype=dtype), torch.tensor([[0, 8], [-100, 4], [2, 3]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain, statistics = (
        logits.detach(),
        torch.ops.megatron_ru.cross_entropy_statistics(logits.detach(), target, 0, True),
    )
    lse, upstream = plain.to(wide).logsumexp(-1).reshape(-1), torch.linspace(1, 2, 6, dtype=wide).reshape(3, 2)
    settings = (-100, 0.1, 1e-3)
    return {
        "cross_entropy": [(logits, target, None, *settings, False), (logits, target, None, *settings, True)],
        "cross_entropy_mean": [(logits, target, None, *settings), (logits, target, upstream[0, 0], *settings)],
        "cross_entropy_gradient_": [
            (plain.clone(), target, None, *settings),
            (plain.clone(), target, upstream, *settings),
        ],
        "cross_entropy_rescale_": [(plain.clone(), upstream, None), (plain.clone(), upstream[0, 0], upstream)],
        "cross_entropy_statistics": [(plain, target, 0, True), (plain, target, 9, False)],
        "cross_entropy_merge": [(statistics.unsqueeze(0), target, 9, *settings)],
        "cross_entropy_backward": [(upstream, plain, target, lse, 0, 9, *settings)],
        "cross_entropy_backward_": [(upstream, plain.clone(), target, lse, 0, 9, *settings)],
    }[name]


def lists(name, dtype):
    tensors = [[rows(4, 3, seed=seed, leaf=False), rows(5, seed=seed + 1, leaf=False)] for seed in range(3)]
    if name == "zero_nonfinite_":
        return [(tensors[0],)]
    squares, step = [tensor.square() for tensor in tensors[2]], torch.tensor(2.0)
    copies = [tensor.bfloat16() for tensor in tensors[0]]
    settings = (0.9, 0.99, 1e-8, 0.1, False)
    return [
        (tensors[0], tensors[1], tensors[2], squares, [], step, 1e-3, None, *settings, None, None),
        (tensors[0], tensors[1], tensors[2], squares, copies, step, 0.0, torch.tensor(1e-2), *settings,
         torch.tensor(8.0), torch.tensor(0.0)),
    ]  # fmt: skip


def packed(name, dtype):
    return [(torch.tensor([0, 3, 7]), 9), (torch.tensor([0, 3, 7], dtype=torch.int32), 7)]


MAKERS = {
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), norm),
    **dict.fromkeys(("rope", "rope_qk", "rope_qk_"), rope),
    "rope_join": joined,
    "embedding_gradient_": embedding,
    "packed_positions": packed,
    **dict.fromkeys(("activation", "activation_saving"), activation),
    "glu": lambda name, dtype: [(rows(3, 5, dtype=dtype), rows(3, 5, seed=1, dtype=dtype), 4)],
    **dict.fromkeys(
        ("cross_entropy", "cross_entropy_mean", "cross_entropy_gradient_", "cross_entropy_rescale_",
         "cross_entropy_statistics", "cross_entropy_merge", "cross_entropy_backward", "cross_entropy_backward_"),
        cross_entropy_settings,
    ),
    **dict.fromkeys(("zero_nonfinite_", "adamw_"), lists),
}  # fmt: skip


def test_every_operator_is_looked_at():
    assert MAKERS.keys() == {name for _, op in OPS.items() for name in op.torch_ops}


# These take lists of fp32 or whole numbers.
ONE_DTYPE = ("zero_nonfinite_", "adamw_", "packed_positions")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in MAKERS
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        if dtype == torch.float32 or name not in ONE_DTYPE
    ],
)
def test_opcheck(name, dtype):
    overload = getattr(torch.ops.megatron_ru, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # What overwrites its own input cannot be traced twice from one sample.
    if name == "activation_saving":
        tests.remove("test_aot_dispatch_dynamic")
    for arguments in MAKERS[name](name, dtype):
        torch.library.opcheck(overload, arguments, test_utils=tests)


def test_second_backward_of_a_written_gradient_is_an_error():
    """The first one handed the gradient out; the second would find it multiplied already."""
    logits = rows(4, 9)
    losses = torch.ops.megatron_ru.cross_entropy(logits, torch.arange(4), None, -100, 0.0, 0.0, True)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_gradient_of_a_gradient_is_an_error():
    """There is no second derivative, and none is invented."""
    x, weight = rows(3, 7), rows(7)
    y = torch.ops.megatron_ru.rms_norm(x, weight, 1e-5, False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_no_upstream_gradient_of_one_output():
    """Of norm and sum, only one may be used."""
    for used in (0, 1):
        x, residual, weight = rows(3, 7), rows(3, 7, seed=1), rows(7, seed=2)
        out = torch.ops.megatron_ru.add_rms_norm(x, residual, weight, 1e-5, False)
        out[used].square().sum().backward()
        expected = [t.detach().clone().requires_grad_() for t in (x, residual, weight)]
        total = expected[0] + expected[1]
        plain = (torch.nn.functional.rms_norm(total, (7,), expected[2], 1e-5), total)
        plain[used].square().sum().backward()
        for found, wanted in zip((x, residual, weight), expected, strict=True):
            if wanted.grad is None:
                assert found.grad is None or not found.grad.any()
            else:
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-5, False), "weight has sizes [4], expected [3]"),
        (lambda op: op.rms_norm(torch.ones(2, 3).int(), torch.ones(3), 1e-5, False), "x is Int, expected float32"),
        (lambda op: op.activation(torch.ones(2, 3), None, 6), "expected an even last size"),
        (lambda op: op.rope(torch.ones(9, 1, 1, 4), *rope_table(8, 4), None, 0, False, False), "the table has 8 rows"),
        (lambda op: op.cross_entropy(torch.ones(2, 3), torch.zeros(3).long(), None, -100, 0.0, 0.0, False),
         "target has sizes [3], expected [2]"),
        (lambda op: op.zero_nonfinite_([torch.ones(4, 4).t()[:, :2]]), "expected it to be contiguous"),
    ],
    ids=["weight size", "dtype", "odd gate", "short table", "target size", "strides"],
)  # fmt: skip
def test_refusals_tell_what_was_found_and_expected(call, message):
    with pytest.raises(RuntimeError) as error:
        call(torch.ops.megatron_ru)
    assert message in str(error.value)


def test_operators_work_in_inference_mode_and_on_one_row_of_any_rank():
    with torch.inference_mode():
        x, weight = rows(7, leaf=False), rows(7, seed=1, leaf=False)
        flat = torch.ops.megatron_ru.rms_norm(x, weight, 1e-5, False)
        deep = torch.ops.megatron_ru.rms_norm(x.reshape(1, 1, 1, 7), weight, 1e-5, False)
        assert same_bits([flat], [deep.reshape(7)])
        q = rows(2, 1, 2, 4, leaf=False)
        torch.ops.megatron_ru.rope_qk_(q, q[:, :, :0], *rope_table(4, 4), None, 0, False, False)
