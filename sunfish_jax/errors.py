"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake in what the user gave: a flag, a configuration value, a file.

    The message is one line that says what was wrong, the value given and what to do. `main.py` prints it
    without a traceback and exits with code 2.
    """
