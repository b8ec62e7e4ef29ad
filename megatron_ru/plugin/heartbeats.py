"""Signs of life from Megatron's training loop, and the last words of a rank that fails.

The keeper of a rank names a file in RU_HEARTBEAT (`foundation.heartbeat`). A beat comes when training begins, after
every training step and every evaluation iteration, before and after every checkpoint, and at the end. Without the
variable nothing is replaced in Megatron.
"""

import atexit
import functools
import inspect
import os
from collections.abc import Callable, MutableMapping
from typing import Any

from megatron_ru.foundation.heartbeat import VARIABLE, Heartbeat, Phase
from megatron_ru.seams.seam import Seam

_current: Heartbeat | None = None


def open_heartbeat(environ: MutableMapping[str, str]) -> Heartbeat | None:
    """This process's heartbeat, opened by the first call and beating once; None when no keeper asked for one.

    The variable is taken out of the environment: what this process starts has no step of its own to tell.
    """
    global _current
    if _current is None and VARIABLE in environ:
        _current = Heartbeat.from_environment(environ)
        del environ[VARIABLE]
        if _current is not None:
            _current.register_stacks()
            _current.beat()
            atexit.register(_ended, _current, os.getpid())
    return _current


def current_heartbeat() -> Heartbeat | None:
    """The heartbeat of this process, None when it has none."""
    return _current


def close_heartbeat() -> None:
    """Ends the heartbeat of this process, for tests."""
    global _current
    if _current is not None:
        atexit.unregister(_ended)
        _current.close()
        _current = None


def tell_failure(error: BaseException) -> None:
    """Leaves the exception that ends this rank beside its heartbeat, where there is one."""
    if _current is not None:
        _current.failed(error)


def heartbeat_seams(
    heartbeat: Heartbeat,
    *,
    training: str = "megatron.training.training",
    evaluation_step: str | None = "megatron.training.ft_integration:on_eval_step_end",
) -> list[Seam]:
    """The seams on the loop (in the module `training`), on evaluation (a function that is called after each of its
    steps; None: there is none) and on saving of one run."""
    reason = "Megatron tells its progress to one fault-tolerance package only"
    seams = [
        Seam(
            target=f"{training}:train",
            make=functools.partial(_before_training, heartbeat),
            reason=reason,
        ),
        Seam(
            target=f"{training}:training_log",
            make=functools.partial(_after_step, heartbeat),
            expects=("iteration",),
            reason=reason,
        ),
        Seam(
            target=f"{training}:save_checkpoint",
            make=functools.partial(_around_saving, heartbeat),
            reason=reason,
        ),
    ]
    if evaluation_step is not None:
        make = functools.partial(_after_evaluation_iteration, heartbeat)
        seams.append(Seam(target=evaluation_step, make=make, reason=reason))
    return seams


def _before_training(heartbeat: Heartbeat, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(*arguments: Any, **keywords: Any) -> Any:
        from megatron.training import get_args

        # A run that goes on from a checkpoint has these steps behind it. The phase changes with the first of its own.
        heartbeat.beat(get_args().iteration)
        return original(*arguments, **keywords)

    return train


def _after_step(heartbeat: Heartbeat, original: Callable[..., Any]) -> Callable[..., Any]:
    place = list(inspect.signature(original).parameters).index("iteration")

    @functools.wraps(original)
    def log(*arguments: Any, **keywords: Any) -> Any:
        # Not bound to the signature: that would take longer than the beat.
        step = keywords["iteration"] if "iteration" in keywords else arguments[place]
        heartbeat.beat(step, Phase.TRAINING)
        return original(*arguments, **keywords)

    return log


def _after_evaluation_iteration(heartbeat: Heartbeat, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_eval_step_end(*arguments: Any, **keywords: Any) -> Any:
        heartbeat.beat(phase=Phase.EVALUATING)
        return original(*arguments, **keywords)

    return on_eval_step_end


def _around_saving(heartbeat: Heartbeat, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(*arguments: Any, **keywords: Any) -> Any:
        before = heartbeat.phase
        heartbeat.beat(phase=Phase.SAVING)
        result = original(*arguments, **keywords)
        heartbeat.beat(phase=before)
        return result

    return save


def _ended(heartbeat: Heartbeat, owner: int) -> None:
    # A forked child inherits this call.
    if os.getpid() == owner:
        heartbeat.beat(phase=Phase.ENDED)
