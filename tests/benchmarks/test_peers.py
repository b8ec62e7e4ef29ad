"""What is known of other libraries fits our ops, whether they are installed or not."""

import inspect
import subprocess
import sys

import pytest
import torch

from megatron_ru.benchmarks.accuracy import accuracy, differentiable_outputs, exact_results
from megatron_ru.benchmarks.peer import PEERS, Peer, UnsupportedError, bound, leaves_of, only_default
from megatron_ru.foundation.errors import UserError
from megatron_ru.ops.op import OPS, Call, random_tensor
from tests.benchmarks.conftest import make_op


def test_words_of_the_command():
    assert set(PEERS) == {"torch", "compile", "liger", "te", "apex", "quack"}
    with pytest.raises(UserError, match=r"unknown peer 'ligr' \(did you mean liger\?\)"):
        PEERS["ligr"]


@pytest.mark.parametrize("name", sorted(PEERS))
def test_adapters_take_the_arguments_of_our_ops(name):
    for op_name, ways in PEERS[name].adapters.items():
        arguments = dict.fromkeys(inspect.signature(OPS[op_name].function).parameters)
        for adapter in ways.values():
            inspect.signature(adapter).bind(**arguments)


@pytest.mark.parametrize("name", ["torch", "compile"])
def test_torch_has_every_op(name):
    assert all(PEERS[name].variants(op) for _, op in OPS.items())
    assert PEERS[name].missing("cpu") == ""
    assert PEERS[name].version().startswith("2.")


def _logits(rows=6, vocab=20):
    return random_tensor(rows, vocab, device="cpu", dtype=torch.float32, size=3), torch.arange(rows) * 7 % vocab


def _cross_entropy():
    logits, target = _logits()
    target[2] = -100
    return Call(arguments=(logits, target), keywords={"reduction": "mean", "label_smoothing": 0.1})


def _vocab_parallel():
    return Call(arguments=(*_logits(), None))


def _linear_cross_entropy():
    x, target = _logits(vocab=8)
    weight = random_tensor(20, 8, device="cpu", dtype=torch.float32, seed=1)
    return Call(arguments=(x, weight, target), keywords={"bias": torch.zeros(20).requires_grad_()})


def _adamw():
    def many(seed, dtype=torch.float32):
        shapes = ((5,), (3, 4))
        return [random_tensor(*shape, device="cpu", dtype=dtype, seed=seed, leaf=False) for shape in shapes]

    moments = [tensor.square() for tensor in many(2)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "copies": many(3, torch.bfloat16)}
    return Call(arguments=(many(0), many(1, torch.bfloat16), many(4), moments, torch.tensor(7.0)), keywords=settings)


@pytest.mark.parametrize(
    ("op_name", "make"),
    [
        ("cross_entropy", _cross_entropy),
        ("vocab_parallel_cross_entropy", _vocab_parallel),
        ("linear_cross_entropy", _linear_cross_entropy),
        ("adamw", _adamw),
    ],
)
def test_torch_s_own_functions_are_right(op_name, make):
    """Those that stand in for the plain forms."""
    op = OPS[op_name]
    call, trial, own = make(), make(), make()
    exact = exact_results(op, call, torch.float32, differentiable_outputs(op, trial, trial.run(op.plain)))
    found = accuracy(op, own, PEERS["torch"].prepare(op, op.cases[0], own), exact)
    assert found.good, found
    assert (found.gradient is not None) == op.differentiable


def test_missing_library_is_told_without_importing_anything():
    peer = Peer(name="x", title="X", module="no_such_library.inner", distribution="no-such-library", summary="")
    assert peer.missing("cuda") == "not installed"
    assert peer.missing("cpu") == "has no ops for cpu"
    assert peer.version() == ""


def test_library_that_breaks_on_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("raise OSError('libfoo.so.1: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    peer = Peer(name="x", title="X", module="broken_library", distribution="x", summary="")
    assert peer.missing("cuda") == "cannot be imported: OSError: libfoo.so.1: cannot open"


def test_arguments_come_by_name_with_defaults():
    op = make_op(function=lambda x, scale=2.0, *, offset=0: x * scale + offset)
    x = torch.ones(2)
    assert bound(op, Call(arguments=(x,), keywords={"offset": 3})) == {"x": x, "scale": 2.0, "offset": 3}


def test_settings_that_a_library_lacks():
    only_default(positions=None, offset=0, interleaved=False, z_loss=0.0)
    with pytest.raises(UnsupportedError, match="has no label smoothing"):
        only_default(label_smoothing=0.1)
    with pytest.raises(UnsupportedError, match="has no bias"):
        only_default(bias=torch.zeros(3))


def test_leaves_are_those_that_require_gradients():
    first, second = torch.ones(1, requires_grad=True), torch.ones(1)
    assert leaves_of(first, None, second) == (first,)


def test_nothing_of_others_is_imported_with_the_peers():
    program = (
        "import sys; from megatron_ru.benchmarks.peer import PEERS; list(PEERS); "
        "print([name for name in ('liger_kernel', 'quack', 'apex', 'transformer_engine') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
