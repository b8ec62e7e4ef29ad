"""The ops on a GPU: the contract of the CPU, and what only a GPU has: graphs, streams, tensors beyond 2^31 numbers."""

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.ops.activation import activation
from megatron_ru.ops.adamw import FusedAdamW, adamw
from megatron_ru.ops.build import Torch, find_nvccs
from megatron_ru.ops.cross_entropy import cross_entropy, vocab_parallel_cross_entropy
from megatron_ru.ops.gradient_guard import zero_nonfinite
from megatron_ru.ops.linear_cross_entropy import linear_cross_entropy
from megatron_ru.ops.op import OPS
from megatron_ru.ops.rms_norm import rms_norm
from megatron_ru.ops.rope import packed_positions, rope, rope_table
from tests.contracts.op_checks import CASES, check_against_formula, run_with_gradients, same_bits

pytestmark = pytest.mark.gpu

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _compiled():
    with backend.only("all"):
        reason = backend.switch("rms_norm").why_not("cuda")
        if reason:
            if not find_nvccs(Torch.running()):
                pytest.skip("no nvcc: the plain forms are all there is on this GPU")
            pytest.fail(f"the CUDA ops are not used: {reason}")
        yield


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_compiled_form_equals_the_formula(op, sample, dtype):
    assert backend.switch(op.switch).takes(sample.make("cuda", dtype).tensors()[0])
    check_against_formula(op, sample, dtype, "cuda", op.function, op.tolerance, op.gradient_tolerance)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_plain_form_equals_the_formula(op, sample, dtype):
    check_against_formula(op, sample, dtype, "cuda", op.plain, op.plain_tolerance, op.plain_tolerance)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_same_input_gives_the_same_bits(op, sample, dtype):
    results, gradients = run_with_gradients(sample.make("cuda", dtype), op, op.function)
    again, gradients_again = run_with_gradients(sample.make("cuda", dtype), op, op.function)
    assert same_bits(results, again)
    assert same_bits(gradients, gradients_again)


# Sizes of real models, where a row takes several vectors of a thread, several blocks share a sum, and so on.
LARGE = [(name, case) for name, op in OPS.items() for case in op.cases[:1] if name not in ("adamw", "gradient_guard")]


@pytest.mark.parametrize(("name", "case"), LARGE, ids=[name for name, _ in LARGE])
@pytest.mark.parametrize("dtype", HALF)
def test_sizes_of_the_benchmark(name, case, dtype):
    """Against the plain form in fp32 of the same half-precision inputs: rounded once, to half an epsilon and a bit."""
    op = OPS[name]
    call = case.make("cuda", dtype)
    wide = call.map(lambda t: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t)
    found, gradients = run_with_gradients(call, op, case.function or op.function)
    expected, expected_gradients = run_with_gradients(wide, op, op.plain)
    eps = torch.finfo(dtype).eps
    for one, other in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        rough = 4 if name == "linear_cross_entropy" or name.startswith("add_") else 0.02
        size = other.abs().max().item()
        # Below its smallest normal number fp16 has steps of 2^-24: gradients of a mean over thousands of tokens lie
        # there, and a matrix product sums thousands of them. That is what a loss scale is for.
        step = 2**-24 if dtype == torch.float16 else 0.0
        lost = step * (64 if name == "linear_cross_entropy" else 0.5)
        torch.testing.assert_close(one.float(), other, rtol=0.6 * eps, atol=max(rough * eps * size, lost))


def ordinary_sample(op):
    """One of odd sizes or grouped heads where the op has such, else its first."""
    telling = (sample for sample in op.samples if "odd" in sample.label or "grouped" in sample.label)
    return next(telling, op.samples[0])


HIDDEN = [1, 8, 127, 128, 1000, 2560, 4096, 5120, 8192, 12288, 16384, 20000, 65536]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
def test_norms_of_any_width(name, hidden, rows):
    op = OPS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2 if "add" in name else 1)]
    inputs += [torch.randn(hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2 if "layer" in name else 1)]

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves, 1e-5)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(sum(t.float().square().sum() for t in out), leaves)]

    if hidden == 1 and "layer" in name:
        return  # a row of one number has no direction: its gradient is an error times 316
    for found, expected in zip(run(op.function, torch.bfloat16), run(op.reference, torch.float64), strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2 * size)


@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 32000, 40000, 40001, 128256, 262144])
@pytest.mark.parametrize("one_pass", [False, True])
def test_cross_entropy_of_any_vocabulary(vocab, one_pass):
    torch.manual_seed(0)
    logits = (torch.randn(9, vocab, device="cuda") * 3).bfloat16().requires_grad_()
    target = torch.randint(0, vocab, (9,), device="cuda")
    losses = cross_entropy(logits, target, one_pass=one_pass, label_smoothing=0.1, z_loss=1e-3)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    wide = logits.detach().double().requires_grad_()
    expected = OPS["cross_entropy"].reference(wide, target, label_smoothing=0.1, z_loss=1e-3)
    (wanted,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8 * 1.01, atol=1e-6)


def free_gigabytes():
    return torch.cuda.mem_get_info()[0] / 2**30


BEYOND = 2**31 + 2**20


