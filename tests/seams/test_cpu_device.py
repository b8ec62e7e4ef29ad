"""The CPU layer: every name it replaces, what the replacements answer, and that all of it can be taken back."""

import logging
import os
import time
from functools import reduce
from importlib import import_module
from types import FunctionType

import psutil
import pytest
import torch
from torch import nn

from megatron_ru.foundation.errors import UserError
from megatron_ru.seams import cpu_device as layer
from megatron_ru.seams.cpu_device import CPU_DEVICE, REPLACEMENTS, megatron_seams

HAS_GPU = torch.cuda.is_available()


def look_up(target):
    module, _, path = target.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


@pytest.mark.parametrize("target", REPLACEMENTS)
def test_every_name_is_replaced_and_given_back(target):
    value, reason = REPLACEMENTS[target]
    assert reason
    original = look_up(target)
    CPU_DEVICE.install()
    try:
        replaced = look_up(target)
        assert replaced is not original
        if isinstance(value, FunctionType):
            assert replaced.__code__ is value.__code__
        else:
            assert replaced is value
    finally:
        CPU_DEVICE.undo()
    assert look_up(target) is original


@pytest.mark.parametrize("seam", megatron_seams(), ids=lambda seam: seam.target)
def test_every_name_in_megatron_is_replaced_and_given_back(seam):
    original = look_up(seam.target)
    CPU_DEVICE.install()
    try:
        assert look_up(seam.target) is original, "install() alone imports nothing of Megatron"
        CPU_DEVICE.install_in_megatron()
        assert look_up(seam.target) is not original
    finally:
        CPU_DEVICE.undo()
    assert look_up(seam.target) is original


def test_no_function_stands_under_two_names(cpu_device):
    # torch's compiler files functions by identity and refuses one with two rules.
    functions = [found for target in REPLACEMENTS if isinstance(found := look_up(target), FunctionType)]
    assert len({id(function) for function in functions}) == len(functions)


def test_installing_twice_and_undoing_twice():
    original = torch.cuda.synchronize
    assert not CPU_DEVICE.installed
    CPU_DEVICE.undo()
    CPU_DEVICE.install()
    first = torch.cuda.synchronize
    CPU_DEVICE.install()
    assert CPU_DEVICE.installed
    assert torch.cuda.synchronize is first
    CPU_DEVICE.undo()
    CPU_DEVICE.undo()
    assert not CPU_DEVICE.installed
    assert torch.cuda.synchronize is original
    # A second life is like the first.
    CPU_DEVICE.install()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    CPU_DEVICE.undo()


def test_refuses_when_a_gpu_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    available, variable = torch.cuda.is_available, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    with pytest.raises(UserError) as error:
        CPU_DEVICE.install()
    assert str(error.value) == (
        "the CPU device layer cannot be installed: CUDA is already initialised in this process; choose the device "
        "before anything touches the GPU (--device cpu, or CUDA_VISIBLE_DEVICES= in the environment)"
    )
    assert not CPU_DEVICE.installed
    assert torch.cuda.is_available is available
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == variable


@pytest.mark.skipif(HAS_GPU, reason="here cuda means a GPU again")
def test_after_undo_cuda_is_an_error_again():
    CPU_DEVICE.install()
    CPU_DEVICE.undo()
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"])
@pytest.mark.parametrize("before", [None, "0"])
def test_environment_is_set_and_given_back(monkeypatch, name, before):
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    CPU_DEVICE.install()
    # What the user has set stays.
    assert os.environ[name] == (before or "1")
    CPU_DEVICE.undo()
    assert os.environ.get(name) == before


