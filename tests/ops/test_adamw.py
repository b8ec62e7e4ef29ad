"""FusedAdamW beside torch's AdamW: the same parameters and the same state dict, whatever is asked."""

import copy
import io

import pytest
import torch

from megatron_ru.ops import backend
from megatron_ru.ops.adamw import FusedAdamW

SIZES = [(7,), (3, 5), (1,), (64, 130)]


@pytest.fixture(params=["all", "none"])
def form(request):
    with backend.only(request.param):
        yield request.param


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in SIZES]


def give_gradients(leaves, step, skip=()):
    generator = torch.Generator().manual_seed(100 + step)
    for number, leaf in enumerate(leaves):
        gradient = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        leaf.grad = None if number in skip else gradient


def train(make, steps=5, dtype=torch.float32, skip=lambda step: ()):
    leaves = parameters(dtype)
    optimizer = make(leaves)
    for step in range(steps):
        give_gradients(leaves, step, skip(step))
        optimizer.step()
    return leaves, optimizer


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}, {"maximize": True},
     {"lr": torch.tensor(3e-3)}, {"foreach": True}, {"fused": True}, {"weight_decay": 0}],
    ids=str,
)  # fmt: skip
def test_torch_s_parameters_and_state(form, settings):
    found, mine = train(lambda leaves: FusedAdamW(leaves, **settings))
    expected, theirs = train(lambda leaves: torch.optim.AdamW(leaves, **settings))
    assert_same(found, expected)
    first, second = mine.state_dict(), theirs.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, state in second["state"].items():
        assert first["state"][index].keys() == state.keys()
        assert_same(list(first["state"][index].values()), list(state.values()))


@pytest.mark.parametrize(
    "settings", [{"amsgrad": True}, {"capturable": False, "amsgrad": True, "foreach": False}], ids=str
)
def test_what_has_no_kernel_goes_torch_s_way(settings):
    found, _ = train(lambda leaves: FusedAdamW(leaves, **settings))
    expected, _ = train(lambda leaves: torch.optim.AdamW(leaves, **settings))
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    found, _ = train(lambda leaves: FusedAdamW(leaves, lr=1e-2), dtype=dtype)
    expected, _ = train(lambda leaves: torch.optim.AdamW(leaves, lr=1e-2), dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_groups_have_settings_of_their_own(form):
    def make(kind):
        return lambda leaves: kind(
            [{"params": leaves[:2], "lr": 1e-2, "weight_decay": 0.0}, {"params": leaves[2:], "betas": (0.5, 0.9)}]
        )

    assert_same(train(make(FusedAdamW))[0], train(make(torch.optim.AdamW))[0])


def test_parameters_without_a_gradient_stand_still(form):
    def skip(step):
        return {0: (1,), 1: (1, 2), 2: (), 3: (0, 1, 2, 3)}.get(step, (3,))

    found, mine = train(FusedAdamW, steps=6, skip=skip)
    expected, theirs = train(torch.optim.AdamW, steps=6, skip=skip)
    assert_same(found, expected)
    steps = [
        [float(optimizer.state[leaf]["step"]) for leaf in leaves]
        for leaves, optimizer in ((found, mine), (expected, theirs))
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(("first", "second"), [(FusedAdamW, torch.optim.AdamW), (torch.optim.AdamW, FusedAdamW)])
def test_state_dict_goes_over_to_torch_and_back(form, first, second):
    expected, _ = train(torch.optim.AdamW, steps=6)
    leaves, optimizer = train(first, steps=3)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    other = second(leaves)
    other.load_state_dict(torch.load(stored))
    for step in range(3, 6):
        give_gradients(leaves, step)
        other.step()
    assert_same(leaves, expected)


def test_loaded_step_is_not_shared_with_the_giver(form):
    leaves, optimizer = train(FusedAdamW, steps=2)
    other = FusedAdamW(leaves)
    other.load_state_dict(optimizer.state_dict())
    give_gradients(leaves, 2)
    other.step()
    assert float(optimizer.state[leaves[0]]["step"]) == 2
    assert float(other.state[leaves[0]]["step"]) == 3


def test_copy_of_the_optimizer_goes_on(form):
    expected, _ = train(torch.optim.AdamW, steps=4)
    leaves, optimizer = train(FusedAdamW, steps=2)
    leaves, optimizer = copy.deepcopy((leaves, optimizer))
    for step in (2, 3):
        give_gradients(leaves, step)
        optimizer.step()
    assert_same(leaves, expected)


@pytest.mark.parametrize("skipped", [False, True])
def test_scale_and_infinity_of_a_grad_scaler(form, skipped):
    leaves, optimizer = train(FusedAdamW, steps=1)
    expected, reference = train(torch.optim.AdamW, steps=1)
    give_gradients(leaves, 1)
    give_gradients(expected, 1)
    for leaf in leaves:
        leaf.grad *= 256
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(256.0), torch.tensor(float(skipped))
    optimizer.step()
    assert optimizer.grad_scale == 256
    if not skipped:
        reference.step()
    assert_same(leaves, expected)
    assert float(optimizer.state[leaves[0]]["step"]) == (1 if skipped else 2)


def test_copies_hold_the_rounded_parameters(form):
    leaves = parameters()
    copies = {leaf: torch.zeros_like(leaf, dtype=torch.bfloat16).requires_grad_(False) for leaf in leaves[1:]}
    optimizer = FusedAdamW(leaves)
    optimizer.write_copies_to(copies)
    for step in range(2):
        give_gradients(leaves, step)
        optimizer.step()
    for leaf, rounded in copies.items():
        assert torch.equal(rounded, leaf.detach().bfloat16())


def test_half_precision_gradients_beside_fp32_parameters():
    """As Megatron keeps them: torch's own AdamW refuses gradients of another dtype."""
    with backend.only("all"):
        leaves, expected = parameters(), parameters()
        from megatron_ru.ops.adamw import adamw

        moments = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(2)]
        reference = torch.optim.AdamW(expected, lr=1e-2)
        for step in range(3):
            give_gradients(expected, step)
            halves = [leaf.grad.bfloat16() for leaf in expected]
            for leaf, half in zip(expected, halves, strict=True):
                leaf.grad = half.float()
            reference.step()
            adamw(
                leaves, halves, *moments, torch.tensor(step + 1.0), lr=1e-2, betas=(0.9, 0.999), eps=1e-8,
                weight_decay=1e-2,
            )  # fmt: skip
        assert_same(leaves, expected)


def test_switched_off_between_two_steps():
    expected, _ = train(torch.optim.AdamW, steps=4)
    leaves, optimizer = train(FusedAdamW, steps=0)
    for step, words in enumerate(("all", "none", "none", "all")):
        give_gradients(leaves, step)
        with backend.only(words):
            optimizer.step()
    assert_same(leaves, expected)


def test_closure_and_hooks_run_once(form):
    leaves = parameters()
    torch.optim.AdamW(parameters())  # wraps AdamW's own step in its hooks
    optimizer = FusedAdamW(leaves)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))

    def closure():
        seen.append("closure")
        give_gradients(leaves, 0)
        return 7

    assert optimizer.step(closure) == 7
    assert seen == ["closure", "hook"]


def test_learning_rate_scheduler(form):
    def run(kind):
        leaves = parameters()
        optimizer = kind(leaves, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            give_gradients(leaves, step)
            optimizer.step()
            scheduler.step()
        return leaves

    assert_same(run(FusedAdamW), run(torch.optim.AdamW))
