"""Run one rank under a keeper, which a guard has started by way of a launcher.

    megatron-ru keep -- COMMAND

The keeper finds its guard in RU_GUARD, and its rank as the rank itself does. It tells the guard how the command fares,
passes signals on, and ends the command with all that it has started when the guard says so or is gone. Without RU_GUARD
it becomes the command.
"""

import os

SUMMARY = "run one rank under a keeper (job scripts do this)"


def run_raw(words: list[str]) -> int:
    """Runs the command; returns its exit code."""
    command = words[1:] if words[:1] == ["--"] else words
    if not command or words[0] in ("-h", "--help"):
        print(f"usage: megatron-ru keep -- COMMAND\n\n{__doc__}")
        return 0 if command else 2
    from megatron_ru.launch.guard.keeper import keep

    return keep(command, os.environ)