CPU = torch.device("cpu")
NAMES = ["cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 1), 0, 2]


@pytest.mark.parametrize("device", NAMES, ids=repr)
def test_creation_on_cuda_is_on_the_cpu(cpu_device, device):
    like = torch.ones(2)
    made = [
        torch.zeros(2, device=device), torch.ones(2, device=device), torch.empty(2, device=device),
        torch.full((2,), 1.0, device=device), torch.tensor([1.0, 2.0], device=device), torch.arange(2, device=device),
        torch.randn(2, device=device), torch.rand(2, device=device), torch.randint(3, (2,), device=device),
        torch.eye(2, device=device), torch.linspace(0, 1, 2, device=device), torch.as_tensor([1, 2], device=device),
        torch.empty_like(like, device=device), torch.zeros_like(like, device=device), like.new_zeros(2, device=device),
        like.new_empty(2, device=device), like.new_tensor([1.0], device=device),
        nn.Linear(2, 2, device=device).weight, nn.Embedding(2, 2, device=device).weight,
    ]  # fmt: skip
    assert {tensor.device for tensor in made} == {CPU}
    assert torch.tensor([1.0, 2.0], device=device).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("device", NAMES, ids=repr)
def test_moving_to_cuda_stays_on_the_cpu(cpu_device, device):
    x = torch.tensor([1.5, 2.5])
    assert x.to(device) is x
    assert x.to(device=device) is x
    assert x.to(device, non_blocking=True) is x
    moved = x.to(device, torch.float64)
    assert (moved.device, moved.dtype, moved.tolist()) == (CPU, torch.float64, [1.5, 2.5])
    copied = x.to(device, copy=True)
    assert copied is not x
    assert torch.equal(copied, x)
    module = nn.Linear(2, 2)
    assert module.to(device) is module
    assert module.weight.device == CPU
    with torch.device(device):
        assert torch.zeros(2).device == CPU


def test_cuda_is_the_thing_itself(cpu_device):
    x, module = torch.ones(2), nn.Linear(2, 2)
    weight = module.weight
    assert x.cuda() is x
    assert x.cuda(0, non_blocking=True) is x
    assert module.cuda() is module
    assert module.cuda(torch.cuda.current_device()).weight is weight


def test_other_arguments_of_to_are_left_alone(cpu_device):
    x = torch.ones(2)
    assert x.to(torch.float16).dtype == torch.float16
    assert x.to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
    assert x.to(torch.float32, False, True) is not x
    assert x.to("cpu") is x
    assert x.to("meta").device.type == "meta"
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_pinned_memory_is_ordinary_memory(cpu_device):
    assert torch.zeros(2, pin_memory=True).tolist() == [0.0, 0.0]
    x = torch.ones(2)
    assert x.pin_memory() is x
    loader = torch.utils.data.DataLoader([torch.ones(1)] * 4, batch_size=2, pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[[1.0], [1.0]]] * 2


def test_type_speaks_of_cuda(cpu_device):
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).half().type() == "torch.cuda.HalfTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert nn.Parameter(torch.zeros(1)).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.zeros(1).type(dtype="torch.cuda.LongTensor").dtype == torch.int64
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32


def test_gradients_flow_as_ever(cpu_device):
    weight = torch.tensor([2.0], device="cuda", requires_grad=True)
    (weight.cuda().to("cuda") ** 2).sum().backward()
    assert weight.grad.tolist() == [4.0]
    assert weight.is_leaf


class MakesATensorInItsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * torch.ones(gradient.shape, device=torch.cuda.current_device()) * gradient


def test_backward_passes_create_tensors_on_the_cpu(cpu_device):
    x = torch.arange(3.0, requires_grad=True)
    MakesATensorInItsBackward.apply(x).sum().backward()
    MakesATensorInItsBackward.apply(x).sum().backward(torch.tensor(3.0), retain_graph=True)
    assert x.grad.tolist() == [8.0] * 3
    with pytest.raises(RuntimeError, match="scalar"):
        MakesATensorInItsBackward.apply(x).backward()
    y = MakesATensorInItsBackward.apply(x)
    torch.autograd.backward((y, y.sum()), (torch.ones(3), None))
    torch.autograd.backward(y.sum())
    assert x.grad.tolist() == [14.0] * 3
    with pytest.raises(RuntimeError, match="scalar"):
        torch.autograd.backward([MakesATensorInItsBackward.apply(x)])


