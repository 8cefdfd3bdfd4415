"""The one exception that a user is meant to read."""


class WrisError(Exception):
    """Something the user can mend.

    The message is one sentence that says what was wrong, what was expected and how to fix it. The command line prints
    it after `error:` without a traceback.
    """
