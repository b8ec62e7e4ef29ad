"""How a rank says that its input is bad."""

import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_ru.foundation.errors import UserError


def exit_code_of(run: Callable[[], Any], name: str) -> int:
    """0 when `run` returns; a `UserError` is printed by the first rank of each host and gives its exit code."""
    try:
        run()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0
