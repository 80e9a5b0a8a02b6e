"""Errors meant for the person at the keyboard: what was given, what is allowed, what to do."""


class UserError(ValueError):
    """Bad input or a state of the disk that the user can mend; shown without a traceback."""
