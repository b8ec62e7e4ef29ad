"""The one exception that is meant for the person at the keyboard, and the exit code for the next attempt."""

TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h, the exit code of what is worth another try as it is."""


class UserError(ValueError):
    """What was found, what was expected and what to do, in one sentence.

    Commands print the message alone and exit with `exit_code`; a traceback would only hide it.
    """

    exit_code = 2
