"""USR1, USR2 and TERM end a run at the end of a step: all ranks save the same step and exit with code 75.

Megatron has a door for this, `--exit-signal-handler`: after each step it asks a handler whether a signal came to any
rank, saves, and exits. Its own handler listens to one signal, asks every rank and waits for the answer in every step,
and exits with code 0 as a finished run does. Ours takes its place behind the same door.
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_ru.foundation.errors import TRY_AGAIN, UserError
from megatron_ru.foundation.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from megatron_ru.seams.seam import Seam

if TYPE_CHECKING:
    from megatron_ru.plugin.signal_agreement import Agreement

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

_GUARD_VARIABLES = ("RU_GUARD", HEARTBEAT_VARIABLE)
FLAG = "--ru-exit-signals"
_RANK_UNIT = 128
_listener: "ExitSignals | None" = None


class ExitSignals:
    """Listens to signals; stands where Megatron's `DistributedSignalHandler` stood."""

    def __init__(self) -> None:
        self.agreed = 0
        """The note of the signal that ended the run, 0 while none did."""
        self.noted: signal.Signals | None = None
        """The last signal that reached this process."""
        self._agreement: Agreement | None = None  # torch, which is not imported when listening begins
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ExitSignals":
        """Itself: Megatron enters its handler when it has made one, and never leaves it."""
        return self

    def listen(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        """From now on these signals are noted and do nothing else."""
        for number in signals:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Gives the signals back to who had them, and waits for a question that is still under way."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self.settle()
        self._agreement = None

    def settle(self) -> None:
        """Waits until all ranks have the answer to the last question: nobody may leave while others ask."""
        if self._agreement is not None:
            self._agreement.settle()

    def signals_received(self) -> list[bool]:
        """Whether the run ends after this step; the same on all ranks. Called by Megatron, once in each step."""
        from megatron.training import get_args

        args = get_args()
        # The last step is followed by the last checkpoint and evaluation anyway.
        if args.curr_iteration + 1 >= args.train_iters:
            return [False]
        if self._agreement is None:
            from megatron_ru.plugin.signal_agreement import Agreement

            self._agreement = Agreement()
        note = 0 if self.noted is None else int(os.environ.get("RANK", "0")) * _RANK_UNIT + self.noted
        self.agreed = self._agreement.ask(note)
        if self.agreed:
            _say(args, self.agreed)
        return [bool(self.agreed)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = signal.Signals(number)


def under_guard(environ: Mapping[str, str]) -> bool:
    """Whether a guard looks after this process."""
    return any(environ.get(name) for name in _GUARD_VARIABLES)


def listen() -> ExitSignals:
    """The listener of this process; a signal that comes before training ends the run after its first step."""
    global _listener
    if _listener is None:
        _listener = ExitSignals()
        _listener.listen()
    return _listener


def listener() -> ExitSignals | None:
    """The listener of this process, None when signals do here what they do anywhere."""
    return _listener


def stop_listening() -> None:
    """Gives the signals back, for tests."""
    global _listener
    if _listener is not None:
        _listener.release()
        _listener = None


def exit_signal_seams(
    args: argparse.Namespace,
    listener: ExitSignals,
    *,
    training: str = "megatron.training.training",
    handler: str = "megatron.training.global_vars:DistributedSignalHandler",
) -> list[Seam]:
    """The seams of one run, on the module `training` and on the class `handler`, whose `args` ask Megatron to look for
    signals from now on; raises `UserError` beside Megatron's other answer to signals."""
    if getattr(args, "exit_signal_handler_for_training", False):
        raise UserError(
            f"--exit-signal-handler-for-training ends a run without a checkpoint, and {FLAG} (or a guard) ends it "
            "with one; drop one of them"
        )
    if args.exit_signal_handler and hasattr(args, "exit_signal"):
        listener.listen((args.exit_signal,))
    args.exit_signal_handler = True
    return [
        Seam(
            target=handler,
            make=lambda original: lambda sig=None: listener,
            expects=("sig",),
            reason="Megatron looks for one signal, and waits for the answer of all ranks in every step",
        ),
        Seam(
            target=f"{training}:train",
            make=functools.partial(_with_exit_code, listener),
            reason="Megatron exits with code 0 whether the last iteration was reached or not",
        ),
    ]


def _with_exit_code(listener: ExitSignals, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(*arguments: Any, **keywords: Any) -> Any:
        try:
            result = original(*arguments, **keywords)
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                raise
            listener.settle()
            if not listener.agreed:
                raise
            raise SystemExit(TRY_AGAIN) from None
        listener.settle()
        return result

    return train


def _say(args: argparse.Namespace, note: int) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    rank, number = divmod(note, _RANK_UNIT)
    step = f"step {args.curr_iteration + 1} of {args.train_iters}"
    kept = (
        f"saving {step} in {args.save}; start the same command again to go on"
        if args.save
        else f"leaving after {step}; nothing was saved, because the run has no --save"
    )
    name = signal.Signals(number).name
    print(f"megatron_ru: {name} reached rank {rank}: {kept} (exit code {TRY_AGAIN})", file=sys.stderr, flush=True)
