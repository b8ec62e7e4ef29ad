"""Every op in both forms against its float64 formula, and what callers may rely on besides the values."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.ops.build import find_compiler
from megatron_ru.ops.op import OPS
from tests.contracts.op_checks import CASES, check_against_formula, run_with_gradients, same_bits, upstream

LOADED = backend.library_status().path is not None


@pytest.fixture(autouse=True)
def _every_op_is_on():
    with backend.only("all"):
        yield


@pytest.fixture
def compiled():
    """Stands before tests of the compiled form: without a compiler there is none; with one it must be there."""
    if not LOADED:
        if find_compiler() is None:
            pytest.skip("no C++ compiler: the plain forms are all there is")
        pytest.fail(f"the compiled ops are not loaded: {backend.library_status().reason}")


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_plain_form_equals_the_formula(op, sample, dtype):
    check_against_formula(op, sample, dtype, "cpu", op.plain, op.plain_tolerance, op.plain_tolerance)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_compiled_form_equals_the_formula(op, sample, dtype):
    assert backend.switch(op.switch).takes(sample.make("cpu", dtype).tensors()[0])
    check_against_formula(op, sample, dtype, "cpu", op.function, op.tolerance, op.gradient_tolerance)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_switched_off_op_equals_the_formula(op, sample, dtype):
    with backend.only("none"):
        check_against_formula(op, sample, dtype, "cpu", op.function, op.plain_tolerance, op.plain_tolerance)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "sample", "dtype"), CASES)
def test_same_input_gives_the_same_bits(op, sample, dtype):
    results, gradients = run_with_gradients(sample.make("cpu", dtype), op, op.function)
    again, gradients_again = run_with_gradients(sample.make("cpu", dtype), op, op.function)
    assert same_bits(results, again)
    assert same_bits(gradients, gradients_again)


# Each thread sums the gradient of a norm's weight over its own rows: another number of threads, another order. The
# first gradient, that of x, is made row by row.
SUMMED_BY_THREADS = {"rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("op", "sample", "dtype"),
    # Matrix products are torch's own, which may divide them as it likes.
    [param for param in CASES if param.values[0].name != "linear_cross_entropy"],
)
def test_number_of_threads_does_not_matter(op, sample, dtype):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results, gradients = run_with_gradients(sample.make("cpu", dtype), op, op.function)
            found.append([*results, *(gradients[:1] if op.name in SUMMED_BY_THREADS else gradients)])
    finally:
        torch.set_num_threads(before)
    assert same_bits(*found)


# What is written in the forward can be taken once, for one upstream gradient: gradcheck takes it more often.
WRITTEN = {"cross_entropy", "linear_cross_entropy"}
# Differences need a call for every number, numbers that do not lie over each other, and a function that is smooth.
SMOOTH = [
    pytest.param(op, sample, id=f"{name}-{sample.label}".replace(" ", "_"))
    for name, op in OPS.items()
    if op.differentiable
    for sample in op.samples
    if sample.gradients
    and torch.float32 in sample.dtypes
    and sample.scale is None
    and sum(leaf.numel() for leaf in sample.make("cpu", torch.float64).leaves()) < 700
    and not any(word in sample.label for word in ("seen", "over the", "outside", "large", "denormal", "-inf", "equal"))
]


def differentiable(op, call, leaves, inputs):
    """The results that have a gradient, of the call with `inputs` in place of its leaves."""
    replaced = dict(zip(map(id, leaves), inputs, strict=True))
    made = call.map(lambda tensor: replaced.get(id(tensor), tensor)).run(op.function)
    return [result for result in op.results(call, made) if result.requires_grad]


@pytest.mark.parametrize("words", ["all", "none"])
@pytest.mark.parametrize(("op", "sample"), [param for param in SMOOTH if param.values[0].name not in WRITTEN])
def test_gradients_equal_differences(op, sample, words, request):
    if words == "all":
        request.getfixturevalue("compiled")
    call = sample.make("cpu", torch.float64)
    leaves = call.leaves()
    with backend.only(words):
        assert torch.autograd.gradcheck(
            lambda *inputs: differentiable(op, call, leaves, inputs), leaves, check_undefined_grad=False
        )


@pytest.mark.parametrize("words", ["all", "none"])
@pytest.mark.parametrize(("op", "sample"), [param for param in SMOOTH if param.values[0].name in WRITTEN])
def test_gradients_equal_differences_along_directions(op, sample, words, request):
    if words == "all":
        request.getfixturevalue("compiled")
    call = sample.make("cpu", torch.float64)
    leaves = call.leaves()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5

    def value(inputs):
        results = differentiable(op, call, leaves, inputs)
        return sum((result * upstream(result, n)).sum() for n, result in enumerate(results))

    with backend.only(words):
        gradients = torch.autograd.grad(value(leaves), leaves)
        for number, leaf in enumerate(leaves):
            for _ in range(3):
                direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)

                def moved(by, number=number, direction=direction):
                    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
                    inputs[number] = (leaves[number].detach() + by * direction).requires_grad_()
                    return value(inputs).item()

                difference = (moved(step) - moved(-step)) / (2 * step)
                assert (gradients[number] * direction).sum().item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


def ordinary(op):
    """A sample of odd sizes without extremes."""
    return next(sample for sample in op.samples if any(word in sample.label for word in ("odd", "grouped")))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
@pytest.mark.parametrize("weigh", ["expanded", "transposed"])
def test_gradients_come_in_any_strides(name, weigh):
    op = OPS[name]

    def number(result):
        if result.dim() == 0 or weigh == "expanded":
            return result.sum() * 2
        return (result.transpose(0, -1).contiguous() ** 3).sum()

    def gradients(function):
        call = ordinary(op).make("cpu", torch.float32)
        results = op.results(call, call.run(function))
        return torch.autograd.grad(sum(number(result) for result in results if result.requires_grad), call.leaves())

    assert_same(gradients(op.function), gradients(op.plain))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_gradient_reaches_what_a_view_was_taken_of(name):
    """The inputs are parts of larger tensors, as q and k of a fused projection are."""
    op = OPS[name]

    def gradients(function):
        call = ordinary(op).make("cpu", torch.float32)
        bases = [torch.cat((leaf.detach(), leaf.detach()), dim=0).requires_grad_() for leaf in call.leaves()]
        views = {id(leaf): base[: leaf.shape[0]] for leaf, base in zip(call.leaves(), bases, strict=True)}
        results = op.results(call, call.map(lambda tensor: views.get(id(tensor), tensor)).run(function))
        return torch.autograd.grad(sum(result.square().sum() for result in results if result.requires_grad), bases)

    assert_same(gradients(op.function), gradients(op.plain))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_recomputed_activations_give_the_same_gradients(name):
    op = OPS[name]

    def gradients(run):
        call = ordinary(op).make("cpu", torch.float32)
        leaves = call.leaves()
        return torch.autograd.grad(run(lambda *_: gradient_source(op, call), *leaves), leaves)

    def gradient_source(op, call):
        return sum(result.square().sum() for result in op.results(call, call.run(op.function)) if result.requires_grad)

    def recomputed(function, *inputs):
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)

    assert same_bits(gradients(recomputed), gradients(lambda function, *inputs: function(*inputs)))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", list(OPS))
def test_no_gradient_mode_gives_the_same_values(name):
    op = OPS[name]
    for sample in op.samples[:3]:
        call, again = sample.make("cpu", torch.float32), sample.make("cpu", torch.float32)
        with torch.no_grad():
            silent = op.results(call, call.run(op.function))
        assert not any(result.requires_grad and result.grad_fn for result in silent)
        recorded = [result.detach() for result in op.results(again, again.run(op.function))]
        if op.name in ("cross_entropy", "linear_cross_entropy"):
            # One pass and two sum the exponentials in other orders.
            for found, expected in zip(silent, recorded, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert same_bits([result.detach() for result in silent], recorded)


@pytest.mark.usefixtures("compiled")
def test_every_operator_belongs_to_an_op():
    """A new operator of the library must be named by the op that uses it, and so be looked at here."""
    internal = {
        "build_info", "norm_forward", "norm_backward", "activation_backward", "activation_backward_", "glu_backward",
        "cross_entropy_one_pass", "cross_entropy_one_pass_mean",
        # For a GPU alone: tests/gpu/test_fp8_on_gpu.py.
        "round_fp8",
    }  # fmt: skip
    registered = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("megatron_ru::")
    }
    named = {name for _, op in OPS.items() for name in op.torch_ops}
    assert registered - internal == named


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", list(OPS))
def test_compiled_form_is_faster_to_reach_than_a_microsecond(name):
    """What stands between the caller and the operator. The best of several rounds: others use this machine too."""
    import timeit

    switch = backend.switch(OPS[name].switch)
    x = torch.ones(4)
    seconds = min(timeit.repeat(lambda: switch.takes(x), number=2000, repeat=20)) / 2000
    assert seconds < 1e-6


COMPILED_BY_TORCH = """
import json, sys, traceback
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from megatron_ru.ops import backend
from megatron_ru.ops.op import OPS


