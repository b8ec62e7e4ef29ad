"""The `torch.backends` entry point: an unmodified Megatron-LM or Megatron-DeepSpeed command line gets our flags.

Torch calls `activate` at the end of every `import torch` on a machine where megatron_ru is installed, so it is
dormant unless MEGATRON_RU=1 is set, imports the standard library alone until then, and lets no exception of ours
break the import: what the user must know is printed, and the process ends.
"""

import os
import sys
from importlib import import_module
from types import TracebackType

_LAUNCHERS = (
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "torch/distributed/run.py",
    "bin/deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
)  # fmt: skip
_ENTERING_ROOMS = ("commands", "engines", "hosts", "plugin", "seams")


def activate() -> None:
    """Enters the host process when MEGATRON_RU=1; exits when it cannot.

    The exit code is 2 after a `UserError`, told in one sentence, now or later in the host's own code. It is 1 after
    any other exception of ours, told with its traceback: a run that went on without the flags and ranks it was
    given would train something else.
    """
    if os.environ.get("MEGATRON_RU") != "1" or _is_launcher() or _is_ours():
        return
    try:
        host = import_module(f"megatron_ru.hosts.{_host()}")
        from megatron_ru.plugin.rank_errors import exit_code_of

        code = exit_code_of(lambda: host.enter(sys.argv[1:]), "megatron_ru")
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            "megatron_ru: error: could not enter this process, see above; unset MEGATRON_RU to run without it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise SystemExit(1) from None
    if code:
        raise SystemExit(code)
    _tell_user_errors()


def _host() -> str:
    """The module of `hosts` for the checkout that the script lies in."""
    folder = os.path.dirname(os.path.realpath(sys.argv[0] if sys.argv else ""))
    if os.path.isfile(os.path.join(folder, "megatron", "arguments.py")):
        from pathlib import Path

        from megatron_ru.hosts.choice import is_megatron_deepspeed

        if is_megatron_deepspeed(Path(folder)):
            return "megatron_deepspeed"
    return "megatron_lm"


def _is_launcher() -> bool:
    """Whether this process starts the ranks instead of being one; torchrun imports torch too."""
    return any(word.endswith(_LAUNCHERS) for word in sys.orig_argv[:4])


def _is_ours() -> bool:
    """Whether a command of ours imports torch: it enters by itself, and its modules are half imported now."""
    return any(f"megatron_ru.{room}" in sys.modules for room in _ENTERING_ROOMS)


def _tell_user_errors() -> None:
    """Lets a `UserError` that nobody catches end the host as it ends a command of ours."""
    from megatron_ru.foundation.errors import UserError
    from megatron_ru.plugin.rank_errors import exit_code_of

    others = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            others(kind, error, trace)
            return

        def fail() -> None:
            raise error

        # Python ends with the code of a SystemExit that the hook raises.
        raise SystemExit(exit_code_of(fail, "megatron_ru"))

    sys.excepthook = tell