def test_rows_beyond_two_to_the_31():
    if free_gigabytes() < 40:
        pytest.skip("40 GB of free GPU memory are needed")
    hidden = 4096
    rows = BEYOND // hidden
    x = torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    (dx, dweight) = torch.autograd.grad(y, (x, weight), torch.ones((), device="cuda", dtype=y.dtype).expand_as(y))
    for part in (slice(0, 2), slice(rows - 2, rows)):
        leaf = x.detach()[part].double().requires_grad_()
        expected = OPS["rms_norm"].reference(leaf, weight.detach().double(), 1e-5)
        torch.testing.assert_close(y[part].double(), expected, rtol=2**-8 * 1.01, atol=1e-6)
        (wanted,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(dx[part].double(), wanted, rtol=2**-7, atol=1e-3)
    assert torch.isfinite(dweight).all()


def test_activation_and_rope_beyond_two_to_the_31():
    if free_gigabytes() < 40:
        pytest.skip("40 GB of free GPU memory are needed")
    x = torch.empty(BEYOND // 8192, 8192, device="cuda", dtype=torch.bfloat16).normal_()
    y = activation(x, None, "swiglu")
    torch.testing.assert_close(
        y[-2:].double(), OPS["activation"].reference(x[-2:], None, "swiglu"), rtol=2**-8 * 1.01, atol=1e-5
    )
    del y
    q = x.view(-1, 1, 64, 128)
    table = rope_table(q.shape[0], 128, device="cuda")
    expected = OPS["rope"].reference(q[-2:].clone(), None, *table, offset=q.shape[0] - 2)[0]
    found = rope(q, None, *table, in_place=True)[0]
    torch.testing.assert_close(found[-2:].double(), expected, rtol=2**-8 * 1.01, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_cross_entropy_beyond_two_to_the_31(in_place):
    if free_gigabytes() < 40:
        pytest.skip("40 GB of free GPU memory are needed")
    vocab = 128256
    rows = BEYOND // vocab + 1
    logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_()
    last = logits[-2:].clone()
    target = torch.arange(rows, device="cuda") % vocab
    logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, target, None, in_place=in_place)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    wide = last.double().requires_grad_()
    expected = OPS["cross_entropy"].reference(wide, target[-2:])
    torch.testing.assert_close(losses[-2:].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient[-2:].double(), torch.autograd.grad(expected.sum(), wide)[0], rtol=2**-8 * 1.01, atol=1e-9
    )


def test_gradient_guard_and_adamw_beyond_two_to_the_31():
    if free_gigabytes() < 50:
        pytest.skip("50 GB of free GPU memory are needed")
    parameter, gradient, moment, square = (torch.zeros(BEYOND, device="cuda") for _ in range(4))
    gradient.fill_(2.0)
    assert zero_nonfinite([gradient]).tolist() == [0]
    adamw(
        [parameter],
        [gradient],
        [moment],
        [square],
        torch.ones((), device="cuda"),
        lr=0.5,
        betas=(0.9, 0.99),
        eps=0.0,
        weight_decay=0.0,
    )
    assert parameter.min().item() == pytest.approx(-0.5, rel=1e-5)
    assert parameter.max().item() == pytest.approx(-0.5, rel=1e-5)
    gradient[-1] = float("inf")
    assert zero_nonfinite([gradient]).tolist() == [1]
    assert not gradient.any()


@pytest.mark.parametrize("name", [name for name in OPS if name != "linear_cross_entropy"])
def test_captured_graph_replays_on_new_numbers(name):
    op = OPS[name]
    sample = ordinary_sample(op)
    dtype = torch.float32
    call = sample.make("cuda", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_with_gradients(call.copy(), op, op.function)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, gradients = run_with_gradients(call, op, op.function)
    other = sample.make("cuda", dtype).map(
        lambda t: (t.detach() * 0.5).requires_grad_(t.requires_grad) if t.is_floating_point() else t
    )
    expected = run_with_gradients(other.copy(), op, op.function)
    with torch.no_grad():
        for mine, theirs in zip(call.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
    graph.replay()
    for found, wanted in zip((*results, *gradients), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_linear_cross_entropy_in_a_graph():
    x = torch.randn(64, 32, device="cuda").requires_grad_()
    weight = torch.randn(100, 32, device="cuda").requires_grad_()
    target = torch.arange(64, device="cuda")

    def run():
        loss, _ = linear_cross_entropy(x, weight, target, rows_per_chunk=24)
        return loss, *torch.autograd.grad(loss, (x, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_work_goes_to_the_current_stream_and_device():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    expected = rms_norm(x * 2, weight, 1e-5)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 2
        found = rms_norm(late, weight, 1e-5)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_second_device():
    x = torch.randn(8, 64, device="cuda:1")
    assert rms_norm(x, torch.ones(64, device="cuda:1"), 1e-5).device == x.device


def test_no_op_makes_the_host_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, op in OPS.items():
            sample = ordinary_sample(op)
            torch.cuda.set_sync_debug_mode("default")
            call = sample.make("cuda", torch.float32)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            assert call.run(op.function) is not None or name == "adamw"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_adamw_trains_as_torch_s_and_in_a_graph():
    def run(kind, **settings):
        torch.manual_seed(0)
        layer = torch.nn.Linear(33, 17).cuda()
        optimizer = kind(layer.parameters(), lr=1e-2, **settings)
        for _ in range(4):
            optimizer.zero_grad()
            layer(torch.ones(5, 33, device="cuda")).square().sum().backward()
            optimizer.step()
        return list(layer.parameters()), optimizer

    found, mine = run(FusedAdamW)
    expected, theirs = run(torch.optim.AdamW, fused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert mine.state[found[0]]["step"].is_cuda
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for _ in range(3):
        graph.replay()
        theirs.step()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_packed_positions_on_the_gpu():
    starts = torch.tensor([0, 3, 3, 8], device="cuda", dtype=torch.int32)
    assert packed_positions(starts, 10).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_linear_cross_entropy_holds_a_chunk_only():
    rows, hidden, vocab = 8192, 1024, 40000
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden, device="cuda") * hidden**-0.5).bfloat16().requires_grad_()
    target = torch.arange(rows, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_cross_entropy(x, weight, target)
    loss.backward()
    gradients = 2 * (x.numel() + weight.numel())
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra < 400e6
