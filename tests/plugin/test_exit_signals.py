"""What a signal does to a run: noted, agreed upon, and told by the exit code."""

import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.plugin import exit_signals
from megatron_ru.plugin.exit_signals import SIGNALS, exit_signal_seams, listen, listener, stop_listening, under_guard


@pytest.fixture
def listening():
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)]
    yield listen()
    stop_listening()
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)] == before


@pytest.fixture
def args(monkeypatch):
    args = Namespace(curr_iteration=6, train_iters=20, save="checkpoints", exit_signal_handler=False,
                     exit_signal=signal.SIGINT)  # fmt: skip
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(get_args=lambda: args))
    monkeypatch.setenv("RANK", "0")
    return args


class Others:
    """The agreement with ranks that have noted nothing."""

    def __init__(self):
        self.asked = []

    def ask(self, note):
        self.asked.append(note)
        return note

    def settle(self):
        self.asked.append("settled")


@pytest.fixture
def others(listening):
    listening._agreement = Others()
    return listening._agreement


def test_signals_are_listened_to_under_a_guard_only():
    assert not under_guard({"PATH": "/bin", "RU_GUARD": ""})
    assert under_guard({"RU_GUARD": "127.0.0.1:10001:word"})
    assert under_guard({"RU_HEARTBEAT": "/tmp/rank0"})
    assert listener() is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_the_run_after_the_step(listening, others, args, capsys, number, monkeypatch):
    assert listening.signals_received() == [False]
    os.kill(os.getpid(), number)
    assert listening.signals_received() == [True]
    assert others.asked == [0, number]
    assert capsys.readouterr().err == (
        f"megatron_ru: {number.name} reached rank 0: saving step 7 of 20 in checkpoints; start the same command again "
        "to go on (exit code 75)\n"
    )


def test_the_rank_that_was_signalled_is_told_by_the_first(listening, others, args, capsys, monkeypatch):
    monkeypatch.setattr(others, "ask", lambda note: 3 * 128 + signal.SIGUSR1)
    args.save = None
    assert listening.signals_received() == [True]
    assert capsys.readouterr().err == (
        "megatron_ru: SIGUSR1 reached rank 3: leaving after step 7 of 20; nothing was saved, because the run has no "
        "--save (exit code 75)\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert listening.signals_received() == [True]
    assert capsys.readouterr().err == ""


def test_the_last_step_is_followed_by_what_follows_it_anyway(listening, others, args):
    args.curr_iteration = 19
    os.kill(os.getpid(), signal.SIGUSR1)
    assert listening.signals_received() == [False]
    assert others.asked == []
    assert listening.agreed == 0


def test_megatron_is_asked_to_look_and_finds_us(listening, args):
    before = signal.getsignal(signal.SIGINT)
    seams = {seam.target: seam for seam in exit_signal_seams(args, listening)}
    assert args.exit_signal_handler is True
    handler = seams["megatron.training.global_vars:DistributedSignalHandler"].make(object)(signal.SIGTERM).__enter__()
    assert handler is listening
    assert signal.getsignal(signal.SIGINT) is before


def test_the_users_own_signal_is_one_more(listening, args):
    args.exit_signal_handler = True
    exit_signal_seams(args, listening)
    os.kill(os.getpid(), signal.SIGINT)
    assert listening.noted is signal.SIGINT


def test_beside_megatrons_other_answer_to_signals(listening, args):
    args.exit_signal_handler_for_training = True
    with pytest.raises(UserError) as raised:
        exit_signal_seams(args, listening)
    assert str(raised.value) == (
        "--exit-signal-handler-for-training ends a run without a checkpoint, and --ru-exit-signals (or a guard) ends "
        "it with one; drop one of them"
    )


@pytest.mark.parametrize(
    ("agreed", "code", "expected"),
    [(10, 0, 75), (10, None, 75), (0, 0, 0), (10, 3, 3), (0, 16, 16)],
)
def test_the_exit_code(listening, others, args, agreed, code, expected):
    seams = {seam.target: seam for seam in exit_signal_seams(args, listening)}
    listening.agreed = agreed

    def train():
        raise SystemExit(code)

    with pytest.raises(SystemExit) as left:
        seams["megatron.training.training:train"].make(train)()
    assert (left.value.code or 0) == expected
    # A rank that leaves alone waits for nobody.
    assert others.asked == (["settled"] if code in (0, None) else [])


def test_a_run_that_reaches_its_end_waits_for_the_last_answer(listening, others, args):
    seams = {seam.target: seam for seam in exit_signal_seams(args, listening)}
    assert seams["megatron.training.training:train"].make(lambda: (20, 1.5))() == (20, 1.5)
    assert others.asked == ["settled"]


def test_the_names_are_there_and_take_what_is_expected(listening):
    args = Namespace(exit_signal_handler=False)
    for seam in exit_signal_seams(args, listening):
        assert seam.install()
        seam.undo()


def test_the_flag_is_the_one_of_the_parser():
    from megatron_ru.plugin.arguments import extend_parser

    parser = extend_parser(ArgumentParser())
    assert any(exit_signals.FLAG in action.option_strings for action in parser._actions)