class Recomputes(torch.autograd.Function):
    """As Megatron's recomputation: a backward pass inside a backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            torch.autograd.backward((MakesATensorInItsBackward.apply(again),), (gradient,))
        return again.grad


def test_a_backward_pass_inside_another_creates_tensors_on_the_cpu(cpu_device):
    x = torch.arange(3.0, requires_grad=True)
    Recomputes.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_device_of_a_rank(cpu_device, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert torch.cuda.is_available() is True
    assert torch.cuda.device_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == 4
    torch.cuda.set_device(3)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(2):
        assert torch.zeros(1, device="cuda").device == CPU
    assert torch.cuda._lazy_init() is None
    assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.get_device_name(0) == "CPU"
    properties = torch.cuda.get_device_properties(0)
    assert (properties.name, properties.major, properties.minor) == ("CPU", 8, 0)
    assert properties.total_memory == psutil.virtual_memory().total
    assert properties.multi_processor_count == torch.get_num_threads()


def test_torch_itself_sees_no_accelerator(monkeypatch):
    # On a machine with an unused GPU torch would answer otherwise.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    CPU_DEVICE.install()
    try:
        assert torch.accelerator.is_available() is False
        assert torch.accelerator.current_accelerator() is None
        assert torch.accelerator.current_accelerator(check_available=True) is None
    finally:
        CPU_DEVICE.undo()


def test_streams(cpu_device):
    stream = torch.cuda.Stream(device="cuda", priority=-1)
    event = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        result = torch.ones(1) + 1
    with stream as entered:
        assert entered is stream
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    stream.synchronize()
    torch.cuda.synchronize()
    torch.cuda.set_stream(stream)
    assert stream.query() is True
    assert result.item() == 2
    assert torch.cuda.current_stream() is torch.cuda.current_stream("cuda")
    assert isinstance(torch.cuda.default_stream(), torch.cuda.Stream)
    assert torch.cuda.Stream.priority_range() == (0, 0)
    assert (stream.cuda_stream, stream.stream_id, stream.device) == (0, 0, CPU)
    assert torch.cuda.is_current_stream_capturing() is False
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()


def test_events_measure_time(cpu_device):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    start.record()
    time.sleep(0.02)
    end.record(torch.cuda.current_stream())
    passed = (time.perf_counter() - began) * 1e3
    end.synchronize()
    end.wait()
    assert end.query() is True
    assert 20 <= start.elapsed_time(end) <= passed
    assert end.elapsed_time(start) == -start.elapsed_time(end)
    later = torch.cuda.current_stream().record_event()
    assert end.elapsed_time(later) >= 0
    assert torch.cuda.current_stream().record_event(start) is start
    assert later.elapsed_time(start) >= 0


def test_memory_figures_are_those_of_the_process(cpu_device):
    resident = psutil.Process().memory_info().rss
    for name in (
        "memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "device_memory_used"
    ):  # fmt: skip
        assert getattr(torch.cuda, name)() == pytest.approx(resident, rel=0.2), name
    statistics = torch.cuda.memory_stats()
    assert statistics["allocated_bytes.all.current"] == pytest.approx(resident, rel=0.2)
    assert statistics["num_ooms"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == psutil.virtual_memory().total
    assert torch.cuda.empty_cache() is None
    assert torch.cuda.reset_peak_memory_stats() is None


@pytest.mark.parametrize("module", [torch.cuda, torch.cuda.random])
def test_random_states_are_those_of_the_cpu(cpu_device, module):
    torch.cuda.manual_seed(5)
    state = module.get_rng_state()
    first = torch.rand(3)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    module.set_rng_state(state, device="cuda:0")
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.equal(module.get_rng_state("cuda"), torch.get_rng_state())
    torch.cuda.manual_seed_all(5)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_compile_leaves_functions_alone(cpu_device):
    def square(x):
        return x * x

    assert torch.compile(square) is square
    assert torch.compile(square, dynamic=True) is square
    assert torch.compile(dynamic=True)(square) is square

    @torch.compile
    def plain(x):
        return x + 1

    @torch.compile(fullgraph=True)
    def with_options(x):
        return x + 2

    assert (plain(1), with_options(1)) == (2, 3)


@pytest.fixture
def tracker(cpu_device):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    cpu_device.install_in_megatron()
    found = CudaRNGStatesTracker()
    found.add("one", 1)
    found.add("two", 2)
    return found


def test_a_fork_draws_from_its_own_stream(tracker):
    torch.manual_seed(9)
    undisturbed = torch.rand(4)
    torch.manual_seed(9)
    drawn = [torch.rand(2)]
    with tracker.fork("one"):
        ones = [torch.rand(3)]
    with tracker.fork("two"):
        twos = [torch.rand(3)]
    with tracker.fork("one"):
        ones.append(torch.rand(3))
    drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), undisturbed), "a fork moved the default stream"
    for seed, found in ((1, ones), (2, twos)):
        expected = torch.rand(3 * len(found), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.cat(found), expected)


def test_a_fork_inside_a_fork(tracker):
    with tracker.fork("one"):
        first = torch.rand(2)
        with tracker.fork("two"):
            inner = torch.rand(2)
        second = torch.rand(2)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat((first, second)), expected)
    assert torch.equal(inner, torch.rand(2, generator=torch.Generator().manual_seed(2)))


def test_dropout_is_repeated_by_recomputation(tracker):
    from megatron.core.tensor_parallel import random

    def drop(x):
        with tracker.fork("one"):
            return nn.functional.dropout(x, 0.5) * x

    gradients = []
    for checkpointed in (False, True):
        tracker.reset()
        tracker.add("one", 1)
        torch.manual_seed(3)
        x = torch.arange(1.0, 65.0, requires_grad=True)
        previous = random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = tracker, True
        try:
            y = random.checkpoint(drop, False, x) if checkpointed else drop(x)
            torch.rand(7)
            y.sum().backward()
        finally:
            random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = previous
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert 0 < (gradients[0] == 0).sum() < 64


def test_one_warning_of_megatron_is_kept_back_and_no_other(caplog):
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    CPU_DEVICE.install()
    logger.warning("CPU RNG state changed within GPU RNG context")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    CPU_DEVICE.undo()
    logger.warning("CPU RNG state changed within GPU RNG context")
    assert len(caplog.records) == 2
    assert layer._no_shared_generator_warning not in logger.filters