def compare(op, sample):
    call, eager = sample.make("cpu", torch.float32), sample.make("cpu", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op.function, backend="aot_eager", fullgraph=True)
    found = op.results(call, call.run(compiled))
    expected = op.results(eager, eager.run(op.function))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    if op.differentiable:
        total = lambda results: sum(result.square().sum() for result in results if result.requires_grad)
        for a, b in zip(
            torch.autograd.grad(total(found), call.leaves()),
            torch.autograd.grad(total(expected), eager.leaves()),
            strict=True,
        ):
            torch.testing.assert_close(a, b, equal_nan=True)


def look_inside(op, sample):
    # The op itself is in the graph, not what its plain form is made of.
    torch._dynamo.reset()
    seen = EagerAndRecordGraphs()
    sample.make("cpu", torch.float32).run(torch.compile(op.function, backend=seen))
    modules = [module for graph in seen.graphs for module in graph.modules() if hasattr(module, "graph")]
    targets = [str(node.target) for module in modules for node in module.graph.nodes]
    assert any(target.startswith("megatron_ru") for target in targets), targets


answers = {}
assert backend.library_status().path is not None
for name, op in OPS.items():
    try:
        for sample in op.samples[1:4]:
            compare(op, sample)
        look_inside(op, op.samples[1])
        answers[name] = "same"
    except Exception:
        answers[name] = traceback.format_exc()[-3000:]
# Whether a GPU can be used is asked while a graph is traced, and must not break it.
usable = torch.compile(lambda x: x + int(backend._cuda_is_usable()), backend="eager", fullgraph=True)
answers["question"] = "same" if usable(torch.zeros(())).item() == backend._cuda_is_usable() else "other"
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def compiled_by_torch():
    """What torch's compiler made of each op, in a process where it is not disabled."""
    environ = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    program = [sys.executable, "-c", COMPILED_BY_TORCH]
    shown = subprocess.run(program, env=environ, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    return json.loads(shown.stdout)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", [*OPS, "question"])
def test_torch_compile_gives_the_same_values(name, compiled_by_torch):
    assert compiled_by_torch[name] == "same"
