"""The `torch.backends` entry point: an unmodified Megatron-LM command line gets our flags, ranks and CPU layer.

Torch calls `activate` at the end of every `import torch` on a machine where megatron_ru is installed, so it is
dormant unless MEGATRON_RU=1 is set, imports the standard library alone until then, and lets no exception of ours
break the import: what the user must know is printed, and the process ends.
"""

import os
import sys

_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "torch/distributed/run.py")


def activate() -> None:
    """Enters the host process when MEGATRON_RU=1; exits with code 2 and one sentence when it cannot."""
    if os.environ.get("MEGATRON_RU") != "1" or _is_launcher():
        return
    from megatron_ru.foundation.errors import UserError

    try:
        from megatron_ru.hosts.megatron_lm import enter

        enter(sys.argv[1:])
    except UserError as error:
        print(f"megatron_ru: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def _is_launcher() -> bool:
    """Whether this process starts the ranks instead of being one; torchrun imports torch too."""
    return any(word.endswith(_LAUNCHERS) for word in sys.orig_argv[:4])
