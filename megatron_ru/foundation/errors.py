"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """What was found, what was expected and what to do, in one sentence.

    Commands print the message alone and exit with `exit_code`; a traceback would only hide it.
    """

    exit_code = 2
