"""Who says that the input is bad."""

import sys
from types import SimpleNamespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin import rank_errors
from megatron_ru.plugin.rank_errors import exit_code_of, meet_ranks, refused_by_megatron


def fail():
    raise UserError("a is 3, expected 2")


@pytest.fixture(autouse=True)
def ranks_have_not_met(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)


def met(monkeypatch):
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)


def test_nothing_to_say(capsys):
    ran = []
    assert exit_code_of(lambda: ran.append(1), "megatron-ru pretrain_gpt") == 0
    assert ran == [1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False), ("3", False)])
def test_the_first_rank_of_a_host_speaks_for_all(monkeypatch, capsys, rank, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    waited = []
    monkeypatch.setattr(rank_errors.time, "sleep", waited.append)
    assert exit_code_of(fail, "megatron-ru pretrain_gpt") == 2
    assert capsys.readouterr().err == ("megatron-ru pretrain_gpt: error: a is 3, expected 2\n" if said else "")
    assert waited == ([] if said else [2.0]), "who is silent must not leave before the one that speaks"


def test_a_rank_whose_environment_is_at_fault_speaks_for_itself(monkeypatch, capsys):
    def environment_at_fault(environ):
        fail()

    monkeypatch.setattr(rank_errors, "ensure_rendezvous", environment_at_fault)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code_of(meet_ranks, "megatron-ru pretrain_gpt") == 2
    assert capsys.readouterr().err == "megatron-ru pretrain_gpt: error: a is 3, expected 2\n"


def test_once_they_have_met_each_rank_speaks_for_itself(monkeypatch, capsys):
    met(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    assert exit_code_of(fail, "megatron-ru run_host") == 2
    assert capsys.readouterr().err == "megatron-ru run_host: error: rank 5: a is 3, expected 2\n"


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0, "megatron-ru")


def test_what_megatron_refuses():
    assert str(refused_by_megatron(AssertionError("two\n   lines"))) == "Megatron refuses these arguments: two lines"
    try:
        layers = 3
        assert layers % 2 == 0
    except AssertionError as error:
        # pytest writes a message of its own into asserts; Megatron's have none.
        bare = AssertionError().with_traceback(error.__traceback__)
    assert (
        str(refused_by_megatron(bare)) == "Megatron refuses these arguments: its check `assert layers % 2 == 0` failed"
    )
